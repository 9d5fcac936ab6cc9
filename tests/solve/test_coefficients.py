"""γ against dense solves, its invariances, and what happens to broken matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_fngd.solve.coefficients import solve
from tests.helpers import gamma_of

DAMPINGS = [1e-3, 0.1, 10.0]


def gradients(n: int = 12, p: int = 30, dtype: torch.dtype = torch.float64) -> Tensor:
    """Per-sample gradients with a common part and norms spread over an order of magnitude."""
    u = torch.randn(p, n, dtype=dtype) + torch.randn(p, 1, dtype=dtype)
    return u * torch.logspace(-0.5, 0.5, n, dtype=dtype)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_relative_damping_equals_dense_solve(damping: float) -> None:
    u = gradients()
    gram = u.t() @ u
    solution = solve(gram, damping=damping)
    assert solution.finite and not solution.fallback
    torch.testing.assert_close(solution.gamma, gamma_of(gram, damping), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kappa", [1.0, 12.0, 48.0])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_absolute_damping_equals_natural_gradient(damping: float, kappa: float) -> None:
    u = gradients()
    n = u.shape[1]
    mean = u.mean(1)
    eye = torch.eye(len(u), dtype=u.dtype)
    expected = damping * torch.linalg.solve(damping * eye + u @ u.t() / n, mean)
    raw = u / kappa  # what backward delivers
    gamma = solve(raw.t() @ raw, damping=damping, mode="absolute", kappa=kappa).gamma
    torch.testing.assert_close(u @ gamma / n, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_large_damping_goes_to_one(mode: str) -> None:
    u = gradients()
    errors = [
        (solve(u.t() @ u, damping=damping, mode=mode).gamma - 1).abs().max()
        for damping in (1e4, 1e5, 1e6)
    ]
    # O(1/λ): ten times the damping, a tenth of the distance.
    assert errors[0] < 1e-1
    torch.testing.assert_close(
        errors[0] / errors[1], torch.tensor(10.0).double(), rtol=0.01, atol=0
    )
    torch.testing.assert_close(
        errors[1] / errors[2], torch.tensor(10.0).double(), rtol=0.01, atol=0
    )


@pytest.mark.parametrize(
    ("factor", "tolerance"), [(65536.0, 0.0), (2.0**-16, 0.0), (3.0, 1e-5), (1e-4, 1e-5)]
)
def test_relative_damping_ignores_the_loss_scale(factor: float, tolerance: float) -> None:
    u = gradients(dtype=torch.float32)
    grams = [u.t() @ u, (factor * u).t() @ (factor * u)]
    pair = [solve(k, damping=0.1).gamma for k in grams]
    torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def test_not_positive_definite_falls_back_and_reports() -> None:
    # Eigenvalues -0.5 and 2 with λ far below: Cholesky must fail, the negative one counts as 0.
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([-0.5, 2.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    broken = (basis * values) @ basis.t()
    repaired = (basis * values.clamp(min=0)) @ basis.t()
    solution = solve(broken.float(), damping=1e-3, mode="absolute")
    assert solution.fallback and solution.finite
    expected = solve(repaired, damping=1e-3, mode="absolute").gamma
    torch.testing.assert_close(solution.gamma.double(), expected, rtol=1e-3, atol=1e-3)


def test_rounding_of_nearly_equal_samples_is_survived() -> None:
    # Rank one to float32 precision, λ below its rounding errors.
    u = torch.randn(50, 1) * 100 + torch.randn(50, 32) * 1e-3
    solution = solve(u.t() @ u, damping=1e-7)
    exact = u.double()
    assert solution.finite
    # All samples are alike: each gets about λ/(λ + |u|²), which is nearly nothing.
    assert solution.gamma.abs().max() < 1
    assert gamma_of(exact.t() @ exact, 1e-7).abs().max() < 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 1)], ids=["diagonal", "off diagonal"])
def test_non_finite_gives_one(bad: float, place: tuple[int, int]) -> None:
    u = gradients()
    gram = u.t() @ u
    gram[place] = gram[place[::-1]] = bad
    solution = solve(gram, damping=0.1)
    assert not solution.finite
    assert torch.equal(solution.gamma, torch.ones(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_zero_gradients_give_one(mode: str) -> None:
    solution = solve(torch.zeros(5, 5), damping=0.1, mode=mode)
    assert solution.finite
    assert torch.equal(solution.gamma, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_repeated_samples_are_solved(dtype: torch.dtype) -> None:
    # A batch that holds every sample three times: K has a third of full rank.
    u = gradients(10, 40).repeat(1, 3)
    gram = u.t() @ u
    solution = solve(gram.to(dtype), damping=0.1)
    assert solution.finite
    tolerance = 1e-3 if dtype is torch.float32 else 1e-8
    torch.testing.assert_close(
        solution.gamma.double(), gamma_of(gram, 0.1), rtol=tolerance, atol=tolerance
    )


def test_input_is_left_alone() -> None:
    u = gradients()
    gram = u.t() @ u
    before = gram.clone()
    solve(gram, damping=0.1)
    assert torch.equal(gram, before)


def test_mean_of_the_weights_is_positive() -> None:
    # Even where single weights are negative.
    for seed in range(20):
        torch.manual_seed(seed)
        u = gradients(n=30, p=5)
        gamma = solve(u.t() @ u, damping=1e-6).gamma
        assert gamma.min() < 0 < gamma.mean()

"""γ against dense solves, its invariances, and what happens to broken matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import gamma_of
from torch import Tensor

from hf_fngd.coefficients import Solution, solve, solve_nystrom, temper

DAMPINGS = [1e-3, 0.1, 10.0]


def gradients(n: int = 12, p: int = 30, dtype: torch.dtype = torch.float64) -> Tensor:
    """Per-sample gradients with a common part and norms spread over an order of magnitude."""
    u = torch.randn(p, n, dtype=dtype) + torch.randn(p, 1, dtype=dtype)
    return u * torch.logspace(-0.5, 0.5, n, dtype=dtype)


def nystrom(gram: Tensor, landmarks: list[int], damping: float, **options: object) -> Solution:
    chosen = torch.tensor(landmarks)
    count = torch.tensor(len(gram))
    return solve_nystrom(gram[:, chosen], chosen, gram.trace(), count, damping=damping, **options)


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


@pytest.mark.parametrize("token", [False, True], ids=["exact", "nystrom"])
@pytest.mark.parametrize(
    ("factor", "tolerance"), [(65536.0, 0.0), (2.0**-16, 0.0), (3.0, 1e-5), (1e-4, 1e-5)]
)
def test_relative_damping_ignores_the_loss_scale(
    factor: float, tolerance: float, token: bool
) -> None:
    u = gradients(dtype=torch.float32)
    grams = [u.t() @ u, (factor * u).t() @ (factor * u)]
    pair = [
        nystrom(k, [0, 3, 5, 7], 0.1).gamma if token else solve(k, damping=0.1).gamma for k in grams
    ]
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


@pytest.mark.parametrize("token", [False, True], ids=["exact", "nystrom"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (4, 1)], ids=["diagonal", "beside"])
def test_non_finite_gives_one(bad: float, place: tuple[int, int], token: bool) -> None:
    u = gradients()
    gram = u.t() @ u
    gram[place] = gram[place[::-1]] = bad
    solution = nystrom(gram, [0, 1, 2], 0.1) if token else solve(gram, damping=0.1)
    assert not solution.finite
    assert torch.equal(solution.gamma, torch.ones(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("token", [False, True], ids=["exact", "nystrom"])
def test_zero_gradients_give_one(mode: str, token: bool) -> None:
    zero = torch.zeros(5, 5)
    solution = (
        nystrom(zero, [0, 1], 0.1, mode=mode) if token else solve(zero, damping=0.1, mode=mode)
    )
    assert solution.finite
    assert torch.equal(solution.gamma, torch.ones(5))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_nystrom_with_all_rows_is_exact(mode: str, damping: float) -> None:
    u = gradients()
    gram = u.t() @ u
    solution = nystrom(gram, torch.randperm(12).tolist(), damping, mode=mode, kappa=12.0)
    exact = solve(gram, damping=damping, mode=mode, kappa=12.0).gamma
    assert solution.finite and not solution.fallback
    torch.testing.assert_close(solution.gamma, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_jitter_rule_survives_repeated_samples(dtype: torch.dtype) -> None:
    # A batch that holds every sample three times: the landmarks' matrix has a third of full rank.
    once = gradients(10, 40)
    u = once.repeat(1, 3)
    gram = u.t() @ u
    solution = nystrom(gram.to(dtype), list(range(30)), 0.1)
    assert solution.finite
    tolerance = 1e-3 if dtype is torch.float32 else 1e-8
    torch.testing.assert_close(
        solution.gamma.double(), gamma_of(gram, 0.1), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 0.1, 1.0])
def test_nystrom_in_float32_equals_float64(damping: float) -> None:
    u = gradients(200, 60)
    gram = u.t() @ u
    landmarks = torch.randperm(200)[:40].tolist()
    low = nystrom(gram.float(), landmarks, damping)
    high = nystrom(gram, landmarks, damping)
    assert low.finite
    torch.testing.assert_close(low.gamma.double(), high.gamma, rtol=1e-3, atol=1e-3)


def test_more_landmarks_come_nearer() -> None:
    u = gradients(200, 60)
    gram = u.t() @ u
    order = torch.randperm(200).tolist()
    exact = gamma_of(gram, 0.1)
    errors = [
        float((nystrom(gram, order[:m], 0.1).gamma - exact).norm() / exact.norm())
        for m in (4, 16, 40, 60)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


def test_input_is_left_alone() -> None:
    u = gradients()
    gram = u.t() @ u
    before = gram.clone()
    solve(gram, damping=0.1)
    nystrom(gram, [1, 2], 0.1)
    assert torch.equal(gram, before)


def test_temper() -> None:
    gamma = torch.tensor([-0.5, 0.0, 1.0, 3.5], dtype=torch.float64)
    assert temper(gamma) is gamma
    assert temper(gamma, scale="one").tolist() == [-0.5, 0.0, 1.0, 3.5]
    assert temper(gamma, maximum=2.0).tolist() == [0.0, 0.0, 1.0, 2.0]
    assert temper(2 * gamma, scale="one", maximum=2.0).tolist() == [0.0, 0.0, 1.0, 2.0]
    assert temper(gamma, power=0.0).tolist() == [1.0] * 4
    assert temper(4 * gamma, power=0.5).tolist() == pytest.approx([0.0, 0.0, 2.0, 14**0.5])


def test_mean_of_exact_weights_is_positive() -> None:
    # So dividing by it is safe, even where single weights are negative.
    for seed in range(20):
        torch.manual_seed(seed)
        u = gradients(n=30, p=5)
        gamma = solve(u.t() @ u, damping=1e-6).gamma
        assert gamma.min() < 0 < gamma.mean()
        torch.testing.assert_close(
            temper(gamma, scale="one").mean(), torch.tensor(1.0).double(), rtol=1e-9, atol=0
        )

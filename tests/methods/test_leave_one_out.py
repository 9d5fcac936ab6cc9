"""leave_one_out: each sample is preconditioned with the Fisher of the others, one solve each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hf_fngd.solve.coefficients import solve
from tests.helpers import sample_gradients
from tests.methods.test_natural_gradient import DAMPING, EXACT, N, case, displacement
from tests.solve.test_coefficients import DAMPINGS, gradients


def direction(u: Tensor, damping: float) -> Tensor:
    """λ/N Σ_n (λI + F₋ₙ)⁻¹ uₙ with F₋ₙ = Σ_{m≠n} uₘuₘᵀ/N, one dense solve a sample."""
    p, n = u.shape
    eye = torch.eye(p, dtype=u.dtype)
    total = torch.zeros(p, dtype=u.dtype)
    for i in range(n):
        others = u[:, [m for m in range(n) if m != i]]
        total += torch.linalg.solve(damping * eye + others @ others.t() / n, u[:, i])
    return damping * total / n


@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_equals_a_dense_solve_without_each_sample(damping: float, mode: str) -> None:
    u = gradients()
    gram = u.t() @ u
    solution = solve(gram, damping=damping, mode=mode, kappa=1.0, leave_one_out=True)
    unit = gram.trace() / len(gram) ** 2 if mode == "relative" else 1.0
    assert solution.finite and not solution.fallback
    torch.testing.assert_close(
        u @ solution.gamma / len(gram), direction(u, damping * float(unit)), **EXACT
    )


def test_samples_that_share_nothing_count_alike_whatever_their_size() -> None:
    u = torch.eye(6, dtype=torch.float64) * torch.logspace(-2, 2, 6, dtype=torch.float64)
    gram = u.t() @ u
    assert (solve(gram, damping=0.1).gamma < 0.1).any()
    gamma = solve(gram, damping=0.1, leave_one_out=True).gamma
    torch.testing.assert_close(gamma, torch.ones(6, dtype=torch.float64), **EXACT)


def test_one_sample_alone_has_its_plain_gradient() -> None:
    gamma = solve(torch.tensor([[7.0]]), damping=0.01, leave_one_out=True).gamma
    torch.testing.assert_close(gamma, torch.ones(1))


def test_samples_that_repeat_each_other_are_weighted_down() -> None:
    u = torch.eye(4, dtype=torch.float64)[:, [0, 0, 0, 1]]
    gamma = solve(u.t() @ u, damping=0.1, leave_one_out=True).gamma
    torch.testing.assert_close(gamma[3], torch.ones((), dtype=torch.float64), **EXACT)
    assert (gamma[:3] < 0.2).all() and (gamma[:3] > 0).all()


def test_an_indefinite_matrix_is_solved_without_its_negative_part() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1
    solution = solve(gram, damping=0.1, leave_one_out=True)
    assert solution.finite and solution.fallback
    cut = torch.full((2, 2), 1.5)
    wanted = solve(cut, damping=0.1 * 1.0 / 1.5, leave_one_out=True).gamma
    torch.testing.assert_close(solution.gamma, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_gradients_are_reported(bad: float) -> None:
    u = gradients()
    gram = u.t() @ u
    gram[2, 3] = gram[3, 2] = bad
    solution = solve(gram, damping=0.1, leave_one_out=True)
    assert not solution.finite
    torch.testing.assert_close(solution.gamma, torch.ones_like(solution.gamma))


@pytest.mark.parametrize("route", ["direct", "hadamard"])
@pytest.mark.parametrize("name", ["linear tokens", "conv1d", "groups", "stride dilation"])
def test_a_step_is_that_of_a_loop_over_samples(name: str, route: str) -> None:
    model, x = case(name)
    before = copy.deepcopy(model)
    moved = displacement(model, lambda: model.shares(x).sum(), route=route, leave_one_out=True)
    u = sample_gradients(lambda i: before.shares(x)[i], list(before.layer.parameters()), N)
    matrix = torch.cat([part.reshape(N, -1) for part in u], 1).t()
    found = torch.cat([part.reshape(-1) for part in moved.values()])
    torch.testing.assert_close(found, direction(matrix, DAMPING), **EXACT)
    plain = torch.linalg.solve(
        DAMPING * torch.eye(len(matrix), dtype=matrix.dtype) + matrix @ matrix.t() / N,
        DAMPING * matrix.mean(1),
    )
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-4)

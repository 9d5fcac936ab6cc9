"""Gram matrices, solves and decompositions on a GPU: right where well posed, safe where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_fngd.methods.kfac import second_moment
from hf_fngd.methods.seng import _low_rank
from hf_fngd.solve import coefficients, gram
from tests.cuda.common import (
    AMBIGUOUS,
    CUDA,
    DEVICE,
    VARIANTS,
    Net,
    epochs,
    make,
    only_on_gpu,
    state_of,
)
from tests.helpers import gamma_of

pytestmark = CUDA


def samples(kind: str, n: int = 48, p: int = 200) -> Tensor:
    """Return per-sample gradients `[p, n]` in float64."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(p, n, generator=generator, dtype=torch.float64)
    if kind == "common part":
        u += 2 * torch.randn(p, 1, generator=generator, dtype=torch.float64)
    if kind == "repeated":
        u = u[:, : n // 3].repeat(1, 3)
    if kind == "norms over six orders":
        u *= torch.logspace(-3, 3, n, dtype=torch.float64)
    if kind == "some without gradient":
        u[:, ::3] = 0
    return u


KINDS = ["random", "common part", "repeated", "norms over six orders", "some without gradient"]


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients(kind, damping, leave_one_out):
    u = samples(kind)
    matrix = u.t() @ u
    solution = coefficients.solve(
        matrix.to(DEVICE, torch.float32), damping=damping, leave_one_out=leave_one_out
    )
    assert solution.gamma.device.type == DEVICE.type
    assert solution.finite and not solution.fallback
    if leave_one_out:
        n = len(matrix)
        scale = damping * float(matrix.trace()) / n**2
        inverse = torch.linalg.inv(scale * torch.eye(n, dtype=torch.float64) + matrix / n)
        expected = inverse @ (1 / inverse.diagonal())
    else:
        expected = gamma_of(matrix, damping)
    torch.testing.assert_close(solution.gamma.cpu().double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("size", [6, 40, 300])
def test_matrix_that_is_not_positive_definite_falls_back(size, leave_one_out):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(start).Q
    values = torch.full((size,), 2.0, dtype=torch.float64)
    values[0] = -0.5
    found = []
    for spectrum in (values, values.clamp(min=0)):
        matrix = ((basis * spectrum) @ basis.t()).to(DEVICE, torch.float32)
        matrix = 0.5 * (matrix + matrix.t())
        found.append(
            coefficients.solve(matrix, damping=1e-3, mode="absolute", leave_one_out=leave_one_out)
        )
    assert found[0].fallback and found[0].finite and found[0].gamma.device.type == DEVICE.type
    assert not found[1].fallback
    difference = (found[0].gamma - found[1].gamma).norm()
    assert difference <= 0.02 * found[1].gamma.norm()


def test_inverses_of_several_groups_fall_back_together():
    good = torch.eye(5).repeat(3, 1, 1)
    bad = good.clone()
    bad[1] *= -3.0
    inverse, fallback = coefficients.inverse_of_shifted(bad.to(DEVICE))
    assert fallback
    torch.testing.assert_close(inverse[0].cpu(), 0.5 * torch.eye(5))
    torch.testing.assert_close(inverse[1].cpu(), torch.eye(5))
    inverse, fallback = coefficients.inverse_of_shifted(good.to(DEVICE))
    assert not fallback and torch.allclose(inverse.cpu(), 0.5 * good)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_matrix_that_is_not_finite_gives_one(bad, leave_one_out):
    u = samples("random")
    matrix = (u.t() @ u).to(DEVICE, torch.float32)
    matrix[3, 1] = matrix[1, 3] = bad
    solution = coefficients.solve(matrix, damping=0.1, leave_one_out=leave_one_out)
    assert not solution.finite and torch.equal(solution.gamma, torch.ones_like(solution.gamma))


@pytest.mark.parametrize("size", [3, 32, 33, 200, 600])
@pytest.mark.parametrize("kind", ["rank one", "nearly rank one", "identity", "zero", "decades"])
def test_eigenvalues_of_nearly_singular_factors(kind, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    exact = {
        "rank one": x @ x.t(),
        "nearly rank one": x @ x.t() + 1e-9 * noise @ noise.t(),
        "identity": torch.eye(size, dtype=torch.float64),
        "zero": torch.zeros(size, size, dtype=torch.float64),
        "decades": torch.linspace(-12, 3, size, dtype=torch.float64).pow(10).diag(),
    }[kind]
    matrix = exact.to(DEVICE, torch.float32)
    values, vectors = coefficients.eigen(matrix.unsqueeze(0).repeat(2, 1, 1))
    assert values.device.type == vectors.device.type == DEVICE.type
    values, vectors = values.cpu().double(), vectors.cpu().double()
    scale = torch.linalg.matrix_norm(exact, 2) + 1e-30
    error = (vectors * values.unsqueeze(1)) @ vectors.transpose(1, 2) - exact
    assert error.abs().max() <= 1e-4 * scale
    eye = vectors.transpose(1, 2) @ vectors - torch.eye(size, dtype=torch.float64)
    assert eye.abs().max() < 1e-4


@only_on_gpu
def test_eigenvalues_come_from_the_cpu_where_the_gpu_finds_none(monkeypatch):
    real = torch.linalg.eigh

    def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        if matrix.device.type != "cpu":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    model = Net().to(DEVICE)
    optimizer = make(model, "kfac expand eigen")
    for _, rows, inputs, labels in epochs(1):
        optimizer.set_batch(rows)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.statistics()["updates"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [2**28, 2**14], ids=["whole", "blocks"])
@pytest.mark.parametrize("route", ["direct", "hadamard"])
@pytest.mark.parametrize(
    "shape", [(1, 24, 1, 40, 30), (1, 17, 9, 24, 16), (3, 8, 5, 6, 7)], ids=str
)
def test_gram_matrices(shape, route, memory, dtype):
    groups, n, t, d_in, d_out = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(groups, n, t, d_in, generator=generator).to(dtype)
    g = torch.randn(groups, n, t, d_out, generator=generator).to(dtype)
    u = (g.double().transpose(2, 3) @ a.double()).transpose(0, 1).reshape(n, -1)
    sums = g.double().sum(2).transpose(0, 1).reshape(n, -1)
    expected = u @ u.t() + sums @ sums.t()
    found = gram.sample_gram(
        a.to(DEVICE), g.to(DEVICE), bias=True, route=route, memory_bytes=memory
    ).matrix
    assert found.dtype == torch.float32 and found.device.type == DEVICE.type
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found.cpu().double() - expected).norm() <= bound * expected.norm()


def test_second_moments_and_low_rank_factors():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 6, 9, 10, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 6, 9, 8, generator=generator, dtype=torch.float64)
    low = a.to(DEVICE, torch.float32), g.to(DEVICE, torch.float32)
    for layout in (low[0], low[0].transpose(2, 3).contiguous().transpose(2, 3)):
        moment = second_moment(layout).cpu().double()
        rows = a.flatten(1, 2)
        torch.testing.assert_close(moment, rows.transpose(1, 2) @ rows, rtol=1e-4, atol=1e-3)
    # Signs of singular vectors differ between solvers; the product of the factors does not.
    x, y = _low_rank(*low, 4)
    x_exact, y_exact = _low_rank(a, g, 4)
    product = (y.transpose(2, 3) @ x).cpu().double()
    exact = y_exact.transpose(2, 3) @ x_exact
    assert (product - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "plain" not in name])
def test_a_batch_that_is_not_finite_is_skipped(name, bad):
    """As on a CPU: the scaler skips the step, and neither store nor curvature keeps anything."""
    model = Net().to(DEVICE)
    optimizer = make(model, name)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1.0, growth_interval=10**6)
    lost = None
    for number, (epoch, rows, inputs, labels) in enumerate(epochs(3)):
        optimizer.start_epoch(epoch)
        optimizer.set_batch(rows)
        before = state_of(model)
        if number == 1:
            lost, inputs = rows, inputs.clone()
            inputs[2, 0, 3, 3] = bad
        scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
        moved = any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert moved == (number != 1)
        if number == 2 and optimizer.needs_rows:
            # The first layer saw it; behind a saturated tanh an infinity may be a harmless 1.
            kept = optimizer.coefficients()[lost]
            assert kept[:, 0].isnan().all() and (kept.isnan().all() or bad == torch.inf)
    assert all(p.isfinite().all() for p in model.parameters())
    state = optimizer.state_dict()[optimizer.method]
    for layer in state.get("curvature", []):
        assert all(value.isfinite().all() for value in layer.values())
    if VARIANTS[name]["method"] == "fngd":
        assert optimizer.statistics()["nonfinite"] > 0
    if optimizer.needs_rows and bad != torch.inf:
        assert optimizer.coefficients().isfinite().all()
    assert name not in AMBIGUOUS or optimizer.statistics()["updates"] > 0

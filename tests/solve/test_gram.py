"""All routes to the Gram matrix equal UᵀU of gradients formed one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hf_fngd.solve import gram
from hf_fngd.solve.gram import choose_route, route_costs, sample_gram

SHAPES = [  # groups, samples, positions, d_in, d_out
    (1, 5, 1, 4, 3),
    (1, 5, 7, 4, 3),
    (1, 1, 6, 4, 3),
    (3, 4, 6, 2, 5),
    (1, 9, 2, 3, 2),
    (1, 34, 2, 2, 3),
]
WORKSPACES = [1, 3 * 8 * 5 * 4, 2**28]  # bytes: one row at a time, a few rows, all at once


def tensors(shape: tuple[int, ...], ragged: bool = False) -> tuple[Tensor, Tensor]:
    groups, n, t, d_in, d_out = shape
    a = torch.randn(groups, n, t, d_in, dtype=torch.float64)
    g = torch.randn(groups, n, t, d_out, dtype=torch.float64)
    if ragged:
        for i in range(n):
            g[:, i, max(1, t - i) :] = 0
    return a, g


def loop(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """UᵀU by a loop over samples and positions; a bias adds a column of ones to the input."""
    columns = []
    for n in range(a.shape[1]):
        parts = []
        for group in range(len(a)):
            u = torch.zeros(g.shape[-1], a.shape[-1] + bias, dtype=a.dtype)
            for t in range(a.shape[2]):
                row = torch.cat([a[group, n, t], torch.ones(int(bias), dtype=a.dtype)])
                u += torch.outer(g[group, n, t], row)
            parts.append(u.flatten())
        columns.append(torch.cat(parts))
    u = torch.stack(columns, 1)
    return u.t() @ u


@pytest.mark.parametrize("memory", WORKSPACES)
@pytest.mark.parametrize("route", ["direct", "hadamard", "auto"])
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routes_equal_the_loop(
    shape: tuple[int, ...], bias: bool, ragged: bool, route: str, memory: int
) -> None:
    a, g = tensors(shape, ragged)
    found = sample_gram(a, g, bias=bias, route=route, memory_bytes=memory).matrix
    torch.testing.assert_close(found, loop(a, g, bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", WORKSPACES)
@pytest.mark.parametrize("route", ["direct", "hadamard"])
@pytest.mark.parametrize("low", [False, True], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_formed_as_a_whole(
    shape: tuple[int, ...], low: bool, route: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: nothing is mirrored."""
    monkeypatch.setattr(gram, "_is_whole", lambda a: True)
    monkeypatch.setattr(gram, "_add_lower", None)
    a, g = tensors(shape)
    expected = loop(a, g, True)
    if low:
        a, g = a.bfloat16(), g.bfloat16()
    found = sample_gram(a, g, bias=True, route=route, memory_bytes=memory).matrix
    assert found.dtype == (torch.float32 if low else torch.float64)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= (0.05 if low else 1e-12)


@pytest.mark.parametrize("route", ["direct", "hadamard"])
def test_padding_changes_nothing(route: str) -> None:
    a, g = tensors((1, 4, 5, 3, 2))
    longer_a = torch.cat([a, torch.full((1, 4, 3, 3), 1e6, dtype=a.dtype)], 2)
    longer_g = torch.cat([g, torch.zeros(1, 4, 3, 2, dtype=g.dtype)], 2)
    short = sample_gram(a, g, bias=True, route=route).matrix
    padded = sample_gram(longer_a, longer_g, bias=True, route=route).matrix
    torch.testing.assert_close(short, padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 13, 16, 30, 64])
@pytest.mark.parametrize("t", [1, 4, 32])
@pytest.mark.parametrize(("d_in", "d_out"), [(4, 4), (16, 64), (128, 96)])
def test_costs_are_counted_and_the_cheaper_route_is_chosen(
    n: int, t: int, d_in: int, d_out: int
) -> None:
    # On the meta device operations are counted and not carried out.
    a, g = (torch.empty(1, n, t, d, device="meta") for d in (d_in, d_out))
    flops = {}
    for route in ("direct", "hadamard"):
        with FlopCounterMode(display=False) as counter:
            sample_gram(a, g, bias=False, route=route, memory_bytes=2**40)
        flops[route] = counter.get_total_flops() // 2
    assert route_costs(n, t, d_in, d_out) == flops
    assert flops[choose_route(n, t, d_in, d_out)] == min(flops.values())


def test_both_routes_are_chosen() -> None:
    assert choose_route(64, 1, 512, 512) == "hadamard"
    assert choose_route(64, 128, 512, 512) == "direct"


def test_per_sample_gradients_only_where_materialised() -> None:
    a, g = tensors((2, 4, 6, 3, 5))
    u = sample_gram(a, g, bias=False, route="direct").per_sample
    assert u is not None
    torch.testing.assert_close(u, torch.einsum("gnto,gnti->gnoi", g, a), rtol=1e-12, atol=1e-12)
    assert sample_gram(a, g, bias=False, route="direct", memory_bytes=64).per_sample is None
    assert sample_gram(a, g, bias=False, route="direct", block_bytes=64).per_sample is None
    assert sample_gram(a, g, bias=False, route="hadamard").per_sample is None


def test_inputs_are_left_alone() -> None:
    a, g = tensors((1, 3, 4, 2, 2))
    before = a.clone(), g.clone()
    for route in ("direct", "hadamard"):
        sample_gram(a, g, bias=True, route=route)
    assert torch.equal(a, before[0]) and torch.equal(g, before[1])

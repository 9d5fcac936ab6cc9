"""Gram matrices of per-sample gradients: pure functions of tensors.

With U = [u_1 … u_N] the per-sample weight gradients of one layer, K = UᵀU is formed by

* the direct route: the u_n are materialised, K is one product of them;
* the direct route in chunks: K is additive over output features, so blocks of them need no more
  memory than they are given (no u_n remains to form the weighted gradient from);
* the Hadamard route: K_nm = Σ_ts (a_nt·a_ms)(g_nt·g_ms), which needs no u_n at all.

In bfloat16 the products are formed from inputs in it, and added up in float32.

Inputs are in the canonical layout `[G, N, T, d]` of `hf_fngd.layers`. Costs, in multiply-adds:
direct d_in·d_out·(N·T + E), Hadamard E·T²·(d_in + d_out), where E are the entries of K that are
formed and not mirrored: about 3/4 N² on the direct route, 5/8 N² on the other. Small matrices are
formed as a whole on a GPU, where the launches of more products cost more than they save.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_PIECES = 8
_LEAST_ROWS = 8
# Samples of a matrix that a GPU forms as a whole.
_WHOLE = 256


class SampleGram(NamedTuple):
    """Gram matrix of one layer and, where the route materialised them, the gradients.

    Attributes:
        matrix: K of shape `[N, N]`.
        per_sample: u_n as `[G, N, d_out, d_in]`, or None.
    """

    matrix: Tensor
    per_sample: Tensor | None


def route_costs(n: int, t: int, d_in: int, d_out: int) -> dict[str, int]:
    """Count the multiply-adds of both routes, for one group of channels.

    Args:
        n: Samples.
        t: Positions per sample.
        d_in: Input features.
        d_out: Output features.

    Returns:
        Multiply-adds by route, exact unless the workspace limits a block or nothing is mirrored.
    """
    return {
        "direct": d_in * d_out * (n * t + _formed(n, _half(n))),
        "hadamard": _formed(n, _block_of(n)) * t * t * (d_in + d_out),
    }


def choose_route(n: int, t: int, d_in: int, d_out: int) -> str:
    """Pick the route with fewer operations.

    Args:
        n: Samples.
        t: Positions per sample.
        d_in: Input features.
        d_out: Output features.

    Returns:
        `direct` or `hadamard`. Memory plays no role: both routes work in blocks of any size.
    """
    costs = route_costs(n, t, d_in, d_out)
    return min(costs, key=lambda route: costs[route])


def sample_gram(
    a: Tensor,
    g: Tensor,
    *,
    bias: bool,
    route: str = "auto",
    memory_bytes: int = 2**28,
    block_bytes: int = 2**23,
) -> SampleGram:
    """Form K of per-sample gradients, positions summed within each sample.

    Args:
        a: Layer inputs `[G, N, T, d_in]`.
        g: Output gradients `[G, N, T, d_out]`, of the same dtype.
        bias: Whether the layer's bias is part of the block: adds (Σ_t g)(Σ_t g)ᵀ.
        route: `auto`, `direct` or `hadamard`.
        memory_bytes: Bound on the workspace; larger problems are done in blocks.
        block_bytes: Bound on the direct route's workspace on a CPU, where blocks that stay in the
            cache are faster than larger ones (scripts/bench/gram.py).

    Returns:
        K, and the per-sample gradients if they were materialised as a whole.
    """
    _, n, t, d_in = a.shape
    if route == "auto":
        route = choose_route(n, t, d_in, g.shape[-1])
    if route == "hadamard":
        per_sample, matrix = None, _hadamard(a, g, memory_bytes)
    else:
        if a.device.type == "cpu":
            memory_bytes = min(memory_bytes, block_bytes)
        per_sample, matrix = _direct(a, g, memory_bytes)
    if bias:
        sums = g.sum(2, dtype=matrix.dtype)
        if sums.shape[0] == 1:
            matrix = matrix + torch.bmm(sums, sums.mT)[0]
        else:
            matrix = matrix + torch.einsum("gnd,gmd->nm", sums, sums)
    return SampleGram(matrix, per_sample)


def _sum_dtype(a: Tensor) -> torch.dtype:
    return torch.float32 if a.dtype == torch.bfloat16 else a.dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, or stacks of them; float32 for bfloat16, on a GPU without rounding."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.dtype != torch.bfloat16:
        return multiply(a, b)
    if a.is_cuda:
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a, b).float()


def _is_whole(a: Tensor) -> bool:
    return a.is_cuda and a.shape[1] <= _WHOLE


def _direct(a: Tensor, g: Tensor, memory_bytes: int) -> tuple[Tensor | None, Tensor]:
    groups, n, _, d_in = a.shape
    d_out = g.shape[-1]
    rows = max(1, memory_bytes // (groups * n * d_in * a.element_size()))
    per_sample = g.transpose(-1, -2) @ a if rows >= d_out else None
    blocks = _blocks(a, g, rows) if per_sample is None else per_sample.flatten(2).unbind()
    if _is_whole(a):
        return per_sample, functools.reduce(torch.add, (_product(u, u.t()) for u in blocks))
    matrix = a.new_zeros(n, n, dtype=_sum_dtype(a))
    for u in blocks:
        _add_lower(matrix, u)
    return per_sample, _mirror(matrix, _half(n))


def _blocks(a: Tensor, g: Tensor, rows: int) -> Iterator[Tensor]:
    """Form per-sample gradients `[N, rows·d_in]` of a few output features at a time."""
    _, n, _, d_in = a.shape
    space = a.new_empty(n * rows * d_in)
    for group_a, group_g in zip(a, g, strict=True):
        for block in group_g.split(rows, dim=-1):
            u = space[: n * block.shape[-1] * d_in].view(n, -1, d_in)
            torch.bmm(block.transpose(1, 2), group_a, out=u)
            yield u.flatten(1)


def _half(n: int) -> int:
    return (n + 1) // 2


def _block_of(n: int) -> int:
    # Rows that the Hadamard route forms at once: four blocks leave out 3/8 of K, two 1/4.
    return max(-(-n // 4), min(_half(n), _LEAST_ROWS))


def _formed(n: int, block: int) -> int:
    # Entries of K where each block of rows goes no further than its own end.
    slices = [range(n)[begin : begin + block] for begin in range(0, n, block)]
    return sum(len(rows) * rows.stop for rows in slices)


def _add_lower(matrix: Tensor, u: Tensor) -> None:
    """Add uuᵀ without its upper right quarter: K is symmetric, and torch has no such product."""
    half = _half(len(u))
    if u.shape[1] % _PIECES or u.dtype == torch.bfloat16:
        matrix[:half, :half] += _product(u[:half], u[:half].t())
        matrix[half:] += _product(u[half:], u.t())
        return
    # Long thin products are faster in a few pieces.
    rows = u.view(len(u), _PIECES, -1).transpose(0, 1)
    columns = rows.mT
    matrix[:half, :half] += torch.bmm(rows[:, :half], columns[..., :half]).sum(0)
    matrix[half:] += torch.bmm(rows[:, half:], columns).sum(0)


def _mirror(matrix: Tensor, block: int) -> Tensor:
    """Fill the blocks above the diagonal from those below, and return the matrix."""
    for i in range(block, len(matrix), block):
        matrix[:i, i : i + block] = matrix[i : i + block, :i].t()
    return matrix


def _hadamard(a: Tensor, g: Tensor, memory_bytes: int) -> Tensor:
    groups, n, t, _ = a.shape
    block = max(1, memory_bytes // (2 * groups * n * t * t * a.element_size()))
    block = min(block, n if _is_whole(a) else _block_of(n))
    if block >= n:
        return _position_products(a, g, a, g).view(n, t, n, t).sum((1, 3))
    matrix = a.new_zeros(n, n, dtype=_sum_dtype(a))
    for i in range(0, n, block):
        end = min(i + block, n)
        rows, columns = slice(i, end), slice(0, end)
        products = _position_products(a[:, rows], g[:, rows], a[:, columns], g[:, columns])
        matrix[rows, columns] = products.view(end - i, t, end, t).sum((1, 3))
    return _mirror(matrix, block)


def _position_products(a: Tensor, g: Tensor, a_other: Tensor, g_other: Tensor) -> Tensor:
    """Multiply gradients of single positions, (a·a')(g·g'): a matrix `[N·T, M·S]`."""
    inner_a, inner_g = (
        _product(one.flatten(1, 2), other.flatten(1, 2).mT)
        for one, other in ((a, a_other), (g, g_other))
    )
    products = inner_a.mul_(inner_g)
    return products.sum(0) if len(a) > 1 else products[0]

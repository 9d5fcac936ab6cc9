"""Times of the small dense problems that natural gradients pose, solved in several ways."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerator import Clock
from torch import Tensor

from hf_fngd.solve import coefficients

# Solves of one turn, without a pause: as in a backward pass, and enough for the clock.
_TIMES = 20
_TURNS = 5


def _by_cholesky(matrix: Tensor, ones: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(ones, factor)


def _by_two_triangles(matrix: Tensor, ones: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(matrix)
    half = torch.linalg.solve_triangular(factor, ones, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _by_newton(matrix: Tensor, ones: Tensor) -> Tensor:
    # Matrix products only, as many as a condition number of a few hundred takes.
    inverse = torch.eye(len(matrix), device=matrix.device) / matrix.diagonal().sum()
    for _ in range(14):
        inverse = torch.addmm(2 * inverse, inverse, matrix @ inverse, alpha=-1)
    return inverse @ ones


def time_solves(found: dict[str, Any], clock: Clock, sizes: Sequence[int]) -> None:
    """Time solves of (I + S)γ = 1, single and ten at once, and eigendecompositions.

    Args:
        found: Takes microseconds of one solve, on the device and in Python, by size and way.
        clock: Clock of the device.
        sizes: Numbers of samples.
    """
    for n in sizes:
        torch.manual_seed(0)
        u = torch.randn(n, 4 * n, device=clock.device)
        gram = u @ u.t()
        matrix = gram * (n / gram.trace())
        matrix.diagonal().add_(1)
        ones = matrix.new_ones(n, 1)
        many, many_ones = matrix.expand(10, n, n).contiguous(), ones.expand(10, n, 1).contiguous()
        ways: dict[str, Callable[[], object]] = {
            "coefficients.solve": lambda gram=gram: coefficients.solve(gram, damping=1.0),
            "leave_one_out": lambda gram=gram: coefficients.solve(
                gram, damping=1.0, leave_one_out=True
            ),
            "cholesky": lambda a=matrix, b=ones: _by_cholesky(a, b),
            "cholesky, two triangles": lambda a=matrix, b=ones: _by_two_triangles(a, b),
            "cholesky of 10": lambda a=many, b=many_ones: _by_cholesky(a, b),
            "cholesky of 1 as a batch": lambda a=many[:1], b=many_ones[:1]: _by_cholesky(a, b),
            "lu": lambda a=matrix, b=ones: torch.linalg.solve_ex(a, b)[0],
            "lu of 10": lambda a=many, b=many_ones: torch.linalg.solve_ex(a, b)[0],
            "newton": lambda a=matrix, b=ones: _by_newton(a, b),
            "eigh": lambda a=matrix: torch.linalg.eigh(a),
        }
        rows = found.setdefault(str(n), {})
        for name, way in ways.items():
            clock.time(way, 2)
            times = [clock.time(way, _TIMES) for _ in range(_TURNS)]
            rows[name] = {
                "us": 1e6 * statistics.median(one.step for one in times),
                "launch_us": 1e6 * statistics.median(one.launch for one in times),
            }

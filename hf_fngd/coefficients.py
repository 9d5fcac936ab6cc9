"""From Gram matrices to the coefficients of the natural gradient: pure functions of tensors.

FNGD (arXiv 2403.03473) writes the damped natural gradient of a layer as a weighted sum of its
per-sample gradients. With K = UᵀU and the mean gradient M = U1/N the push-through identity gives

    (λI + UUᵀ/N)⁻¹ M = (1/N) U c,    c = (λI + K/N)⁻¹ 1.

The package works with γ = λc: γ = 1 is the plain mean gradient, and λ → ∞ goes there.

A sample's own gradient is part of that Fisher, so a large one shrinks itself: for samples that are
orthogonal γ = λ/(λ + |u|²/N). Leaving it out of the Fisher that it meets, and no other, gives by
Sherman and Morrison

    (1/N) Σ (λI + F − u uᵀ/N)⁻¹ u = (1/N) U C w,    C = (λI + K/N)⁻¹,  w = 1/(λ diag C),

so γ = C (1/diag C), which is 1 for orthogonal samples of any size: an addition of hf_fngd.

Relative damping takes λ in units of the mean eigenvalue tr(K)/N² of K/N, which makes γ invariant
to any constant factor of the loss. The Nyström form of the token-level coefficients is an addition
of hf_fngd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Nyström: the landmarks' matrix is singular where landmarks repeat each other. The jitter starts
# here (relative to the mean of its diagonal, in units of the dtype's ε) and grows tenfold.
_JITTER = 10.0
_JITTER_TRIES = 6
# leave_one_out: least part of a sample that its own gradient does not explain, in units of ε.
_LEAST_LEFT = 100.0


class Solution(NamedTuple):
    """Coefficients of one layer and how they came about.

    Attributes:
        gamma: γ of shape `[N]`.
        finite: False if no coefficients could be had (a NaN or an infinity in the gradients);
            γ is 1 then and must not be stored.
        fallback: True if the first factorisation failed and a safer one was needed.
    """

    gamma: Tensor
    finite: bool
    fallback: bool


def damping_ratio(
    trace: Tensor, count: Tensor | int, damping: float, mode: str, kappa: float
) -> Tensor:
    """Gives r in (I + rK)γ = 1, the scale of the Gram matrix against the damping.

    Args:
        trace: tr(K), a scalar tensor.
        count: Number N of samples with a gradient.
        damping: λ, relative or absolute.
        mode: `relative` or `absolute`.
        kappa: Factor from the raw gradients of the reduced loss to per-sample gradients; matters
            for absolute damping only.

    Returns:
        Scalar tensor: N/(tr(K)·λ) or κ²/(N·λ); 0 where K is 0.
    """
    if mode == "absolute":
        return torch.full_like(trace, kappa**2 / damping) / count
    return torch.where(trace > 0, count / (trace * damping), torch.zeros_like(trace))


def solve(
    gram: Tensor,
    *,
    damping: float,
    mode: str = "relative",
    kappa: float = 1.0,
    leave_one_out: bool = False,
) -> Solution:
    """Solves (λI + K/N)c = 1 by Cholesky and returns γ = λc.

    Args:
        gram: K of shape `[N, N]`, of raw gradients (see `kappa`).
        damping: λ > 0.
        mode: `relative` or `absolute` damping.
        kappa: As in `damping_ratio`.
        leave_one_out: Whether each sample meets the Fisher of the others alone.

    Returns:
        γ with a report. A matrix that is not positive definite in float32 is solved in float64
        with its negative eigenvalues set to 0.
    """
    n = len(gram)
    ratio = damping_ratio(gram.diagonal().sum(), n, damping, mode, kappa)
    if leave_one_out:
        scaled = gram * ratio
        if not bool(scaled.isfinite().all()):
            return Solution(gram.new_ones(n), finite=False, fallback=False)
        inverse, fallback = inverse_of_shifted(scaled)
        return Solution(inverse @ (1 / inverse.diagonal()), finite=True, fallback=fallback)
    gamma, info = _solve_shifted(gram * ratio, gram.new_ones(n))
    if bool((info == 0) & gamma.isfinite().all()):
        return Solution(gamma, finite=True, fallback=False)
    if not bool(gram.isfinite().all() & ratio.isfinite()):
        return Solution(torch.ones_like(gamma), finite=False, fallback=False)
    values, vectors = torch.linalg.eigh(0.5 * (gram + gram.t()).double() * ratio.double())
    gamma = vectors @ (vectors.sum(0) / (1 + values.clamp(min=0)))
    return Solution(gamma.to(gram.dtype), finite=True, fallback=True)


def _solve_shifted(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Solves (I + matrix) x = right, for one right side or the columns of a matrix.

    Returns:
        x, and 0 where Cholesky succeeded.
    """
    shifted = matrix.clone()
    shifted.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    columns = right.view(len(right), -1)
    return torch.cholesky_solve(columns, factor).view(right.shape), info


def solve_nystrom(
    columns: Tensor,
    landmarks: Tensor,
    trace: Tensor,
    count: Tensor | int,
    *,
    damping: float,
    mode: str = "relative",
    kappa: float = 1.0,
    leave_one_out: bool = False,
) -> Solution:
    """Approximates γ of a large Gram matrix from m of its columns.

    With C the columns, W their rows at the landmarks and W = LLᵀ, K ≈ BBᵀ for B = CL⁻ᵀ, so
    γ = 1 − rB(I + rBᵀB)⁻¹Bᵀ1. This equals 1 − C(W/r + CᵀC)⁻¹Cᵀ1 without squaring the condition
    number of C.

    Args:
        columns: C of shape `[n, m]`.
        landmarks: Row numbers `[m]` of the landmarks.
        trace: tr(K) of the whole matrix.
        count: Number of samples with a gradient.
        damping: λ > 0.
        mode: `relative` or `absolute` damping.
        kappa: As in `damping_ratio`.
        leave_one_out: As in `solve`, with the approximate matrix.

    Returns:
        γ of shape `[n]` with a report; `fallback` is True if more than the first jitter was needed.
    """
    ratio = damping_ratio(trace, count, damping, mode, kappa)
    ones = columns.new_ones(len(columns))
    if not bool(columns.isfinite().all() & ratio.isfinite()):
        return Solution(ones, finite=False, fallback=False)
    scaled = columns * ratio
    inner = scaled[landmarks]
    inner = 0.5 * (inner + inner.t())
    precision = torch.finfo(inner.dtype)
    unit = (inner.diagonal().mean() * precision.eps).clamp(min=precision.tiny / precision.eps)
    for attempt in range(_JITTER_TRIES):
        jittered = inner.clone()
        jittered.diagonal().add_(unit * _JITTER * 10.0**attempt)
        factor, info = torch.linalg.cholesky_ex(jittered)
        if int(info) == 0:
            break
    else:
        return Solution(ones, finite=False, fallback=True)
    b = torch.linalg.solve_triangular(factor, scaled.t(), upper=False).t()
    weights = ones
    if leave_one_out:
        hat, info = _solve_shifted(b.t() @ b, b.t().contiguous())
        weights = 1 / (1 - (b * hat.t()).sum(1)).clamp(min=_LEAST_LEFT * precision.eps)
        small = hat @ weights
    else:
        small, info = _solve_shifted(b.t() @ b, b.sum(0))
    gamma = weights - b @ small
    finite = bool((info == 0) & gamma.isfinite().all())
    return Solution(gamma if finite else ones, finite, fallback=attempt > 0)


def temper(
    gamma: Tensor, *, scale: str = "free", maximum: float | None = None, power: float = 1.0
) -> Tensor:
    """Makes the weights of samples less uneven; an addition of hf_fngd.

    Args:
        gamma: γ of the samples that count, of any shape.
        scale: `one` divides γ by its mean where that is positive, which it is for every exact
            solution that leaves nothing out, since (I + rK)⁻¹ is positive definite; `free` does
            not.
        maximum: Bound b of the interval [0, b] that γ is then clipped to.
        power: α in [0, 1]; γ at last becomes max(γ, 0)^α, unless α = 1.

    Returns:
        γ of the same shape; the same tensor where nothing is to be done.
    """
    if scale == "one" and gamma.numel():
        mean = gamma.mean()
        gamma = torch.where(mean > 0, gamma / mean, torch.ones_like(gamma))
    if maximum is not None:
        gamma = gamma.clamp(0, maximum)
    return gamma if power == 1.0 else gamma.clamp(min=0) ** power


def inverse_of_shifted(matrix: Tensor) -> tuple[Tensor, bool]:
    """Inverts I + S for positive semi-definite S, by Cholesky where that works.

    Args:
        matrix: S, finite, of shape `[*, n, n]`.

    Returns:
        The inverse, and whether S was not positive definite in its precision, so that it had to be
        decomposed in float64 with its negative eigenvalues set to 0.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    inverse = torch.cholesky_inverse(factor)
    if bool((info == 0).all() & inverse.isfinite().all()):
        return inverse, False
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT).double())
    shrink = 1 / (1 + values.clamp(min=0))
    return ((vectors * shrink.unsqueeze(-2)) @ vectors.mT).to(matrix.dtype), True

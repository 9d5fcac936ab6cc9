"""From Gram matrices to the coefficients of the natural gradient: pure functions of tensors.

FNGD (arXiv 2403.03473) writes the damped natural gradient of a layer as a weighted sum of its
per-sample gradients. With K = UᵀU and the mean gradient M = U1/N the push-through identity gives

    (λI + UUᵀ/N)⁻¹ M = (1/N) U c,    c = (λI + K/N)⁻¹ 1.

The package works with γ = λc: γ = 1 is the plain mean gradient, and λ → ∞ goes there.

A sample's own gradient is part of that Fisher, so a large one damps itself: for orthogonal samples
γ = λ/(λ + |u|²/N). With each sample left out of the Fisher that preconditions it, Sherman and
Morrison give

    (1/N) Σ (λI + F − u uᵀ/N)⁻¹ u = (1/N) U C w,    C = (λI + K/N)⁻¹,  w = 1/(λ diag C),

so γ = C (1/diag C), which is 1 for orthogonal samples of any size: an addition of hf_fngd.

Relative damping takes λ in units of the mean eigenvalue tr(K)/N² of K/N, which makes γ invariant
to any constant factor of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Coefficients of one layer, and how the solve went.

    Attributes:
        gamma: γ of shape `[N]`.
        finite: False if the gradients hold a NaN or an infinity; γ is 1 then and must not be
            stored.
        fallback: True if the first factorisation failed and a safer one was needed.
    """

    gamma: Tensor
    finite: bool
    fallback: bool


def damping_ratio(
    trace: Tensor, count: Tensor | int, damping: float, mode: str, kappa: float
) -> Tensor:
    """Return r in (I + rK)γ = 1, the scale of the Gram matrix against the damping.

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
    return (count / (trace * damping)).masked_fill_(trace <= 0, 0.0)


def solve(
    gram: Tensor,
    *,
    damping: float,
    mode: str = "relative",
    kappa: float = 1.0,
    leave_one_out: bool = False,
) -> Solution:
    """Solve (λI + K/N)c = 1 by Cholesky and return γ = λc.

    Args:
        gram: K of shape `[N, N]`, of raw gradients (see `kappa`).
        damping: λ > 0.
        mode: `relative` or `absolute` damping.
        kappa: As in `damping_ratio`.
        leave_one_out: Whether each sample is preconditioned with the Fisher of the others.

    Returns:
        γ with a report. A matrix that is not positive definite in float32 is solved in float64
        with its negative eigenvalues set to 0.
    """
    n = gram.shape[0]
    ratio = damping_ratio(gram.diagonal().sum(), n, damping, mode, kappa)
    if leave_one_out:
        scaled = gram * ratio
        if not bool(scaled.isfinite().all()):
            return Solution(gram.new_ones(n), finite=False, fallback=False)
        inverse, fallback = inverse_of_shifted(scaled)
        return Solution(inverse @ (1 / inverse.diagonal()), finite=True, fallback=fallback)
    shifted = gram * ratio
    shifted.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    gamma = torch.cholesky_solve(gram.new_ones(n, 1), factor).squeeze(1)
    # 0 · γ is 0 where γ is finite.
    if bool((0 * gamma).sum() == info):
        return Solution(gamma, finite=True, fallback=False)
    if not bool(gram.isfinite().all() & ratio.isfinite()):
        return Solution(torch.ones_like(gamma), finite=False, fallback=False)
    values, vectors = eigen(0.5 * (gram + gram.t()).double() * ratio.double())
    gamma = vectors @ (vectors.sum(0) / (1 + values.clamp(min=0)))
    return Solution(gamma.to(gram.dtype), finite=True, fallback=True)


def inverse_of_shifted(matrix: Tensor) -> tuple[Tensor, bool]:
    """Invert I + S for positive semi-definite S, by Cholesky where that works.

    Args:
        matrix: S, finite, of shape `[*, n, n]`.

    Returns:
        The inverse, and whether a fallback was needed: S was not positive definite in its
        precision, and was decomposed in float64 with its negative eigenvalues set to 0.
    """
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    inverse = torch.cholesky_inverse(factor)
    if bool((info == 0).all() & inverse.isfinite().all()):
        return inverse, False
    values, vectors = eigen(0.5 * (matrix + matrix.mT).double())
    shrink = 1 / (1 + values.clamp(min=0))
    return ((vectors * shrink.unsqueeze(-2)) @ vectors.mT).to(matrix.dtype), True


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose symmetric matrices; where a GPU's solver does not converge, the CPU's does.

    Args:
        matrix: Finite, of shape `[*, n, n]`.

    Returns:
        Eigenvalues `[*, n]` and eigenvectors `[*, n, n]` on the matrix's device.

    Raises:
        torch.linalg.LinAlgError: If the CPU's solver fails, too.
    """
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        if matrix.device.type == "cpu":
            raise
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)

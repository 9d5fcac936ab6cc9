"""KFAC: Kronecker-factored curvature (Martens & Grosse 2015; Grosse & Martens 2016 for conv).

F ≈ A ⊗ G with A = E[a aᵀ] and G = E[g gᵀ]. Weight sharing over T positions (tokens, pixels) follows
Eschenhagen et al. 2023 (arXiv 2311.00636): expand treats positions like samples, reduce averages
the inputs and sums the gradients of a sample.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd.config import setting
from hf_fngd.layers import LayerType
from hf_fngd.layers.calls import Call
from hf_fngd.methods.curvature import AveragedCurvature, alive, inverse_or_zero
from hf_fngd.methods.preconditioned import PreconditionedOptimizer, PreconditionerConfig, kl_clip
from hf_fngd.solve.coefficients import eigen, inverse_of_shifted

# Rows of positions that are copied at a time to form a factor.
_BLOCK_BYTES = 2**26


@dataclass
class FactoredConfig(PreconditionerConfig):
    """Settings that KFAC and EKFAC share.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    kfac_approx: str = setting(
        "expand",
        "Positions that share a weight: expand (each counts as a sample; exact for sums over "
        "positions) or reduce (inputs averaged, gradients summed; exact for pooling).",
        choices=("expand", "reduce"),
        resumed=True,
    )
    stat_decay: float = setting(
        0.95,
        "Weight of the old factors in the running average, reached as min(1 - 1/k, this) at the "
        "k-th update; in [0, 1).",
        at_least=0.0,
        below=1.0,
        resumed=True,
    )
    stat_samples: int | None = setting(
        None,
        "Samples of each batch that the factors are computed from, evenly spaced: fewer make an "
        "update cheaper, above all on convolutions. none: all.",
        at_least=1,
        resumed=True,
    )
    inverse_period: int = setting(
        10,
        "Optimizer steps from one inversion of the factors to the next.",
        at_least=1,
        resumed=True,
    )


@dataclass
class KFACConfig(FactoredConfig):
    """Settings of KFAC, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "KFAC"

    kl_clip: float | None = kl_clip(1e-3)
    kfac_solver: str = setting(
        "eigen",
        "eigen (λ is added to the eigenvalues of A ⊗ G) or inverse (λ is divided between A and G "
        "in the balance of their traces).",
        choices=("eigen", "inverse"),
        resumed=True,
    )


class FactoredCurvature(AveragedCurvature):
    """Running averages of A and G of one layer; a grouped convolution has them for each group."""

    config: FactoredConfig
    powers: tuple[int, ...] = (0, 2, 0)
    # Names of the statistics in the state.
    averaged: tuple[str, ...] = ("a", "g", "samples")

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        super().__init__(optimizer, number, module, kind)
        # Where every position is an observation, it does not matter which dimension is the batch.
        self.rows_are_sure = self.config.kfac_approx == "expand"

    def shapes(self) -> list[tuple[int, ...]]:
        groups, d_out, d_in = self.shape
        return [(groups, d_in, d_in), (groups, d_out, d_out), ()]

    def describe(self, calls: Sequence[Call], kappa: float, joint: bool) -> list[Tensor]:
        # Relative damping counts the samples of the batch, whichever of them are looked at.
        samples = len(calls[0].g)
        return self.describe_rows(*self.rows(self._some(calls), kappa, joint), samples)

    def _some(self, calls: Sequence[Call]) -> Sequence[Call]:
        wanted, n = self.config.stat_samples, len(calls[0].g)
        if wanted is None or n <= wanted:
            return calls
        some = slice(None, None, math.ceil(n / wanted))
        return [Call(x[some], g[some], weight) for x, g, weight in calls]

    def rows(
        self, calls: Sequence[Call], kappa: float, joint: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bring calls into the canonical layout, where one position is one observation.

        Args:
            calls: The layer's calls in one micro-batch.
            kappa: Factor from autograd's gradients to those of single samples.
            joint: Whether the bias is part of the block.

        Returns:
            Inputs `[G, N, T, d_in]`, output gradients `[G, N, T, d_out]`, and where padding may be
            1 or 0 as `[G, N, T, 1]`.
        """
        a, g = self.canonical(calls, kappa, joint)
        if self.config.kfac_approx == "reduce":
            mask = alive(self.kind, g)
            if mask is None:
                a = a.mean(2, keepdim=True)
            else:
                a = (a * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
            return a, g.sum(2, keepdim=True), None
        return a, g, alive(self.kind, g)

    def describe_rows(
        self, a: Tensor, g: Tensor, mask: Tensor | None, samples: int
    ) -> list[Tensor]:
        """Return the statistics of one micro-batch, from the result of `rows` and its samples."""
        n = g.shape[1]
        if mask is None:
            factor_a = second_moment(a) / (a.shape[1] * a.shape[2])
        else:
            rows = mask.sum((1, 2, 3)).clamp(min=1)
            factor_a = second_moment(a * mask) / rows.view(-1, 1, 1)
        factor_g = second_moment(g) * (1 / n)
        return [factor_a, factor_g, factor_a.new_full((), float(samples))]

    def update(self, step: int) -> bool:
        means = self.means()
        if means is None:
            return not self.lost
        state = self.state
        done = int(state["updates"]) if state else 0
        keep = min(1 - 1 / (done + 1), self.config.stat_decay)
        for name, new in zip(self.averaged, means, strict=True):
            # A loaded count is on the CPU.
            state[name] = state[name].to(new).lerp(new, 1 - keep) if done else new
        state["updates"] = torch.tensor(done + 1, device="cpu")
        if not done or step - int(state["inverted_at"]) >= self.config.inverse_period:
            self.invert()
            state["inverted_at"] = torch.tensor(step, device="cpu")
        return not self.lost

    @abstractmethod
    def invert(self) -> None:
        """Prepare what `combine` needs of the factors."""


class KFACLayer(FactoredCurvature):
    """KFAC for one layer."""

    config: KFACConfig

    def invert(self) -> None:
        state = self.state
        a, g = state["a"], state["g"]
        trace_a, trace_g = (m.diagonal(dim1=1, dim2=2).sum(1) for m in (a, g))
        damping = self.damping((trace_a * trace_g).sum(), state["samples"])
        scale = inverse_or_zero(damping)
        state["damping"] = damping
        if self.config.kfac_solver == "eigen":
            (values_a, state["inverse_a"]), (values_g, state["inverse_g"]) = map(eigenbasis, (a, g))
            # λ(d_G d_Aᵀ + λ)⁻¹ without dividing by a λ that may be 0.
            state["shrink"] = (
                1 + scale * values_g.unsqueeze(2) * values_a.unsqueeze(1)
            ).reciprocal()
            return
        balance = ((trace_a / a.shape[1]) / (trace_g / g.shape[1])).sqrt()
        balance = torch.where(balance.isfinite() & (balance > 0), balance, 1.0).view(-1, 1, 1)
        root = scale.sqrt()
        for name, factor, share in (("a", a, root / balance), ("g", g, root * balance)):
            state[f"inverse_{name}"], fallback = inverse_of_shifted(factor * share)
            self.fallbacks += fallback

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        state = self.state
        if "damping" not in state:
            return m, m.new_zeros(())
        a, g = state["inverse_a"], state["inverse_g"]
        if self.config.kfac_solver == "eigen":
            rotated = g.transpose(1, 2) @ m @ a
            return g @ (rotated * state["shrink"]) @ a.transpose(1, 2), state["damping"]
        return g @ m @ a, state["damping"]


class KFAC(PreconditionedOptimizer):
    """KFAC (Martens & Grosse 2015) for the selected layers, AdamW for the rest."""

    config_class = KFACConfig
    layer_class = KFACLayer
    method = "kfac"


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues `[G, d]`, at least 0, and eigenvectors `[G, d, d]` of a factor."""
    values, vectors = eigen(0.5 * (factor + factor.transpose(1, 2)))
    return values.clamp(min=0), vectors


def second_moment(x: Tensor) -> Tensor:
    """Sum the outer products of all rows; half of the products are mirrored.

    Args:
        x: Rows `[G, N, T, d]`, in any memory layout.

    Returns:
        Symmetric matrices `[G, d, d]`.
    """
    groups, n, t, d = x.shape
    half = (d + 1) // 2
    total = x.new_zeros(groups, d, d)
    samples = max(1, _BLOCK_BYTES // (groups * t * d * x.element_size()))
    for block in x.split(samples, dim=1):
        if block.stride(-1) == 1:
            rows = block.reshape(groups, -1, d)
        else:
            rows = block.permute(0, 3, 1, 2).reshape(groups, d, -1).transpose(1, 2)
        columns = rows.transpose(1, 2)
        total[:, :half, :half] += columns[:, :half] @ rows[:, :, :half]
        total[:, half:] += columns[:, half:] @ rows
    total[:, :half, half:] = total[:, half:, :half].transpose(1, 2)
    return total

"""The protocol of the comparison methods: what each of them does for one layer.

A method watches a layer's inputs `a` and per-sample output gradients `g` on some steps, makes its
curvature F of them, and turns the layer's mean gradient M into V = λ(F + λI)⁻¹M. The factor λ makes
λ → ∞ the plain gradient for every method, as γ = λc does for FNGD.

One scale holds for all: g is κ times what autograd delivers, κ the samples of the update on this
rank, so that M = (1/N) Σ_n Σ_t g_nt a_ntᵀ whatever the loss reduction. Damping is λ itself, or
relative: in units of tr(F)/N, the mean eigenvalue of UᵀU/N (1 in place of N for Eva, whose F has
rank one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_fngd.calls import Call, gather_calls
from hf_fngd.layers import LinearAdapter
from hf_fngd.settings import OptimizerConfig, setting


def step_control(default: str) -> Any:
    """Declares how the length of the step is found.

    Args:
        default: The method's default.

    Returns:
        A dataclass field.
    """
    return setting(
        default,
        "Length of the step: none, kl_clip (all directions are shortened by one factor where the "
        "predicted change exceeds kl_clip) or norm (each layer's gets the gradient's norm).",
        choices=("none", "kl_clip", "norm"),
        resumed=True,
    )


@dataclass
class PreconditionerConfig(OptimizerConfig):
    """Settings that all comparison methods have."""

    fisher_labels: str = setting(
        "empirical",
        "Labels behind the curvature: empirical (those of the data, from the training backward) or "
        "sampled (drawn from the model's own predictions, by a second backward on update steps).",
        choices=("empirical", "sampled"),
        resumed=True,
    )
    update_period: int = setting(
        1, "Optimizer steps from one update of the curvature to the next.", at_least=1, resumed=True
    )
    step_control: str = step_control("none")
    kl_clip: float = setting(
        1e-3, "Bound on lr²·⟨V, F V⟩, summed over layers, for step_control=kl_clip.", above=0.0
    )


@dataclass
class Observed:
    """One layer in one micro-batch.

    Attributes:
        adapter: Adapter of the layer's type.
        calls: Input, output gradient and weight of every call.
        kappa: Factor from autograd's gradients to those of single samples.
        joint: Whether the bias is part of the block, as a feature that is 1.
        step: Optimizer steps so far.
    """

    adapter: LinearAdapter
    calls: Sequence[Call]
    kappa: float
    joint: bool
    step: int

    def canonical(self) -> tuple[Tensor, Tensor]:
        """Gives inputs and gradients in the canonical layout.

        Returns:
            `a` as `[G, N, T, d_in]` (d_in + 1 with a bias) and κg as `[G, N, T, d_out]`.
        """
        a, g = gather_calls(self.adapter, self.calls)
        if self.joint:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return a, g * self.kappa


def alive(adapter: LinearAdapter, g: Tensor) -> Tensor | None:
    """Finds positions that are no padding: those with a gradient.

    Args:
        adapter: Adapter of the layer's type.
        g: Output gradients `[G, N, T, d_out]`.

    Returns:
        1 or 0 as `[G, N, T, 1]`, or None where there is no padding.
    """
    if not adapter.may_pad or g.shape[2] == 1:
        return None
    return (g.abs().amax(-1, keepdim=True) > 0).to(g.dtype)


class LayerCurvature:
    """One layer's curvature; derived once for each method.

    Statistics are collected on each rank in backward (`observe`). At the optimizer step they are
    averaged over ranks where that makes sense (`statistics`), and become curvature (`update`).
    Directions are made in two parts, so that what differs by rank can be averaged in between:
    `local_parts` on each rank, then `combine`.

    Args:
        config: The method's settings.
        shape: Shape `[G, d_out, d_in]` of the layer's block, with the bias as a feature.
        seed: Seed of the layer, different on every rank.
    """

    # Whether each rank keeps curvature of its own, from one batch, for many steps.
    by_rank: ClassVar[bool] = False

    def __init__(self, config: PreconditionerConfig, shape: torch.Size, seed: int) -> None:
        self.config, self.shape, self.seed = config, shape, seed
        # What a checkpoint holds.
        self.state: dict[str, Tensor] = {}
        self.fallbacks = 0

    def clamped(self) -> str | None:
        """Says which setting is larger than the layer, if one is.

        Returns:
            The setting and what is done instead; None if there is none.
        """
        return None

    def observe(self, seen: Observed) -> None:
        """Takes in one micro-batch.

        Args:
            seen: Inputs and gradients.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Forgets what was observed, keeping the old curvature."""
        raise NotImplementedError

    def statistics(self, like: Tensor) -> list[Tensor]:
        """Gives what is averaged over ranks before `update`, the same shapes on every rank.

        Args:
            like: A tensor of the right device and dtype.

        Returns:
            Tensors, averaged in place.
        """
        return []

    def update(self, step: int) -> bool:
        """Turns what was observed into curvature, or keeps the old one.

        Args:
            step: Optimizer steps so far.

        Returns:
            False if the statistics were not finite.
        """
        raise NotImplementedError

    def local_parts(self, m: Tensor) -> list[Tensor]:
        """Computes this rank's part of a direction.

        Args:
            m: Mean gradient `[G, d_out, d_in]`.

        Returns:
            Tensors to be averaged over ranks, the same shapes on every rank.
        """
        return []

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Completes a direction.

        Args:
            m: Mean gradient `[G, d_out, d_in]`.
            parts: What `local_parts` gave, averaged.

        Returns:
            V = λ(F + λI)⁻¹M and λ (0 where there is no curvature yet, and V is M).
        """
        raise NotImplementedError

    def generator(self, step: int) -> torch.Generator:
        """Makes random numbers that a resumed run draws again.

        Args:
            step: Optimizer steps so far.

        Returns:
            A generator on the CPU.
        """
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)

    def damping(self, trace: Tensor, count: Tensor | float) -> Tensor:
        """Gives λ.

        Args:
            trace: tr(F).
            count: Number of samples behind F, or its rank if that is lower.

        Returns:
            Scalar tensor; 0 only where F is 0.
        """
        if self.config.damping_mode == "absolute":
            return torch.full_like(trace, self.config.damping)
        return self.config.damping * trace / count


def inverse_or_zero(damping: Tensor) -> Tensor:
    """Gives 1/λ, and 0 (no curvature) where λ is 0 or 1/λ no finite number.

    Args:
        damping: λ.

    Returns:
        Scalar tensor.
    """
    inverse = damping.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))

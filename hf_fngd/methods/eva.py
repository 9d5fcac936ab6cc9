"""Eva: Kronecker-vectorised curvature of rank one (Zhang, Shi & Li, ICLR 2023).

F ≈ (ḡ ḡᵀ) ⊗ (ā āᵀ) with the mean input ā and the mean output gradient ḡ. By Sherman-Morrison

    V = M - (ḡᵀ M ā / (λ + |ā|²|ḡ|²)) ḡ āᵀ.

Here ḡ is the mean over samples of a sample's gradient, summed over its positions, so that F is of
the same scale as in the other methods; for layers without shared positions that is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.calls import Call, gather_calls
from hf_fngd.layers import LinearAdapter
from hf_fngd.methods.averages import AveragedCurvature
from hf_fngd.methods.base import (
    Observed,
    PreconditionerConfig,
    alive,
    step_control,
)
from hf_fngd.settings import setting


@dataclass
class EvaConfig(PreconditionerConfig):
    """Settings of Eva, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "Eva"

    step_control: str = step_control("kl_clip")
    stat_decay: float = setting(
        0.05,
        "Weight of the old vectors in the running average, in [0, 1); the authors' code has 0.05.",
        at_least=0.0,
        below=1.0,
        resumed=True,
    )


class EvaLayer(AveragedCurvature):
    """Eva for one layer; a grouped convolution has vectors for each group."""

    config: EvaConfig

    def _shapes(self) -> list[tuple[int, ...]]:
        groups, d_out, d_in = self.shape
        return [(groups, d_in), (groups, d_out)]

    def _describe(self, seen: Observed) -> list[Tensor]:
        means = [_means(seen.adapter, call) for call in seen.calls]
        mean_a, total_g = (sum(parts[1:], parts[0]) for parts in zip(*means, strict=True))
        mean_a = mean_a / len(means)
        if seen.joint:
            mean_a = torch.cat([mean_a, mean_a.new_ones(len(mean_a), 1)], 1)
        return [mean_a, total_g * (seen.kappa / len(seen.calls[0][1]))]

    def update(self, step: int) -> bool:  # noqa: D102
        means = self._means()
        if means is not None:
            keep = self.config.stat_decay
            for name, value in zip(("a", "g"), means, strict=True):
                old = self.state.get(name)
                self.state[name] = value if old is None else old.lerp(value, 1 - keep)
        return not self._lost

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        if not self.state:
            return m, m.new_zeros(())
        a, g = self.state["a"].unsqueeze(2), self.state["g"].unsqueeze(2)
        sizes = a.square().sum(1, keepdim=True) * g.square().sum(1, keepdim=True)
        damping = self.damping(sizes.sum(), 1.0)
        bottom = damping + sizes
        share = (g.transpose(1, 2) @ m @ a) / torch.where(bottom > 0, bottom, 1.0)
        return m - share * (g @ a.transpose(1, 2)), damping


def _means(adapter: LinearAdapter, call: Call) -> tuple[Tensor, Tensor]:
    """Averages one call's inputs over samples and positions, and sums its gradients.

    Returns:
        `[G, d_in]` and `[G, d_out]`.
    """
    if not adapter.may_pad:
        # Unfolding an image is linear, so that the mean image is enough.
        x, g, weight = call
        precise = torch.promote_types(x.dtype, torch.float32)
        mean_x = x.mean(0, keepdim=True, dtype=precise)
        call = mean_x, g.sum(0, keepdim=True, dtype=precise), weight
    a, g = gather_calls(adapter, [call])
    mask = alive(adapter, g)
    if mask is None:
        return a.mean((1, 2)), g.sum((1, 2))
    return (a * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1), g.sum((1, 2))

"""Eva: Kronecker-vectorised curvature of rank one (Zhang, Shi & Li, ICLR 2023).

F ≈ (ḡ ḡᵀ) ⊗ (ā āᵀ) with the mean input ā and the mean output gradient ḡ. By Sherman-Morrison

    V = M - (ḡᵀ M ā / (λ + |ā|²|ḡ|²)) ḡ āᵀ.

Here ḡ is the mean over samples of a sample's gradient, summed over its positions, so that F is of
the same scale as in the other methods; for layers without shared positions that is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.config import setting
from hf_fngd.layers import LayerType
from hf_fngd.layers.calls import Call, gather_calls
from hf_fngd.methods.curvature import AveragedCurvature, alive
from hf_fngd.methods.preconditioned import PreconditionedOptimizer, PreconditionerConfig, kl_clip


@dataclass
class EvaConfig(PreconditionerConfig):
    """Settings of Eva, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "Eva"

    kl_clip: float | None = kl_clip(1e-3)
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
    powers = (0, 1)
    # Means over samples and positions are the same, whichever dimension is the batch.
    rows_are_sure = True

    def shapes(self) -> list[tuple[int, ...]]:
        groups, d_out, d_in = self.shape
        return [(groups, d_in), (groups, d_out)]

    def describe(self, calls: Sequence[Call], kappa: float, joint: bool) -> list[Tensor]:
        means = [_means(self.kind, call) for call in calls]
        mean_a, total_g = (sum(parts[1:], parts[0]) for parts in zip(*means, strict=True))
        mean_a = mean_a / len(means)
        if joint:
            mean_a = torch.cat([mean_a, mean_a.new_ones(len(mean_a), 1)], 1)
        return [mean_a, total_g * (kappa / len(calls[0].g))]

    def update(self, step: int) -> bool:
        means = self.means()
        if means is not None:
            keep = self.config.stat_decay
            for name, value in zip(("a", "g"), means, strict=True):
                old = self.state.get(name)
                self.state[name] = value if old is None else old.lerp(value, 1 - keep)
        return not self.lost

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.state:
            return m, m.new_zeros(())
        a, g = self.state["a"].unsqueeze(2), self.state["g"].unsqueeze(2)
        sizes = a.square().sum(1, keepdim=True) * g.square().sum(1, keepdim=True)
        damping = self.damping(sizes.sum(), 1.0)
        bottom = damping + sizes
        share = (g.transpose(1, 2) @ m @ a) / torch.where(bottom > 0, bottom, 1.0)
        return m - share * (g @ a.transpose(1, 2)), damping


class Eva(PreconditionedOptimizer):
    """Eva (Zhang, Shi & Li 2023) for the selected layers, AdamW for the rest."""

    config_class = EvaConfig
    layer_class = EvaLayer
    method = "eva"


def _means(kind: LayerType, call: Call) -> tuple[Tensor, Tensor]:
    """Average one call's inputs over samples and positions, and sum its gradients.

    Args:
        kind: The layer's type.
        call: The call.

    Returns:
        `[G, d_in]` and `[G, d_out]`.
    """
    if not kind.may_pad:
        # Unfolding an image is linear, so that the mean image is enough.
        x, g, weight = call
        precise = torch.promote_types(x.dtype, torch.float32)
        mean_x = x.mean(0, keepdim=True, dtype=precise)
        call = Call(mean_x, g.sum(0, keepdim=True, dtype=precise), weight)
    a, g = gather_calls(kind, [call])
    mask = alive(kind, g)
    if mask is None:
        return a.mean((1, 2)), g.sum((1, 2))
    return (a * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1), g.sum((1, 2))

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

from hf_fngd.methods.base import LayerCurvature, Observed, PreconditionerConfig, alive
from hf_fngd.settings import setting


@dataclass
class EvaConfig(PreconditionerConfig):
    """Settings of Eva, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "Eva"

    step_control: str = setting(
        "kl_clip",
        "Length of the step: none, kl_clip (all directions are shortened by one factor where the "
        "predicted change exceeds kl_clip) or norm (each layer's gets the gradient's norm).",
        choices=("none", "kl_clip", "norm"),
        resumed=True,
    )
    stat_decay: float = setting(
        0.05,
        "Weight of the old vectors in the running average, in [0, 1); the authors' code has 0.05.",
        at_least=0.0,
        below=1.0,
        resumed=True,
    )


class EvaLayer(LayerCurvature):
    """Eva for one layer; a grouped convolution has vectors for each group."""

    config: EvaConfig

    def __init__(self, config: EvaConfig, shape: torch.Size, seed: int) -> None:
        super().__init__(config, shape, seed)
        self._pending: list[Tensor] | None = None

    def observe(self, seen: Observed) -> None:  # noqa: D102
        means = [_means(seen, x, g) for x, g, _ in seen.calls]
        mean_a, total_g = (sum(parts[1:], parts[0]) for parts in zip(*means, strict=True))
        mean_a = mean_a / len(means)
        if seen.joint:
            mean_a = torch.cat([mean_a, mean_a.new_ones(len(mean_a), 1)], 1)
        mean_g = total_g * (seen.kappa / len(seen.calls[0][1]))
        found = [mean_a, mean_g, mean_a.new_ones(1)]
        if self._pending is not None:
            found = [old + new for old, new in zip(self._pending, found, strict=True)]
        self._pending = found

    def statistics(self, like: Tensor) -> list[Tensor]:  # noqa: D102
        groups, d_out, d_in = self.shape
        self.lost = self._pending is not None and not all(
            bool(t.isfinite().all()) for t in self._pending
        )
        if self._pending is None or self.lost:
            shapes = ((groups, d_in), (groups, d_out), (1,))
            self._pending = [like.new_zeros(shape) for shape in shapes]
        return self._pending

    def update(self, step: int) -> bool:  # noqa: D102
        assert self._pending is not None
        (mean_a, mean_g, count), self._pending = self._pending, None
        if float(count) > 0:
            keep = self.config.stat_decay
            for name, value in (("a", mean_a / count), ("g", mean_g / count)):
                old = self.state.get(name)
                self.state[name] = value if old is None else old.lerp(value, 1 - keep)
        return not self.lost

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        if not self.state:
            return m, m.new_zeros(())
        a, g = self.state["a"].unsqueeze(2), self.state["g"].unsqueeze(2)
        sizes = a.square().sum(1, keepdim=True) * g.square().sum(1, keepdim=True)
        damping = self.damping(sizes.sum(), 1.0)
        bottom = damping + sizes
        share = (g.transpose(1, 2) @ m @ a) / torch.where(bottom > 0, bottom, 1.0)
        return m - share * (g @ a.transpose(1, 2)), damping


def _means(seen: Observed, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Averages one call's inputs over samples and positions, and sums its gradients.

    Returns:
        `[G, d_in]` and `[G, d_out]`.
    """
    adapter = seen.adapter
    if not adapter.may_pad:
        # Unfolding an image is linear, so that the mean image is enough.
        a, total = adapter.canonical(
            x.float().mean(0, keepdim=True)
            if x.dtype != torch.float64
            else x.mean(0, keepdim=True),
            g.float().sum(0, keepdim=True) if g.dtype != torch.float64 else g.sum(0, keepdim=True),
        )
        return a.mean((1, 2)), total.sum((1, 2))
    a, g = adapter.canonical(x, g)
    if a.dtype in (torch.float16, torch.bfloat16):
        a, g = a.float(), g.float()
    mask = alive(adapter, g)
    if mask is None:
        return a.mean((1, 2)), g.sum((1, 2))
    return (a * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1), g.sum((1, 2))

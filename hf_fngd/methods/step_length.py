"""How far a step goes along its directions: `step_control`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def with_norms_of(means: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """Gives every layer's direction the length of its gradient.

    Args:
        means: Mean gradient M of each layer.
        directions: V of each layer.

    Returns:
        The directions; zero stays zero.
    """
    ratios = [m.norm() / v.norm() for m, v in zip(means, directions, strict=True)]
    return [
        v * torch.where(ratio.isfinite(), ratio, 1.0)
        for v, ratio in zip(directions, ratios, strict=True)
    ]


def kl_scale(
    kl_clip: float,
    rates: Sequence[float],
    dampings: Sequence[Tensor],
    means: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> Tensor:
    """Finds the factor that keeps the predicted change of the model within a bound.

    lr²⟨V, FV⟩, summed over layers, is about lr²λ⟨V, M⟩, since (F + λI)V = λM.

    Args:
        kl_clip: The bound.
        rates: Learning rate of each layer.
        dampings: Absolute damping λ of each layer; 0 where there is no curvature.
        means: Mean gradient M of each layer.
        directions: V of each layer.

    Returns:
        Scalar in [0, 1]; 0 where the change overflows.
    """
    changes = [
        # Without curvature nothing is predicted, however large the gradient.
        torch.where(damping > 0, rate**2 * damping * (v * m).sum().abs(), 0.0)
        for rate, damping, m, v in zip(rates, dampings, means, directions, strict=True)
    ]
    # Not stacked: layers may differ in precision and device.
    scale = (kl_clip / sum(changes, torch.zeros(()))).sqrt().clamp(max=1.0)
    return torch.where(scale.isnan(), 0.0, scale)

"""How the gradients of a backward pass relate to those of single samples.

A loop divides the loss by its micro-batches, and a GradScaler multiplies it. Curvature is of single
samples, so that it has to know both. A loop can tell them (`LayerOptimizer.set_loss_scale`). If it
does not, they are found at the optimizer step: micro-batches are counted, and the factor of a
scaler is the ratio of the gradient that the layers returned to the one that arrives at the step.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from hf_fngd import ranks

logger = logging.getLogger(__name__)
# A ratio that clipping alone hardly has.
_SURELY_SCALED = 256.0


class GradientScale:
    """What is known of the present step."""

    def __init__(self) -> None:
        self.told = False
        # What the loss of a micro-batch was divided by, as told.
        self.divisor = 1.0
        self._warned = False
        self.forget_step()

    def forget_step(self) -> None:
        """Begin another step."""
        # Micro-batches with a gradient, and the sum of one layer's gradients.
        self.micro_batches = 0
        self.layer: Any = None
        self._total: Tensor | None = None

    def tell(self, micro_batches: int, scale: float) -> None:
        """Take what the loop says; the arguments are those of `set_loss_scale`."""
        self.told, self.divisor = True, micro_batches / scale

    def note(self, layer: Any, first: bool, gradient: Tensor | None) -> None:
        """Take in the gradient that a layer returns.

        Args:
            layer: The layer's method; the first one of a step stands for all.
            first: Whether it is the layer's first gradient in its micro-batch.
            gradient: Gradient of its weight.
        """
        if self.told or gradient is None or self.layer not in (None, layer):
            return
        self.layer = layer
        self.micro_batches += first
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self._total = gradient.clone() if self._total is None else self._total + gradient

    def find(self, device: torch.device) -> float:
        """Compare with the gradient at the step; all ranks must call it together.

        Args:
            device: Where ranks exchange numbers.

        Returns:
            Factor from the gradients as they came to those of an update whose loss is the mean over
            its micro-batches, times the micro-batches: 1 where the loop has told both.
        """
        if self.told:
            return 1.0
        products = torch.zeros(2, device=device)
        final = None if self.layer is None else getattr(self.layer.parameters()[0], "grad", None)
        total = self._total
        if type(final) is Tensor and total is not None and final.shape == total.shape:
            precise = final.to(total)
            size = precise.abs().max().clamp(min=torch.finfo(precise.dtype).tiny)
            products[0] = (total * (precise / size)).sum() / size
            products[1] = (precise / size).square().sum()
        low = final is not None and final.element_size() < 4
        # Ranks have different gradients until they are averaged.
        ranks.average([products])
        return max(1, self.micro_batches) / self._scale(float(products[0] / products[1]), low)

    def _scale(self, ratio: float, low_precision: bool) -> float:
        if not math.isfinite(ratio) or ratio <= 1.5:
            return 1.0
        # Clipping shortens gradients too, but a scaler's factor is a power of two.
        power = math.log2(ratio)
        if abs(power - round(power)) < (0.01 if low_precision else 1e-4):
            return 2.0 ** round(power)
        if ratio < _SURELY_SCALED:
            return 1.0
        if not self._warned:
            self._warned = True
            logger.warning(
                "gradients are %.3g times smaller at the step than in the backward pass: a factor "
                "2**%d is taken for the loss scale, and the rest for clipping; call "
                "set_loss_scale(micro_batches, scaler.get_scale()) to have it exact",
                ratio,
                math.floor(power),
            )
        return 2.0 ** math.floor(power)

"""TENGraD: exact inverse of each layer's Fisher block by Woodbury (Soori et al., arXiv 2106.03947).

With the per-sample gradients U = [u_1 … u_N] of an earlier batch, F = UUᵀ/N and

    V = M - (1/N) U (λI + UᵀU/N)⁻¹ Uᵀ vec(M),

where neither U nor its Gram matrix needs more than inputs and output gradients (covariance
factorisation). U and the inverse stay as they are for `update_period` steps; M is always fresh.
The bias belongs to the block of its weight. Sequences and images have their positions summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_fngd.config import setting
from hf_fngd.methods.blocks import BlockCurvature, SampleBlock
from hf_fngd.methods.preconditioned import PreconditionedOptimizer, PreconditionerConfig


@dataclass
class TENGraDConfig(PreconditionerConfig):
    """Settings of TENGraD, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "TENGraD"

    fisher_labels: str = setting(
        "sampled",
        "Labels behind the curvature: sampled (drawn from the model's own predictions, by a second "
        "backward on update steps; the paper) or empirical (those of the data).",
        choices=("empirical", "sampled"),
        resumed=True,
    )
    update_period: int = setting(
        100,
        "Optimizer steps from one update of the curvature to the next.",
        at_least=1,
        resumed=True,
    )
    gram_memory_mb: int = setting(
        256, "Upper bound in MiB of the workspace of one layer's Gram matrix.", at_least=1
    )


class TENGraDLayer(BlockCurvature):
    """TENGraD for one layer."""

    config: TENGraDConfig

    def describe(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        block = SampleBlock.of(a, g)
        matrix = block.gram(memory_bytes=self.config.gram_memory_mb * 2**20)
        return {**block.tensors, "gram": matrix, "trace": matrix.diagonal().sum()}


class TENGraD(PreconditionedOptimizer):
    """TENGraD (arXiv 2106.03947) for the selected layers, AdamW for the rest."""

    config_class = TENGraDConfig
    layer_class = TENGraDLayer
    method = "tengrad"

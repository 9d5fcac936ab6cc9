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

import torch
from torch import Tensor

from hf_fngd.methods.base import Observed, PreconditionerConfig
from hf_fngd.methods.blocks import BlockCurvature, SampleBlock
from hf_fngd.settings import setting


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
    rank_threshold: float = setting(
        1.0,
        "Truncated form: singular values of U are kept until their sum reaches this share; the "
        "authors use 0.9. 1: exact.",
        above=0.0,
        at_most=1.0,
        resumed=True,
    )
    gram_route: str = setting(
        "auto",
        "How Gram matrices are formed where U is not kept: auto (fewest operations), direct or "
        "hadamard.",
        choices=("auto", "direct", "hadamard"),
    )
    gram_memory_mb: int = setting(
        256, "Upper bound in MiB of the workspace of one layer's Gram matrix.", at_least=1
    )


class TENGraDLayer(BlockCurvature):
    """TENGraD for one layer."""

    config: TENGraDConfig

    def _describe(self, seen: Observed) -> dict[str, Tensor]:
        a, g = seen.canonical()
        block = SampleBlock.of(a, g)
        matrix = block.gram(self.config.gram_route, self.config.gram_memory_mb * 2**20)
        return {**block.tensors, "gram": matrix, "trace": matrix.diagonal().sum()}

    def _invert(
        self, matrix: Tensor, scale: Tensor, count: float, pending: dict[str, Tensor]
    ) -> tuple[Tensor, bool]:
        if self.config.rank_threshold == 1.0:
            return super()._invert(matrix, scale, count, pending)
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.t()))
        values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)
        share = values.sqrt().cumsum(0)
        kept = int((share < self.config.rank_threshold * share[-1]).sum()) + 1
        values, vectors = values[:kept], vectors[:, :kept]
        shrink = scale / count / (1 + scale / count * values)
        if "u" in pending:
            pending["u"] = vectors.t() @ pending["u"]
            return shrink.diag(), False
        return (vectors * shrink) @ vectors.t(), False

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

from hf_fngd.coefficients import inverse_of_shifted
from hf_fngd.methods.base import (
    LayerCurvature,
    Observed,
    PreconditionerConfig,
    inverse_or_zero,
)
from hf_fngd.methods.blocks import SampleBlock
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


class BlockCurvature(LayerCurvature):
    """Curvature from kept per-sample gradients, with each rank's own; directions are averaged."""

    def __init__(self, config: PreconditionerConfig, shape: torch.Size, seed: int) -> None:
        super().__init__(config, shape, seed)
        self._pending: dict[str, Tensor] | None = None

    def _describe(self, seen: Observed) -> dict[str, Tensor]:
        """Makes the state of one micro-batch; `gram` and `trace` of UᵀU are among it."""
        raise NotImplementedError

    def observe(self, seen: Observed) -> None:  # noqa: D102
        samples = float(len(seen.calls[0][1]))
        # Of several micro-batches the largest and latest one counts.
        if self._pending is None or samples >= float(self._pending["samples"]):
            self._pending = self._describe(seen)
            self._pending["samples"] = torch.tensor(samples)

    def update(self, step: int) -> bool:  # noqa: D102
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        matrix = pending.pop("gram")
        trace = pending.pop("trace")
        if not all(bool(t.isfinite().all()) for t in (matrix, trace, *pending.values())):
            return False
        count = float(pending["samples"])
        damping = self.damping(trace / count, count)
        scale = inverse_or_zero(damping)
        if not bool((matrix * (scale / count)).isfinite().all()):
            return False
        pending["damping"] = damping
        pending["solver"], safer = self._invert(matrix, scale, count, pending)
        self.fallbacks += safer
        self.state = pending
        return True

    def _invert(
        self, matrix: Tensor, scale: Tensor, count: float, pending: dict[str, Tensor]
    ) -> tuple[Tensor, bool]:
        """Inverts what Woodbury's identity needs.

        Returns:
            (1/N)(λI + K/N)⁻¹, and whether a safer way had to be taken.
        """
        inverse, safer = inverse_of_shifted(matrix * (scale / count))
        return inverse * (scale / count), safer

    def discard(self) -> None:
        """Forgets what was observed, keeping the old curvature."""
        self._pending = None

    def _block(self) -> SampleBlock:
        names = ("u",) if "u" in self.state else ("a", "g")
        return SampleBlock({name: self.state[name] for name in names}, self.shape)

    def local_parts(self, m: Tensor) -> list[Tensor]:  # noqa: D102
        if not self.state:
            return [m.new_zeros(()), torch.zeros_like(m)]
        block, damping = self._block(), self.state["damping"].to(m)
        return [damping, block.combine(self.state["solver"] @ self._inner(block, m))]

    def _inner(self, block: SampleBlock, m: Tensor) -> Tensor:
        return block.inner(m)

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        return m - parts[1], parts[0]


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

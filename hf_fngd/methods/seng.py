"""SENG: sketched empirical natural gradient (Yang et al., arXiv 2006.05924).

With the per-sample gradients U of an earlier batch, F = UUᵀ/N and V = λ(F + λI)⁻¹M in two forms:

* layers of moderate size keep U; its Gram matrix and Uᵀvec(M) are taken from a random subset of
  coordinates (sketched least squares), the product Uv from all of them;
* big layers keep u_n ≈ Y_n X_nᵀ of low rank; sums Σ_n v_n Y_n X_nᵀ are replaced by one product of
  sums (the authors' implicit form).

Sketches are unbiased: the expectation of the sketched Gram matrix and of the sketched Uᵀvec(M) is
the exact one. The authors' code scales both once more by the sketching ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fngd.config import setting
from hf_fngd.methods.blocks import BlockCurvature, SampleBlock
from hf_fngd.methods.preconditioned import PreconditionedOptimizer, PreconditionerConfig


@dataclass
class SENGConfig(PreconditionerConfig):
    """Settings of SENG, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "SENG"

    update_period: int = setting(
        200,
        "Optimizer steps from one update of the curvature to the next.",
        at_least=1,
        resumed=True,
    )
    sketch_size: int = setting(
        256,
        "q: moderate layers are sketched to q² coordinates, big ones to q rows of each factor. "
        "0: no sketch.",
        at_least=0,
        resumed=True,
    )
    big_layer_size: int = setting(
        1_000_000,
        "Layers with more weights than this take the low-rank form; the authors use 700,000 in "
        "their scripts.",
        at_least=0,
        resumed=True,
    )
    big_rank: int = setting(
        16, "Rank of each sample's gradient in big layers.", at_least=1, resumed=True
    )


class SENGLayer(BlockCurvature):
    """SENG for one layer."""

    config: SENGConfig

    @property
    def big(self) -> bool:
        """Whether the layer takes the low-rank form."""
        return self.shape.numel() > self.config.big_layer_size

    @property
    def sketched(self) -> bool:
        """Whether the sketch is smaller than the layer."""
        q, (_, d_out, d_in) = self.config.sketch_size, self.shape
        if q == 0:
            return False
        return q < max(d_out, d_in) if self.big else q * q < self.shape.numel()

    def clamped(self) -> str | None:
        if self.config.sketch_size == 0 or self.sketched:
            return None
        return f"sketch_size={self.config.sketch_size} is no less than the layer: no sketch"

    def describe(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        if self.big:
            return self._describe_big(*_low_rank(a, g, self.config.big_rank))
        block = SampleBlock.of(a, g, whole=True)
        u = block.tensors["u"]
        found = {**block.tensors, "trace": torch.linalg.vector_norm(u).square()}
        if not self.sketched:
            return {**found, "gram": block.gram()}
        size = self.shape.numel()
        chosen = self._draw(size, self.config.sketch_size**2).to(u.device)
        sketch = u[:, chosen]
        ratio = torch.tensor(size / len(chosen), dtype=torch.float64, device="cpu")
        found |= {"chosen": chosen, "sketch": sketch, "ratio": ratio}
        return {**found, "gram": sketch @ sketch.t() * float(ratio)}

    def _describe_big(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        block = SampleBlock.of(x, y, whole=False)
        found = dict(block.tensors)
        ratio = 1.0
        if self.sketched:
            for salt, (name, factor) in enumerate((("a", x), ("g", y))):
                q = min(self.config.sketch_size, factor.shape[-1])
                chosen = self._draw(factor.shape[-1], q, salt).to(x.device)
                found[f"chosen_{name}"] = chosen
                found[f"sketch_{name}"] = factor[..., chosen].contiguous()
                ratio *= factor.shape[-1] / q
            block = self._sketch_block(found)
        found["ratio"] = torch.tensor(ratio, dtype=torch.float64, device="cpu")
        matrix = block.gram("hadamard") * ratio
        # Exact, where the sketch would make relative damping a random number.
        trace = ((x @ x.transpose(2, 3)) * (y @ y.transpose(2, 3))).sum()
        return {**found, "gram": matrix, "trace": trace}

    def _draw(self, size: int, count: int, *salt: int) -> Tensor:
        generator = self.generator(self.optimizer.steps, *salt)
        return torch.randperm(size, generator=generator, device="cpu")[:count]

    @staticmethod
    def _sketch_block(state: dict[str, Tensor]) -> SampleBlock:
        a, g = state["sketch_a"], state["sketch_g"]
        shape = torch.Size((len(a), g.shape[-1], a.shape[-1]))
        return SampleBlock({"a": a, "g": g}, shape)

    def inner(self, block: SampleBlock, m: Tensor) -> Tensor:
        state = self.state
        if "sketch" in state:
            return state["sketch"] @ m.reshape(-1)[state["chosen"]] * float(state["ratio"])
        if "sketch_a" in state:
            part = m[:, state["chosen_g"]][:, :, state["chosen_a"]]
            return self._sketch_block(state).inner(part) * float(state["ratio"])
        return block.inner(m)

    def local_parts(self, m: Tensor) -> list[Tensor]:
        if not self.big:
            return super().local_parts(m)
        groups, d_out, d_in = self.shape
        rank = self.config.big_rank
        parts = [m.new_zeros(()), m.new_zeros(groups, d_out, rank), m.new_zeros(groups, rank, d_in)]
        if self.state:
            block = self.block()
            weights = self.state["solver"] @ self.inner(block, m)
            roots = weights.abs().sqrt()
            x, y = self.state["a"], self.state["g"]
            total = roots.sum().clamp(min=torch.finfo(m.dtype).tiny)
            width = x.shape[2]
            parts[0] = self.state["damping"].to(m)
            parts[1][:, :, :width] = torch.einsum("n,gnpo->gop", roots, y)
            parts[2][:, :width] = torch.einsum("n,gnpi->gpi", weights / total, x)
        return parts

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        if len(parts) == 2:
            return super().combine(m, parts)
        return m - parts[1] @ parts[2], parts[0]


class SENG(PreconditionedOptimizer):
    """SENG (arXiv 2006.05924) for the selected layers, AdamW for the rest."""

    config_class = SENGConfig
    layer_class = SENGLayer
    method = "seng"


def _low_rank(a: Tensor, g: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approximate g_nᵀ a_n by factors of the given rank, from the singular vectors of g_n.

    Returns:
        X `[G, N, p, d_in]` and Y `[G, N, p, d_out]`, p at most `rank`.
    """
    if g.shape[2] <= rank:
        return a, g
    if not bool(g.isfinite().all()):
        # Not to be decomposed, nor to be cut off unseen.
        return a[:, :, :rank], torch.full_like(g[:, :, :rank], torch.nan)
    left, values, right = torch.linalg.svd(g.transpose(2, 3), full_matrices=False)
    x = right[:, :, :rank] @ a
    return x, (left[..., :rank] * values[..., None, :rank]).transpose(2, 3)

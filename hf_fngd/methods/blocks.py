"""The per-sample gradients of one layer, kept for many steps, and curvature made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fngd import gram
from hf_fngd.coefficients import inverse_of_shifted
from hf_fngd.methods.base import (
    LayerCurvature,
    Observed,
    PreconditionerConfig,
    inverse_or_zero,
)


class SampleBlock:
    """U = [u_1 … u_N], as it is or by its factors, whichever takes less memory.

    Args:
        tensors: `u` as `[N, G·d_out·d_in]`, or `a` and `g` in the canonical layout with
            u_n = Σ_t g_nt a_ntᵀ.
        shape: Shape `[G, d_out, d_in]` of a gradient.
    """

    def __init__(self, tensors: dict[str, Tensor], shape: torch.Size) -> None:
        self.tensors, self.shape = tensors, shape

    @classmethod
    def of(cls, a: Tensor, g: Tensor, *, whole: bool | None = None) -> SampleBlock:
        """Keeps a layer's samples.

        Args:
            a: Inputs `[G, N, T, d_in]`.
            g: Per-sample output gradients `[G, N, T, d_out]`.
            whole: Whether U itself is kept; by default where it is smaller than its factors.

        Returns:
            The block.
        """
        groups, n, t, d_in = a.shape
        d_out = g.shape[-1]
        shape = torch.Size((groups, d_out, d_in))
        if whole is None:
            whole = d_in * d_out <= t * (d_in + d_out)
        if whole:
            u = g.transpose(2, 3) @ a
            return cls({"u": u.transpose(0, 1).reshape(n, -1)}, shape)
        return cls({"a": a.contiguous(), "g": g.contiguous()}, shape)

    @property
    def count(self) -> int:
        """Number of gradients."""
        return len(self.tensors["u"]) if "u" in self.tensors else self.tensors["a"].shape[1]

    def gram(self, route: str = "auto", memory_bytes: int = 2**28) -> Tensor:
        """Forms UᵀU.

        Args:
            route: As in `gram.sample_gram`, where only the factors are kept.
            memory_bytes: Bound on the workspace.

        Returns:
            Matrix `[N, N]`.
        """
        if "u" in self.tensors:
            return self.tensors["u"] @ self.tensors["u"].t()
        a, g = self.tensors["a"], self.tensors["g"]
        return gram.sample_gram(a, g, bias=False, route=route, memory_bytes=memory_bytes).matrix

    def inner(self, m: Tensor) -> Tensor:
        """Multiplies every gradient with a matrix: Uᵀ vec(M).

        Args:
            m: Matrix `[G, d_out, d_in]`.

        Returns:
            Inner products `[N]`.
        """
        if "u" in self.tensors:
            return self.tensors["u"] @ m.reshape(-1)
        a, g = self.tensors["a"], self.tensors["g"]
        groups, n, t, d_in = a.shape
        rows = g.reshape(groups, n * t, -1) @ m
        return (rows.view(a.shape) * a).sum((0, 2, 3))

    def combine(self, weights: Tensor) -> Tensor:
        """Adds up weighted gradients: Uv.

        Args:
            weights: v `[N]`.

        Returns:
            Matrix `[G, d_out, d_in]`.
        """
        if "u" in self.tensors:
            return (weights @ self.tensors["u"]).view(self.shape)
        a, g = self.tensors["a"], self.tensors["g"]
        scaled = (g * weights.view(1, -1, 1, 1)).flatten(1, 2)
        return scaled.transpose(1, 2) @ a.flatten(1, 2)


class BlockCurvature(LayerCurvature):
    """Curvature from kept per-sample gradients, with each rank's own; directions are averaged."""

    by_rank = True

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

    def discard(self) -> None:  # noqa: D102
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

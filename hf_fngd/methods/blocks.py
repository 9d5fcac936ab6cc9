"""Curvature from a batch's per-sample gradients, which TENGraD and SENG keep for many steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.layers import LayerType
from hf_fngd.layers.calls import Call
from hf_fngd.methods.curvature import LayerCurvature, inverse_or_zero
from hf_fngd.solve import gram
from hf_fngd.solve.coefficients import inverse_of_shifted


class SampleBlock:
    """Per-sample gradients U = [u_1 … u_N], as a matrix or by their factors.

    Args:
        tensors: `u` as `[N, G·d_out·d_in]`, or `a` and `g` in the canonical layout with
            u_n = Σ_t g_nt a_ntᵀ.
        shape: Shape `[G, d_out, d_in]` of a gradient.
    """

    def __init__(self, tensors: dict[str, Tensor], shape: torch.Size) -> None:
        self.tensors, self.shape = tensors, shape

    @classmethod
    def of(cls, a: Tensor, g: Tensor, *, whole: bool | None = None) -> SampleBlock:
        """Keep a layer's samples.

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
        """Form UᵀU `[N, N]`; the arguments are those of `gram.sample_gram`."""
        if "u" in self.tensors:
            return self.tensors["u"] @ self.tensors["u"].t()
        a, g = self.tensors["a"], self.tensors["g"]
        return gram.sample_gram(a, g, bias=False, route=route, memory_bytes=memory_bytes).matrix

    def inner(self, m: Tensor) -> Tensor:
        """Multiply every gradient with a matrix `[G, d_out, d_in]`: Uᵀ vec(M), `[N]`."""
        if "u" in self.tensors:
            return self.tensors["u"] @ m.reshape(-1)
        a, g = self.tensors["a"], self.tensors["g"]
        groups, n, t, _ = a.shape
        rows = g.reshape(groups, n * t, -1) @ m
        return (rows.view(a.shape) * a).sum((0, 2, 3))

    def combine(self, weights: Tensor) -> Tensor:
        """Add up gradients with weights v `[N]`: Uv, `[G, d_out, d_in]`."""
        if "u" in self.tensors:
            return (weights @ self.tensors["u"]).view(self.shape)
        a, g = self.tensors["a"], self.tensors["g"]
        scaled = (g * weights.view(1, -1, 1, 1)).flatten(1, 2)
        return scaled.transpose(1, 2) @ a.flatten(1, 2)


# How often the output gradient is a factor of what `BlockCurvature.describe` returns.
_POWERS = {"u": 1, "g": 1, "sketch": 1, "sketch_g": 1, "gram": 2, "trace": 2}


class BlockCurvature(LayerCurvature):
    """Curvature from per-sample gradients kept for many steps, on each rank its own."""

    by_rank = True

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        super().__init__(optimizer, number, module, kind)
        self._pending: dict[str, Tensor] | None = None

    @abstractmethod
    def describe(self, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return the state of one micro-batch, with `gram` and `trace` of UᵀU.

        Args:
            a: Inputs `[G, N, T, d_in]`.
            g: Per-sample output gradients `[G, N, T, d_out]`.
        """

    def observe(self, calls: Sequence[Call], kappa: float, joint: bool) -> None:
        samples = float(len(calls[0].g))
        # Of several micro-batches the largest and latest one counts.
        if self._pending is None or samples >= float(self._pending["samples"]):
            self._pending = self.describe(*self.canonical(calls, kappa, joint))
            self._pending["samples"] = torch.tensor(samples, device="cpu")

    def update(self, step: int) -> bool:
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        matrix = pending.pop("gram")
        trace = pending.pop("trace")
        if self.lost:
            return False
        count = float(pending["samples"])
        damping = self.damping(trace / count, count)
        scale = inverse_or_zero(damping) / count
        if not bool((matrix * scale).isfinite().all()):
            return False
        pending["damping"] = damping
        # Woodbury's identity: (1/N)(λI + K/N)⁻¹.
        inverse, fallback = inverse_of_shifted(matrix * scale)
        pending["solver"] = inverse * scale
        self.fallbacks += fallback
        self.state = pending
        return True

    def observations(self) -> list[Tensor]:
        return [one for one in (self._pending or {}).values() if one.is_floating_point()]

    def rescale(self, factor: float) -> None:
        for name, power in _POWERS.items():
            if self._pending is not None and name in self._pending:
                self._pending[name] = self._pending[name] * factor**power

    def discard(self) -> None:
        self._pending = None

    def block(self) -> SampleBlock:
        """Return the kept gradients."""
        names = ("u",) if "u" in self.state else ("a", "g")
        return SampleBlock({name: self.state[name] for name in names}, self.shape)

    def local_parts(self, m: Tensor) -> list[Tensor]:
        if not self.state:
            return [m.new_zeros(()), torch.zeros_like(m)]
        block, damping = self.block(), self.state["damping"].to(m)
        return [damping, block.combine(self.state["solver"] @ self.inner(block, m))]

    def inner(self, block: SampleBlock, m: Tensor) -> Tensor:
        """Return Uᵀ vec(M), or an estimate of it."""
        return block.inner(m)

    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        return m - parts[1], parts[0]

"""The per-sample gradients of one layer, kept from one curvature update to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fngd import gram


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

"""Linear layers: `torch.nn.Linear`, and GPT-2's `Conv1D`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fngd.layers.layer_type import LayerType


class Linear(LayerType):
    """`torch.nn.Linear`: weight `[d_out, d_in]`, input `[N, *, d_in]`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if x.dim() == 2 and x.stride() == (1, x.shape[0]):
            # As autograd does for a column-major input; the other order differs in the last bit.
            return weight.t().mm(g.t()).t()
        return g.matmul(weight)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return _rows(g).t().mm(_rows(x)), self.bias_gradient(g) if bias else None

    def bias_gradient(self, g: Tensor) -> Tensor:
        return _rows(g).sum(0)

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        return x.reshape(1, n, -1, x.shape[-1]), g.reshape(1, n, -1, g.shape[-1])

    def to_canonical(self, gradient: Tensor) -> Tensor:
        return gradient.unsqueeze(0)

    def scale(self, g: Tensor, gamma: Tensor) -> Tensor:
        shape = g.shape[:-1] if gamma.dim() == 2 else (-1, *[1] * (g.dim() - 2))
        gamma = gamma.reshape(*shape, 1)
        return g * (gamma if gamma.dtype == g.dtype else gamma.to(g.dtype))


class Conv1D(Linear):
    """GPT-2's `Conv1D`, a linear layer with weight `[d_in, d_out]` and a bias."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return torch.addmm(bias, _rows(x), weight).view(*x.shape[:-1], weight.shape[1])

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return g.matmul(weight.t())

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return _rows(x).t().mm(_rows(g)), self.bias_gradient(g) if bias else None

    def to_canonical(self, gradient: Tensor) -> Tensor:
        return gradient.t().unsqueeze(0)

    def from_canonical(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix[0].t()


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

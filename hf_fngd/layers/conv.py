"""Convolutions: `torch.nn.Conv2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers.layer_type import LayerType


class Conv2d(LayerType):
    """`torch.nn.Conv2d` with groups, stride, dilation and every padding mode.

    Padding that the operator itself cannot do (other modes than zeros, an odd `same`) is applied
    beforehand, where autograd takes care of it.
    """

    feature_dim = 1
    batched_dim = 4
    may_pad = False

    def __init__(self, module: nn.Module) -> None:
        assert isinstance(module, nn.Conv2d)
        self.kernel = tuple(module.kernel_size)
        self.stride = tuple(module.stride)
        self.dilation = tuple(module.dilation)
        self.groups = module.groups
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        sides = _padding_sides(module)
        symmetric = all(low == high for low, high in sides)
        if self.mode == "constant" and symmetric:
            self.padding = (sides[0][0], sides[1][0])
            self.pad: tuple[int, ...] | None = None
        else:
            self.padding = (0, 0)
            self.pad = (*sides[1], *sides[0])

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.pad is None else F.pad(x, self.pad, mode=self.mode)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        sizes = (self.stride, self.padding, self.dilation)
        return torch.ops.aten.convolution_backward(
            g, x, weight, [len(weight)], *sizes, False, [0, 0], self.groups, wanted
        )

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(g, x, weight, (True, False, False))[0]

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._backward(g, x, weight, (False, True, bias))[1:]

    def weighted_gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, input_needed: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if bias or gamma.dim() == 2:
            # Positions of the input are not those of the output: the weights go to the output.
            grad_x = self.input_gradient(g, x, weight) if input_needed else None
            return grad_x, *self.gradients(self.scale(g, gamma), x, weight, bias)
        # The input's gradient does not depend on the input, so that one call does both.
        return self._backward(g, self.scale(x, gamma), weight, (input_needed, True, False))

    def bias_gradient(self, g: Tensor) -> Tensor:
        return g.sum((0, 2, 3))

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        a, g = (
            part.reshape(len(part), self.groups, -1, part.shape[-1]).permute(1, 0, 3, 2)
            for part in (patches, g.flatten(2))
        )
        return a, g

    def to_canonical(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(self.groups, len(gradient) // self.groups, -1)

    def scale(self, g: Tensor, gamma: Tensor) -> Tensor:
        shape = (*g.shape[2:],) if gamma.dim() == 2 else (1, 1)
        return g * gamma.to(g.dtype).reshape(-1, 1, *shape)


def _padding_sides(module: nn.Conv2d) -> list[tuple[int, int]]:
    """Return the padding before and after, for height and for width."""
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]

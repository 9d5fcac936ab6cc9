"""Adapters of the layers that see images: Conv2d and BatchNorm2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_fngd.layers import LinearAdapter


class Conv2dAdapter(LinearAdapter):
    """`torch.nn.Conv2d` with groups, stride, dilation and every padding mode.

    Padding that the operator itself cannot do (other modes than zeros, an odd `same`) is applied
    beforehand, where autograd takes care of it.
    """

    feature_dim = 1
    may_pad = False

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__(module)
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

    def prepare(self, x: Tensor) -> Tensor:  # noqa: D102
        return x if self.pad is None else F.pad(x, self.pad, mode=self.mode)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            [len(weight)],
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            self.groups,
            mask,
        )

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return self._backward(g, x, weight, (True, False, False))[0]

    def parameter_gradients(  # noqa: D102
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self._backward(g, x, weight, (False, True, bias))[1:]

    def weighted_gradients(  # noqa: D102
        self, g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, input_needed: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if bias or gamma.dim() == 2:
            grad_x = self.input_gradient(g, x, weight) if input_needed else None
            return grad_x, *self.parameter_gradients(self.scale_rows(g, gamma), x, weight, bias)
        # With the weights on the input, of which its own gradient knows nothing, one call does all.
        return self._backward(g, self.scale_rows(x, gamma), weight, (input_needed, True, False))

    def bias_gradient(self, g: Tensor) -> Tensor:  # noqa: D102
        return g.sum((0, 2, 3))

    def input_features(self, x: Tensor) -> int:  # noqa: D102
        return x.shape[1] // self.groups

    def pick_inputs(self, x: Tensor, chosen: Tensor) -> Tensor:  # noqa: D102
        return x.view(len(x), self.groups, -1, *x.shape[2:])[:, :, chosen].flatten(1, 2)

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        patches = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        a, g = (
            part.reshape(len(part), self.groups, -1, part.shape[-1]).permute(1, 0, 3, 2)
            for part in (patches, g.flatten(2))
        )
        return a, g

    def to_canonical(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.reshape(self.groups, len(gradient) // self.groups, -1)

    def scale_rows(self, g: Tensor, gamma: Tensor) -> Tensor:  # noqa: D102
        shape = (*g.shape[2:],) if gamma.dim() == 2 else (1, 1)
        return g * gamma.to(g.dtype).reshape(len(g), 1, *shape)


class BatchNormAdapter(LinearAdapter):
    """`torch.nn.BatchNorm2d` as the scaling of its normalised input: C groups of one feature.

    Normalisation is applied beforehand, where autograd takes care of it and running statistics
    are updated as always.
    """

    feature_dim = 1
    may_pad = False
    autocast = False

    def __init__(self, module: nn.BatchNorm2d) -> None:
        super().__init__(module)
        self.module = module

    def prepare(self, x: Tensor) -> Tensor:  # noqa: D102
        module = self.module
        batch = module.training or module.running_mean is None
        momentum = module.momentum if module.momentum is not None else 0.0
        tracked = module.num_batches_tracked
        if module.training and module.track_running_stats and tracked is not None:
            tracked.add_(1)
            if module.momentum is None:
                momentum = 1.0 / float(tracked)
        kept = not module.training or module.track_running_stats
        running = (module.running_mean, module.running_var) if kept else (None, None)
        return F.batch_norm(x, *running, None, None, batch, momentum, module.eps)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        out = x * weight.to(x.dtype).view(-1, 1, 1)
        return out if bias is None else out + bias.to(x.dtype).view(-1, 1, 1)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return g * weight.to(g.dtype).view(-1, 1, 1)

    def parameter_gradients(  # noqa: D102
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return (x * g).sum((0, 2, 3)), self.bias_gradient(g) if bias else None

    def bias_gradient(self, g: Tensor) -> Tensor:  # noqa: D102
        return g.sum((0, 2, 3))

    def input_features(self, x: Tensor) -> int:  # noqa: D102
        return 1

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        a, g = (part.flatten(2).transpose(0, 1).unsqueeze(-1) for part in (x, g))
        return a, g

    def to_canonical(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.view(-1, 1, 1)


def _padding_sides(module: nn.Conv2d) -> list[tuple[int, int]]:
    """Reads the padding of height and width.

    Returns:
        Padding before and after, for each.
    """
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]

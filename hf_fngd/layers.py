"""One small adapter per layer type: canonical layout in, weight gradient out.

Canonical layout of a layer's input `a` and output gradient `g`, used by every tensor function of
the package: `[G, N, T, d]` with G channel groups (1 but for grouped convolutions), N samples,
T positions that share the weight (tokens, or output pixels of a convolution; 1 for a plain MLP
layer) and d features. The per-sample gradient of group i is Σ_t g[i, n, t] a[i, n, t]ᵀ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearAdapter:
    """`torch.nn.Linear`: weight `[d_out, d_in]`, input `[N, *, d_in]`."""

    feature_dim = -1

    def __init__(self, module: nn.Module) -> None:
        self.has_bias = getattr(module, "bias", None) is not None

    def positions(self, g: Tensor) -> int:
        """Counts the positions of a sample.

        Args:
            g: Output gradient of the layer.

        Returns:
            T.
        """
        return g.numel() // (g.shape[0] * g.shape[self.feature_dim])

    def prepare(self, x: Tensor) -> Tensor:
        """Applies what must precede the weighted operation (padding of convolutions).

        Args:
            x: Layer input.

        Returns:
            The input of the weighted operation.
        """
        return x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the layer output exactly as the module does.

        Args:
            x: Layer input `[N, *, d_in]`.
            weight: Weight in the module's layout.
            bias: Bias `[d_out]` or None.

        Returns:
            Layer output `[N, *, d_out]`.
        """
        return F.linear(x, weight, bias)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Propagates the output gradient to the input.

        Args:
            g: Output gradient.
            x: Layer input.
            weight: Weight in the module's layout.

        Returns:
            Gradient with the shape of `x`.
        """
        if x.dim() == 2 and x.stride() == (1, x.shape[0]):
            # As autograd does for a column-major input; the other order differs in the last bit.
            return weight.t().mm(g.t()).t()
        return g.matmul(weight)

    def parameter_gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums outer products of output gradient and input over samples and positions.

        Args:
            g: Output gradient, weighted by `scale_rows`.
            x: Layer input.
            weight: Weight in the module's layout.
            bias: Whether the bias gradient is wanted.

        Returns:
            Gradient in the weight's layout, and the bias gradient `[d_out]` or None.
        """
        return _rows(g).t().mm(_rows(x)), self.bias_gradient(g) if bias else None

    def bias_gradient(self, g: Tensor) -> Tensor:
        """Sums the output gradient over samples and positions.

        Args:
            g: Output gradient.

        Returns:
            Gradient `[d_out]`.
        """
        return _rows(g).sum(0)

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Brings input and output gradient into the canonical layout.

        Args:
            x: Layer input.
            g: Output gradient.

        Returns:
            `a` as `[G, N, T, d_in]` and `g` as `[G, N, T, d_out]`.
        """
        n = x.shape[0]
        return x.reshape(1, n, -1, x.shape[-1]), g.reshape(1, n, -1, g.shape[-1])

    def from_canonical(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Brings a gradient `[G, d_out, d_in]` into the weight's layout.

        Args:
            matrix: Canonical gradient.
            weight: The weight it belongs to.

        Returns:
            Gradient with the shape of `weight`.
        """
        return matrix.reshape(weight.shape)

    def scale_rows(self, g: Tensor, gamma: Tensor) -> Tensor:
        """Multiplies an output gradient by one weight per sample, or per sample and position.

        Args:
            g: Output gradient of the layer.
            gamma: Weights `[N]` or `[N, T]`.

        Returns:
            The weighted gradient, in the shape and dtype of `g`.
        """
        gamma = gamma.to(g.dtype)
        shape = g.shape[:-1] if gamma.dim() == 2 else (g.shape[0], *[1] * (g.dim() - 2))
        return g * gamma.reshape(*shape, 1)


class Conv1DAdapter(LinearAdapter):
    """GPT-2's `Conv1D`, a linear layer with weight `[d_in, d_out]`."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        assert bias is not None
        return torch.addmm(bias, _rows(x), weight).view(*x.shape[:-1], weight.shape[1])

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return g.matmul(weight.t())

    def parameter_gradients(  # noqa: D102
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        return _rows(x).t().mm(_rows(g)), self.bias_gradient(g) if bias else None

    def from_canonical(self, matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return matrix[0].t()


class Conv2dAdapter(LinearAdapter):
    """`torch.nn.Conv2d` with groups, stride, dilation and every padding mode.

    Padding that the operator itself cannot do (other modes than zeros, an odd `same`) is applied
    beforehand, where autograd takes care of it.
    """

    feature_dim = 1

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

    def bias_gradient(self, g: Tensor) -> Tensor:  # noqa: D102
        return g.sum((0, 2, 3))

    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        patches = F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
        a, g = (
            part.reshape(len(part), self.groups, -1, part.shape[-1]).permute(1, 0, 3, 2)
            for part in (patches, g.flatten(2))
        )
        return a, g

    def scale_rows(self, g: Tensor, gamma: Tensor) -> Tensor:  # noqa: D102
        shape = (*g.shape[2:],) if gamma.dim() == 2 else (1, 1)
        return g * gamma.to(g.dtype).reshape(len(g), 1, *shape)


def adapter_for(module: nn.Module, kind: type) -> LinearAdapter | None:
    """Gives the adapter of a module whose forward is known exactly.

    Args:
        module: Any module.
        kind: Its type, without capture. Subclasses of the known types are not accepted, since
            their forward may compute something else (quantised layers,
            `torch.nn.MultiheadAttention.out_proj`).

    Returns:
        The adapter, or None where the type is not supported.
    """
    if kind is nn.Linear:
        return LinearAdapter(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return Conv2dAdapter(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return Conv1DAdapter(module)
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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

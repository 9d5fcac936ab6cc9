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
    # Whether positions may be padding, which has no gradient and is no observation.
    may_pad = True
    # Whether autocast runs the operation in low precision.
    autocast = True

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

    def weighted_gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, input_needed: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gives all gradients of a call, those of the parameters weighted.

        Args:
            g: Output gradient.
            x: Layer input.
            weight: Weight in the module's layout.
            gamma: As in `scale_rows`.
            input_needed: Whether the input's gradient is wanted.
            bias: Whether the bias gradient is wanted.

        Returns:
            Gradients of input (or None), weight and bias (or None).
        """
        grad_x = self.input_gradient(g, x, weight) if input_needed else None
        # A weight may go to either side of the product; the bias sees one of them alone.
        if not bias and x.shape[self.feature_dim] < g.shape[self.feature_dim]:
            x = self.scale_rows(x, gamma)
        else:
            g = self.scale_rows(g, gamma)
        return grad_x, *self.parameter_gradients(g, x, weight, bias)

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

    def input_features(self, x: Tensor) -> int:
        """Counts the features that `pick_inputs` chooses from.

        Args:
            x: Layer input.

        Returns:
            Input features; of a convolution the channels of one group.
        """
        return x.shape[self.feature_dim]

    def pick_inputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Keeps some input features.

        Args:
            x: Layer input.
            chosen: Numbers of the features, in every group of channels the same.

        Returns:
            Input of `canonical` with these features alone.
        """
        return x[..., chosen]

    def to_canonical(self, gradient: Tensor) -> Tensor:
        """Brings a weight gradient into the canonical layout.

        Args:
            gradient: Gradient with the shape of the weight.

        Returns:
            Gradient as `[G, d_out, d_in]`.
        """
        return gradient.unsqueeze(0)

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
            g: Output gradient of the layer, or what else has its samples and positions.
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

    def to_canonical(self, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.t().unsqueeze(0)

    def from_canonical(self, matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return matrix[0].t()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

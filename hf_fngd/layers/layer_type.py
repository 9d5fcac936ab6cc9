"""What the package asks of a layer type.

Canonical layout of a layer's input `a` and output gradient `g`, used by every tensor function of
the package: `[G, N, T, d]` with G channel groups (1 except for grouped convolutions), N samples,
T positions that share the weight (tokens, or output pixels of a convolution; 1 for a plain MLP
layer) and d features. The per-sample gradient of group i is Σ_t g[i, n, t] a[i, n, t]ᵀ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class LayerType(ABC):
    """Forward and gradients of one module; it keeps no reference to the module.

    Args:
        module: A module of this type.
    """

    # Dimension of the features in inputs and outputs.
    feature_dim = -1
    # Dimensions of an input with samples; one with fewer has no batch, and is left alone.
    batched_dim = 2
    # Whether positions may be padding, which has no gradient and is not an observation.
    may_pad = True

    def __init__(self, module: nn.Module) -> None:  # noqa: B027
        """Read the module's options; by default there are none."""

    def prepare(self, x: Tensor) -> Tensor:
        """Apply what autograd may differentiate before the weight comes in (padding of images).

        Args:
            x: Input of the module.

        Returns:
            Input `x` of all other functions.
        """
        return x

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the output, bit for bit as the module does.

        Args:
            x: Layer input.
            weight: Weight in the module's layout.
            bias: Bias `[d_out]` or None.

        Returns:
            Layer output.
        """

    @abstractmethod
    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Propagate the output gradient `g` to the input; the result has the shape of `x`."""

    @abstractmethod
    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sum outer products of output gradient and input over samples and positions.

        Args:
            g: Output gradient, weighted or not.
            x: Layer input.
            weight: Weight in the module's layout.
            bias: Whether the bias gradient is wanted.

        Returns:
            Gradient in the weight's layout, and the bias gradient `[d_out]` or None.
        """

    @abstractmethod
    def bias_gradient(self, g: Tensor) -> Tensor:
        """Sum the output gradient over samples and positions to `[d_out]`."""

    def weighted_gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, gamma: Tensor, input_needed: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Compute all gradients of a call, with the parameters' gradients weighted.

        Args:
            g: Output gradient.
            x: Layer input.
            weight: Weight in the module's layout.
            gamma: Weights as in `scale`.
            input_needed: Whether the input's gradient is wanted.
            bias: Whether the bias gradient is wanted.

        Returns:
            Gradients of input (or None), weight and bias (or None).
        """
        grad_x = self.input_gradient(g, x, weight) if input_needed else None
        # A weight may go to either side of the product; the bias sees only one of them.
        if not bias and x.shape[self.feature_dim] < g.shape[self.feature_dim]:
            x = self.scale(x, gamma)
        else:
            g = self.scale(g, gamma)
        return grad_x, *self.gradients(g, x, weight, bias)

    @abstractmethod
    def canonical(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Bring input and output gradient into the canonical layout.

        Args:
            x: Layer input.
            g: Output gradient.

        Returns:
            `a` as `[G, N, T, d_in]` and `g` as `[G, N, T, d_out]`.
        """

    @abstractmethod
    def to_canonical(self, gradient: Tensor) -> Tensor:
        """Bring a gradient with the weight's shape into `[G, d_out, d_in]`."""

    def from_canonical(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Bring a gradient `[G, d_out, d_in]` into the layout of `weight`."""
        return matrix.reshape(weight.shape)

    @abstractmethod
    def scale(self, g: Tensor, gamma: Tensor) -> Tensor:
        """Multiply each sample, or each position of each sample, by its weight.

        Args:
            g: Output gradient, or anything else with samples and positions.
            gamma: Weights `[N]` or `[N, T]`.

        Returns:
            Tensor with the shape and dtype of `g`.
        """

    def positions(self, g: Tensor) -> int:
        """Return T, the number of positions of each sample, from an output gradient."""
        return g.numel() // (g.shape[0] * g.shape[self.feature_dim])


def original_type(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without capture."""
    return getattr(type(module), "_fngd_original", type(module))

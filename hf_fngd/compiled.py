"""A selected layer inside a graph of `torch.compile`.

Dynamo traces the layer and the gradient of its input. The gradient of its parameters, which needs
the batch with its coefficients or its Gram matrix, is one opaque operator in the backward graph.
What changes from batch to batch reaches it as numbers in tensors, so that nothing is compiled anew:
which layer, and which announced batch.

Calls of one forward cannot meet here as they do in the gate of `capture`: where coefficients are
computed, each is by itself. A module that turns out to have several leaves the graph from the next
step on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_fngd.calls import Call, to_autocast
from hf_fngd.layers import LinearAdapter


class GraphLayer(Protocol):
    """What a compiled graph needs of a preconditioner's side of one layer."""

    def deliver(self, ticket: int, call: Call, bias: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gives the weight and bias gradients of one call of an announced batch."""


_layers: MutableMapping[int, GraphLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: GraphLayer) -> Tensor:
    """Makes a layer known to compiled graphs, for as long as it lives.

    Args:
        layer: Preconditioner's side of the layer.

    Returns:
        The layer's number, a scalar on the CPU.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


# CUDA graphs would replay the coefficients of one batch for ever.
@torch.library.custom_op(
    "hf_fngd::parameter_gradients", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe]
)
def parameter_gradients(
    layer: Tensor,
    ticket: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Computes the weighted gradients of a layer's parameters for one call.

    Args:
        layer: Number from `register`.
        ticket: Number of the batch, 0 if nobody announced it.
        g: Output gradient.
        x: Layer input.
        weight: Weight as the call saw it, under autocast in low precision.
        bias: The same of the bias, None where its gradient is not wanted.
        dtype: Of the parameters.

    Returns:
        Weight gradient, and bias gradient if wanted.
    """
    grads = _layers[int(layer)].deliver(int(ticket), (x, g, weight), bias is not None)
    return [grad.to(dtype).contiguous() for grad in grads if grad is not None]


@parameter_gradients.register_fake
def _(
    layer: Tensor,
    ticket: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    parameters = [weight] if bias is None else [weight, bias]
    return [p.new_empty(p.shape, dtype=dtype) for p in parameters]


class _CompiledLayer(torch.autograd.Function):
    """The layer; the parameters' part of its backward is the opaque operator."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Tensor,
        ticket: Tensor,
        adapter: LinearAdapter,
    ) -> Tensor:
        ctx.adapter, ctx.x_dtype, ctx.dtype = adapter, x.dtype, weight.dtype
        x, weight, bias = to_autocast(adapter, x, weight, bias)
        ctx.save_for_backward(x, weight, bias, layer, ticket)
        return adapter.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, bias, layer, ticket = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.adapter.input_gradient(g, x, weight).to(ctx.x_dtype)
        wanted = bias if ctx.needs_input_grad[2] else None
        grads = parameter_gradients(layer, ticket, g, x, weight, wanted, ctx.dtype)
        return grad_x, grads[0], grads[1] if len(grads) > 1 else None, None, None, None


def run_in_graph(
    module: nn.Module, adapter: LinearAdapter, numbers: tuple[Tensor, Tensor], x: Tensor
) -> Tensor:
    """Runs a selected layer where Dynamo traces it.

    Args:
        module: The selected module.
        adapter: Adapter of its type.
        numbers: Of the layer and of the batch.
        x: Its input.

    Returns:
        Its output.
    """
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    return _CompiledLayer.apply(adapter.prepare(x), weight, bias, *numbers, adapter)

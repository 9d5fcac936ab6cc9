"""A captured layer inside a graph of `torch.compile`.

Dynamo traces the layer and the gradient of its input. The gradient of its parameters, which needs
the batch with its coefficients or its Gram matrix, is one opaque operator in the backward graph.
Which layer and which batch it belongs to reach the operator as numbers in tensors, so that nothing
is compiled anew from batch to batch.

Calls of one forward pass cannot meet here as they do in the gate of `hook`: in a fresh batch, each
is by itself. A module that turns out to have several leaves the graph from the next step on.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.capture.batches import backward_pass
from hf_fngd.capture.layer_method import LayerMethod
from hf_fngd.capture.watch import watch
from hf_fngd.layers.calls import Call, to_autocast, without_autocast
from hf_fngd.layers.layer_type import LayerType

_layers: MutableMapping[int, LayerMethod] = weakref.WeakValueDictionary()
# Backward pass and batch of each layer's last call.
_last_calls: MutableMapping[LayerMethod, tuple[int, int]] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def register(layer: LayerMethod) -> Tensor:
    """Make a layer known to compiled graphs, for as long as it lives.

    Args:
        layer: The method's part for the layer.

    Returns:
        The layer's key, a scalar on the CPU.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


# CUDA graphs would replay the coefficients of one batch for ever.
@torch.library.custom_op(
    "hf_fngd::parameter_gradients", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe]
)
def parameter_gradients(
    layer: Tensor,
    batch: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Compute the gradients of a layer's parameters for one call.

    Args:
        layer: Key from `register`.
        batch: Key of the batch, 0 if it was not announced.
        g: Output gradient.
        x: Layer input.
        weight: Weight as the call saw it, under autocast in low precision.
        bias: Likewise for the bias, None where its gradient is not wanted.
        dtype: Dtype of the parameters.

    Returns:
        Weight gradient, and bias gradient if wanted.
    """
    call = Call(x, g, weight)
    grads = _gradients(_layers[int(layer)], int(batch), call, bias is not None, dtype)
    return [grad.to(dtype).contiguous() for grad in grads if grad is not None]


def _gradients(
    layer: LayerMethod, key: int, call: Call, bias: bool, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    x, g, weight = call
    batch = None
    if layer.optimizer is not None:
        batch = layer.batches.of_graph(layer, key, x.shape[0])
        # A compiled model is not asked (`order`): the first dimension is taken for the batch.
        layer.rows_are_sure = True
    if batch is None or not layer.takes(batch, [call]):
        return layer.kind.gradients(g, x, weight, bias)
    if not batch.fresh:
        layer.weighted_alone = backward_pass()
        gamma = layer.weights(batch, call)
        return layer.kind.weighted_gradients(g, x, weight, gamma, False, bias)[1:]
    present = (backward_pass(), key)
    if _last_calls.get(layer) == present:
        layer.batches.to_gate.append(layer)
        layer.batches.warn_once(
            layer.name,
            "is called several times by a compiled model: in this batch each call has its own "
            "coefficients; from the next step on the graph breaks there, and all calls share them",
        )
    _last_calls[layer] = present
    grads: tuple[Tensor | None, ...]
    with without_autocast(x.device):
        grads = layer.gradients(batch, [call], bias)
    grads = tuple(None if grad is None else grad.to(dtype).contiguous() for grad in grads)
    watch(layer, [call], grads)
    return grads


@parameter_gradients.register_fake
def _(
    layer: Tensor,
    batch: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    parameters = [weight] if bias is None else [weight, bias]
    return [p.new_empty(p.shape, dtype=dtype) for p in parameters]


class _CompiledCall(torch.autograd.Function):
    """One call of the layer; the parameters' part of its backward is the opaque operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Tensor,
        batch: Tensor,
        kind: LayerType,
    ) -> Tensor:
        ctx.kind, ctx.x_dtype, ctx.dtype = kind, x.dtype, weight.dtype
        x, weight, bias = to_autocast(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, layer, batch)
        return kind.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, layer, batch = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.kind.input_gradient(g, x, weight).to(ctx.x_dtype)
        wanted = bias if ctx.needs_input_grad[2] else None
        grads = parameter_gradients(layer, batch, g, x, weight, wanted, ctx.dtype)
        return grad_x, grads[0], grads[1] if len(grads) > 1 else None, None, None, None


def run_in_graph(
    module: nn.Module, kind: LayerType, layer: Tensor, batch: Tensor, x: Tensor
) -> Tensor:
    """Run a captured layer where Dynamo traces it.

    Args:
        module: The captured module.
        kind: Its type.
        layer: Key of the layer.
        batch: Key of the batch.
        x: Its input.

    Returns:
        Its output.
    """
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    return _CompiledCall.apply(kind.prepare(x), weight, bias, layer, batch, kind)

"""The calls of a layer within one forward: brought together, and their gradients added up."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.layers import LinearAdapter
from hf_fngd.packing import unpack

_LOW_PRECISION = (torch.float16, torch.bfloat16)
# Input, output gradient and weight (as the call saw it, under autocast in low precision).
Call = tuple[Tensor, Tensor, Tensor]


def to_autocast(
    adapter: LinearAdapter, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Brings the operands of a layer into the precision that autocast would run it in.

    Args:
        adapter: Adapter of the layer's type.
        x: Layer input.
        weight: Weight.
        bias: Bias or None.

    Returns:
        The three, the same tensors where autocast is off or does not concern the layer.
    """
    kind = x.device.type
    if not (adapter.autocast and torch.is_autocast_enabled(kind)) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def gather_calls(
    adapter: LinearAdapter,
    calls: Sequence[Call],
    lengths: Sequence[int] | None = None,
    inputs: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Brings all calls of one forward into the canonical layout.

    Args:
        adapter: Adapter of the layer's type.
        calls: Input, output gradient and weight of every call.
        lengths: Positions of each sample, where a call's one row holds them all.
        inputs: Numbers of the input features to keep, as in `pick_inputs`, scaled so that inner
            products stay the same in the mean over draws; default: all.
        dtype: Precision of the result; default: as it is, but for float16 and bfloat16, which
            become float32.

    Returns:
        `a` as `[G, N, T, d_in]` and `g` as `[G, N, T, d_out]`, positions of all calls in a row.
    """
    if dtype is None:
        given = calls[0][0].dtype
        dtype = torch.float32 if given in _LOW_PRECISION else given
    # Before the layout, in which the patches of a convolution overlap.
    parts = [
        adapter.canonical(_some_inputs(adapter, x, inputs).to(dtype), g.to(dtype))
        for x, g, _ in calls
    ]
    if lengths is not None:
        parts = [(unpack(a, lengths), unpack(g, lengths)) for a, g in parts]
    a, g = (torch.cat(p, 2) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
    return a, g


def _some_inputs(adapter: LinearAdapter, x: Tensor, inputs: Tensor | None) -> Tensor:
    if inputs is None:
        return x
    return adapter.pick_inputs(x, inputs) * (adapter.input_features(x) / len(inputs)) ** 0.5


def sum_gradients(
    adapter: LinearAdapter, calls: Sequence[Call], bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Adds up the plain parameter gradients of all calls of one forward.

    Args:
        adapter: Adapter of the layer's type.
        calls: Input, output gradient (weighted or not) and weight of every call.
        bias: Whether the bias gradient is wanted.

    Returns:
        Weight gradient in the weight's layout, and the bias gradient or None.
    """
    grads = [adapter.parameter_gradients(g, x, weight, bias) for x, g, weight in calls]
    weights, biases = zip(*grads, strict=True)
    total = functools.partial(functools.reduce, torch.add)
    return total(weights), total(biases) if bias else None

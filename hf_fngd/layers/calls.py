"""The calls of a layer within one forward pass, and rows that hold several samples."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fngd.errors import FNGDError
from hf_fngd.layers.layer_type import LayerType

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """One call of a layer, as its backward pass sees it.

    Attributes:
        x: Layer input, after `LayerType.prepare`.
        g: Output gradient.
        weight: Weight as the call saw it, under autocast in low precision.
    """

    x: Tensor
    g: Tensor
    weight: Tensor


def to_autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring the operands of a layer into the precision in which autocast would run it.

    Args:
        x: Layer input.
        weight: Weight.
        bias: Bias or None.

    Returns:
        The three; the same tensors where autocast is off or the input is in float64.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    if x.dtype != dtype:
        x = x.to(dtype)
    return x, weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast is off on a device."""
    # Entering torch.autocast takes as long as a few operators, and backward rarely runs in it.
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def gather_calls(
    kind: LayerType,
    calls: Sequence[Call],
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Bring all calls of one forward pass into the canonical layout.

    Args:
        kind: The layer's type.
        calls: Its calls.
        lengths: Positions of each sample, where a call's one row holds them all.
        dtype: Precision of the result; default: as it is, with float32 for float16 and bfloat16.

    Returns:
        `a` as `[G, N, T, d_in]` and `g` as `[G, N, T, d_out]`, with the positions of all calls.
    """
    if dtype is None:
        given = calls[0].x.dtype
        dtype = torch.float32 if given in _LOW_PRECISION else given
    # Converted before the layout, in which the patches of a convolution overlap.
    parts = [
        kind.canonical(*(one if one.dtype == dtype else one.to(dtype) for one in call[:2]))
        for call in calls
    ]
    if lengths is not None:
        parts = [(unpack(a, lengths), unpack(g, lengths)) for a, g in parts]
    a, g = (torch.cat(p, 2) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
    return a, g


def sum_gradients(
    kind: LayerType, calls: Sequence[Call], bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Add up the plain parameter gradients of all calls of one forward pass.

    Args:
        kind: The layer's type.
        calls: Its calls, with output gradients weighted or not.
        bias: Whether the bias gradient is wanted.

    Returns:
        Weight gradient in the weight's layout, and the bias gradient or None.
    """
    grads = [kind.gradients(g, x, weight, bias) for x, g, weight in calls]
    if len(grads) == 1:
        return grads[0]
    weights, biases = zip(*grads, strict=True)
    total = functools.partial(functools.reduce, torch.add)
    return total(weights), total(biases) if bias else None


# ---- packed rows: one row `[1, T, d]` holds several samples, one after the other --------------


def check_row(name: str, positions: int, lengths: Sequence[int] | None) -> None:
    """Refuse a layer that does not see every position of a packed row.

    Args:
        name: Path of the layer.
        positions: Positions that it sees.
        lengths: Positions of each sample, None where rows are not packed.

    Raises:
        FNGDError: If the numbers differ.
    """
    if lengths is not None and positions != sum(lengths):
        raise FNGDError(
            f"{name} sees {positions} positions of a packed row of {sum(lengths)}: exclude the "
            "layer, or turn packing off"
        )


def unpack(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Give every sample of a packed row its own row, filled up with zeros.

    Zeros add nothing to a sample's gradient.

    Args:
        values: Inputs or output gradients in the canonical layout, `[G, 1, T, d]`.
        lengths: Positions of each sample, T together.

    Returns:
        Tensor `[G, N, max(lengths), d]`.
    """
    longest = max(lengths)
    parts = values.squeeze(1).split(list(lengths), dim=1)
    return torch.stack([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in parts], 1)


def spread(gamma: Tensor, lengths: Sequence[int]) -> Tensor:
    """Give every position of a packed row its sample's coefficient.

    Args:
        gamma: γ `[N]`.
        lengths: Positions of each sample, T together.

    Returns:
        γ `[1, T]`.
    """
    repeats = torch.tensor(lengths).to(gamma.device, non_blocking=True)
    return gamma.repeat_interleave(repeats, output_size=sum(lengths)).unsqueeze(0)

"""Layers whose weight gradient the package can take apart, and which of a model's layers it takes.

One class a layer type says how to get from a layer's input and output gradient to its weight
gradient. Read `layer_type` first: it has the layout `[G, N, T, d]` that every tensor function of
the package uses. To support another type, derive `LayerType` and add a line to `TYPES`.
"""

from __future__ import annotations

from torch import nn

from hf_fngd.layers.conv import Conv2d
from hf_fngd.layers.layer_type import LayerType, original_type
from hf_fngd.layers.linear import Conv1D, Linear

# By exact class, or by its full name where the class lies in a package that need not be there. A
# subclass is another type: its forward may compute something else (quantised layers,
# `torch.nn.MultiheadAttention.out_proj`).
TYPES: dict[type[nn.Module] | str, type[LayerType]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    "transformers.pytorch_utils.Conv1D": Conv1D,
}


def type_of(module: nn.Module) -> LayerType | None:
    """Return how a module's gradients are taken apart, or None if its type is not in `TYPES`."""
    kind = original_type(module)
    found = TYPES.get(kind) or TYPES.get(f"{kind.__module__}.{kind.__qualname__}")
    return found(module) if found is not None else None


def type_names() -> list[str]:
    """Return the names of the supported module classes."""
    return [key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in TYPES]

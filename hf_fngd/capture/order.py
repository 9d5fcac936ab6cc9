"""Which dimension is the batch, where a batch has as many positions as samples.

The shapes do not show it. So the model runs twice more on that one batch, without gradients and in
evaluation mode, the second time with its samples in another order: rows of a layer's input that
change places in the same way are samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.capture.layer_method import LayerMethod

_PLAIN = (str, bytes, bool, int, float, type(None))


def find_order(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    size: int | None,
    captured: Iterable[tuple[nn.Module, LayerMethod]],
) -> None:
    """Decide for layers whether the first dimension of their input is the batch.

    Nothing is decided where the model cannot be run like this, or where the rows of the batch are
    too much alike.

    Args:
        model: The model.
        args: Positional arguments of its forward pass.
        kwargs: Keyword arguments of its forward pass.
        size: Number of samples N, if it has been announced.
        captured: Layers, each with its method.
    """
    inputs = [*_leaves((args, dict(kwargs)))]
    square = [len(x) for x in inputs if isinstance(x, Tensor) and _is_square(x)]
    size = size or next(iter(square), 0)
    known = all(isinstance(x, (Tensor, *_PLAIN)) for x in inputs)
    if size < 2 or size not in square or not known or any(map(_is_compiled, model.modules())):
        return
    captured = list(captured)
    seen: dict[LayerMethod, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, layer=layer: seen.setdefault(layer, []).append(given[0].detach())
        )
        for module, layer in captured
    ]
    found = []
    # What is wrong with the inputs shows in the forward pass proper.
    with contextlib.suppress(Exception):
        for shift in (0, 1):
            moved_args, moved_kwargs = _moved((args, dict(kwargs)), size, shift)
            with _as_evaluation(model):
                model.forward(*moved_args, **moved_kwargs)
            found.append(dict(seen))
            seen.clear()
    for hook in hooks:
        hook.remove()
    if len(found) < 2:
        return
    for _, layer in captured:
        pairs = list(zip(found[0].get(layer, []), found[1].get(layer, []), strict=False))
        rows, columns = ([_follows(*pair, dim) for pair in pairs] for dim in (0, 1))
        if pairs and all(rows) and not any(columns):
            layer.rows_are_sure = True
        elif pairs and all(columns) and not any(rows):
            layer.leave_out("its second dimension is the batch, and not its first")


def _is_square(x: Tensor) -> bool:
    return x.dim() > 1 and x.shape[0] == x.shape[1]


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if not isinstance(values, (list, tuple)):
        yield values
        return
    for value in values:
        yield from _leaves(value)


def _moved(values: Any, size: int, shift: int) -> Any:
    """Copy inputs, with their rows moved."""
    if isinstance(values, Mapping):
        return {name: _moved(value, size, shift) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return tuple(_moved(value, size, shift) for value in values)
    if isinstance(values, Tensor):
        has_rows = values.dim() > 0 and len(values) == size
        return values.roll(shift, 0) if has_rows else values.clone()
    return values


@contextlib.contextmanager
def _as_evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([*devices]), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _follows(first: Tensor, second: Tensor, dim: int) -> bool:
    """Return whether a layer's input moved along a dimension as the samples did."""
    if first.shape != second.shape or first.dim() <= dim:
        return False
    first, second = first.float(), second.float()
    return float((first.roll(1, dim) - second).norm()) <= 1e-2 * float(first.norm())

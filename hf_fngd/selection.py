"""Which layers are preconditioned; every layer left out has a reason that can be printed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from hf_fngd.capture import original_type
from hf_fngd.errors import FNGDError
from hf_fngd.image_layers import BatchNormAdapter, Conv2dAdapter
from hf_fngd.layers import Conv1DAdapter, LinearAdapter

Target = str | Sequence[str] | None
_SUPPORTED = "Linear, Conv1D and Conv2d"


@dataclass
class Selection:
    """The chosen layers and, for all others that hold parameters, why they were left out.

    Attributes:
        chosen: Module and adapter by path, in model order.
        left_out: Type and reason by path, in model order.
    """

    chosen: dict[str, tuple[nn.Module, LinearAdapter]] = field(default_factory=dict)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Gives the table behind `str()`.

        Returns:
            Path, type, weight shape and `chosen` or the reason, a row a layer.
        """
        rows = [
            (
                path,
                original_type(m).__name__,
                "x".join(str(n) for n in m.get_parameter("weight").shape),
                "chosen",
            )
            for path, (m, _) in self.chosen.items()
        ]
        rows += [
            (path, kind, "", f"left out: {why}") for path, (kind, why) in self.left_out.items()
        ]
        return rows

    def __str__(self) -> str:
        return layer_table(self.rows())


def layer_table(rows: Iterable[Sequence[str]]) -> str:
    """Lays the rows of a selection out for people.

    Args:
        rows: What `Selection.rows` gives.

    Returns:
        Lines with aligned columns.
    """
    table = [("layer", "type", "weight", "decision"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = (
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in table
    )
    return "\n".join(lines)


def select_layers(
    model: nn.Module, target: Target = None, exclude: Target = None, *, batch_norm: bool = False
) -> Selection:
    """Chooses the layers to precondition.

    Args:
        model: Any model; `get_output_embeddings` is asked for the vocabulary head if it exists.
        target: None (all supported layers), `all-linear` (as in PEFT: all but convolutions), a
            regular expression that must match the whole path, or a list. A list entry matches
            a path that it equals or is a dotted part of, or that it matches as a whole as a regular
            expression; an entry that matches nothing so is looked for inside the paths.
        exclude: Layers to leave out, written the same way.
        batch_norm: Whether BatchNorm2d layers can be chosen.

    Returns:
        The selection. Frozen weights, weights with several owners, the vocabulary head, modules
        below one called `experts` and modules of unknown types are never chosen.

    Raises:
        FNGDError: If nothing matches.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    modules = {
        path: m
        for path, m in model.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    head = _vocabulary_head(model)
    wanted = set(modules) if target is None else _matches("target_modules", target, modules)
    unwanted = set() if exclude is None else _matches("exclude_modules", exclude, modules)
    selection = Selection()
    for path, module in modules.items():
        reason, adapter = (
            _reason(path, module, owners, head, batch_norm),
            adapter_for(module, original_type(module), batch_norm=batch_norm),
        )
        if reason is None and path not in wanted:
            reason = "not in target_modules"
        if reason is None and target in ("all-linear", "all_linear"):
            reason = (
                None
                if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
                else "not a linear layer"
            )
        if reason is None and path in unwanted:
            reason = "in exclude_modules"
        if reason is None and adapter is not None:
            selection.chosen[path] = (module, adapter)
        else:
            kind = original_type(module).__name__
            selection.left_out[path] = (kind, reason or f"not one of {_SUPPORTED}")
    if not selection.chosen:
        possible = [
            p for p, m in modules.items() if _reason(p, m, owners, head, batch_norm) is None
        ]
        names = sorted({path.rpartition(".")[2] for path in possible})
        hint = (
            f"names that can be chosen: {', '.join(names)}"
            if names
            else f"the model has none: each must be one of {_SUPPORTED}, and train"
        )
        raise FNGDError(
            f"no layer matches target_modules={target!r} exclude_modules={exclude!r}; {hint}"
        )
    return selection


def adapter_for(module: nn.Module, kind: type, *, batch_norm: bool = False) -> LinearAdapter | None:
    """Gives the adapter of a module whose forward is known exactly.

    Args:
        module: Any module.
        kind: Its type, without capture. Subclasses of the known types are not accepted, since
            their forward may compute something else (quantised layers,
            `torch.nn.MultiheadAttention.out_proj`).
        batch_norm: Whether `torch.nn.BatchNorm2d` is supported too.

    Returns:
        The adapter, or None where the type is not supported.
    """
    if kind is nn.Linear:
        return LinearAdapter(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return Conv2dAdapter(module)
    if batch_norm and isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d:
        return BatchNormAdapter(module)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return Conv1DAdapter(module)
    return None


def _reason(
    path: str,
    module: nn.Module,
    owners: dict[int, list[str]],
    head: nn.Module | None,
    batch_norm: bool,
) -> str | None:
    """Says why a module can never be chosen.

    Returns:
        The reason, or None if it can be chosen.
    """
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = getattr(module, "weight", None)
    shared = [p for p in owners.get(id(weight), []) if p != path]
    if module is head:
        return "vocabulary head" + (f", tied to {shared[0]}" if shared else "")
    if adapter_for(module, original_type(module), batch_norm=batch_norm) is None:
        kind = original_type(module)
        known = [base.__name__ for base in (nn.Linear, nn.Conv2d) if issubclass(kind, base)]
        return f"a {known[0]} subclass" if known else f"not one of {_SUPPORTED}"
    if "experts" in path.split("."):
        return "expert of a mixture: its rows are routed tokens, not samples"
    if "weight" not in module._parameters:
        return "its weight is computed (pruned or parametrised)"
    if shared:
        return f"weight shared with {shared[0]}"
    if weight is None or not weight.requires_grad:
        return "frozen"
    return None


def _vocabulary_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter is not None else None
    except (AttributeError, NotImplementedError):
        return None


def _matches(setting: str, target: str | Sequence[str], modules: Iterable[str]) -> set[str]:
    if isinstance(target, str):
        if target in ("all-linear", "all_linear"):
            return set(modules)
        return {path for path in modules if _full_match(setting, target, path)}
    found: set[str] = set()
    for entry in target:
        exact = {p for p in modules if f".{entry}." in f".{p}." or _full_match(setting, entry, p)}
        found |= exact or {path for path in modules if entry in path}
    return found


def _full_match(setting: str, pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise FNGDError(
            f"{setting}: {pattern!r} is no regular expression ({error}): give one, or names of "
            "layers"
        ) from None

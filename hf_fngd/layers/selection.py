"""Which layers are preconditioned, why the others are not, and the parameter groups that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_fngd.errors import FNGDError
from hf_fngd.layers import TYPES, LayerType, original_type, type_names, type_of

Target = str | Sequence[str] | None
_ALL_LINEAR = ("all-linear", "all_linear")


@dataclass
class Selection:
    """The chosen layers and, for all others that hold parameters, why they were left out.

    Attributes:
        chosen: Module and layer type by path, in model order.
        left_out: Name of the type and reason by path, in model order.
    """

    chosen: dict[str, tuple[nn.Module, LayerType]] = field(default_factory=dict)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the chosen layers."""
        return [p for m, _ in self.chosen.values() for p in m.parameters(recurse=False)]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return path, type, weight shape, and `chosen` or the reason, for each layer."""
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
    """Lay out the rows of a selection in aligned columns.

    Args:
        rows: The result of `Selection.rows`.

    Returns:
        Lines of text.
    """
    table = [("layer", "type", "weight", "decision"), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(3)]
    lines = (
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in table
    )
    return "\n".join(lines)


def select_layers(model: nn.Module, target: Target = None, exclude: Target = None) -> Selection:
    """Choose the layers to precondition.

    Args:
        model: Any model; its `get_output_embeddings`, if there is one, names the vocabulary head.
        target: None (all supported layers), `all-linear` (as in PEFT: all except convolutions), a
            regular expression that must match the whole path, or a list. A list entry matches
            a path that it equals or is a dotted part of, or that it matches as a whole as a regular
            expression; an entry without such a match is searched for inside the paths.
        exclude: Layers to leave out, written the same way.

    Returns:
        The selection. Frozen weights, weights with several owners, the vocabulary head, modules
        below one called `experts` and modules of unknown types are never chosen.

    Raises:
        FNGDError: If nothing matches.
    """
    # A module that is reachable under several names is one owner.
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    modules = {
        path: m
        for path, m in model.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    head = _vocabulary_head(model)
    wanted = set(modules) if target is None else _matches("target_modules", target, modules)
    unwanted = set() if exclude is None else _matches("exclude_modules", exclude, modules)
    linear_only = target in _ALL_LINEAR
    selection = Selection()
    possible = []
    for path, module in modules.items():
        kind = type_of(module)
        reason = _unsuitable(path, module, kind, owners, head)
        if reason is None:
            possible.append(path)
            if path not in wanted:
                reason = "not in target_modules"
            elif linear_only and isinstance(module, nn.Conv2d):
                reason = "not a linear layer"
            elif path in unwanted:
                reason = "in exclude_modules"
        if reason is None and kind is not None:
            selection.chosen[path] = (module, kind)
        else:
            selection.left_out[path] = (original_type(module).__name__, reason or "")
    if not selection.chosen:
        names = sorted({path.rpartition(".")[2] for path in possible})
        found = [f"{path}: {why}" for path, (_, why) in selection.left_out.items()]
        hint = f"names that can be chosen: {', '.join(names)}"
        if not names:
            hint = f"none can be chosen ({'; '.join(found[:5]) or 'the model has no parameters'})"
        raise FNGDError(
            f"no layer matches target_modules={target!r} exclude_modules={exclude!r}; {hint}"
        )
    return selection


def _supported() -> str:
    *first, last = type_names()
    return f"{', '.join(first)} and {last}"


def _unsuitable(
    path: str,
    module: nn.Module,
    kind: LayerType | None,
    owners: dict[int, list[str]],
    head: nn.Module | None,
) -> str | None:
    """Return the reason why a module can never be chosen, or None if it can."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    weight = getattr(module, "weight", None)
    shared = [p for p in owners.get(id(weight), []) if p != path]
    if module is head:
        return "vocabulary head" + (f", tied to {shared[0]}" if shared else "")
    if kind is None:
        bases = [base for base in TYPES if isinstance(base, type) and isinstance(module, base)]
        return f"a {bases[0].__name__} subclass" if bases else f"not one of {_supported()}"
    if "experts" in path.split("."):
        return "expert of a mixture: its rows are routed tokens, not samples"
    if "weight" not in module._parameters:
        return "its weight is computed (pruned or parametrised)"
    if shared:
        return f"weight shared with {shared[0]}"
    if weight is None or not weight.requires_grad:
        return "frozen"
    if weight.is_complex():
        return "complex weight"
    return None


def _vocabulary_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter is not None else None
    except (AttributeError, NotImplementedError):
        return None


def _matches(setting: str, target: str | Sequence[str], modules: Iterable[str]) -> set[str]:
    if isinstance(target, str):
        if target in _ALL_LINEAR:
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
            f"{setting}: {pattern!r} is not a regular expression ({error}): give one, or names of "
            "layers"
        ) from None


# ---- parameter groups ------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide a model's trained parameters into those with and without weight decay.

    Args:
        model: The model.
        weight_decay: Decay of parameters with at least two dimensions.

    Returns:
        Two parameter groups.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def divide(
    params: Iterable[Any],
    selection: Selection,
    rule: str,
    other_lr: float | None,
    other_rule: str,
) -> list[dict[str, Any]]:
    """Divide every parameter group into the weights of selected layers and the others.

    Args:
        params: Parameters, pairs of name and parameter, or parameter groups of either.
        selection: The layers.
        rule: Update rule of their weights (Muon: of those with two dimensions or more).
        other_lr: Learning rate of the others; None: that of their group.
        other_rule: Update rule of the others.

    Returns:
        Groups, those of selected weights first, each with its `rule`.

    Raises:
        TypeError: For a single tensor, or a set.
    """
    if isinstance(params, Tensor):
        raise TypeError(
            "params must be parameters or parameter groups, not one tensor: give a list"
        )
    selected = {id(p) for p in selection.parameters() if rule != "muon" or p.dim() > 1}
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    own = {"lr": other_lr} if other_lr is not None else {}
    first, second = [], []
    for group in groups:
        members = group["params"]
        if isinstance(members, set):
            raise TypeError("parameters need an order that is always the same: give a list, no set")
        members = [members] if isinstance(members, Tensor) else list(members)
        # torch takes parameters, or pairs of name and parameter.
        chosen = [id(p[1] if isinstance(p, tuple) else p) in selected for p in members]
        mine = [p for p, one in zip(members, chosen, strict=True) if one]
        rest = [p for p, one in zip(members, chosen, strict=True) if not one]
        if mine:
            first.append({**group, "params": mine, "rule": rule})
        if rest:
            second.append({**group, **own, "params": rest, "rule": other_rule})
    return first + second

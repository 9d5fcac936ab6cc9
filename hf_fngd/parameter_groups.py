"""Which parameters an optimizer steps together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hf_fngd.selection import Selection


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divides a model's trained parameters into those with and without weight decay.

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
    params: Iterable[Any], selection: Selection, rule: str, other_lr: float | None
) -> list[dict[str, Any]]:
    """Divides every parameter group into the weights of selected layers and the others.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        selection: The layers.
        rule: Update rule of their weights (Muon: of those with two dimensions or more); the
            others have AdamW.
        other_lr: Learning rate of the others; None: that of their group.

    Returns:
        Groups, those of selected weights first, each with its `rule`.
    """
    selected = {
        id(p)
        for module, _ in selection.chosen.values()
        for p in module.parameters(recurse=False)
        if rule != "muon" or p.dim() > 1
    }
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    own = {"lr": other_lr} if other_lr is not None else {}
    first, second = [], []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        mine = [p for p in members if id(p) in selected]
        rest = [p for p in members if id(p) not in selected]
        if mine:
            first.append({**group, "params": mine, "rule": rule})
        if rest:
            second.append({**group, **own, "params": rest, "rule": "adamw"})
    return first + second

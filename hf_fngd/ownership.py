"""Whose gradients a captured model has: one optimizer's, and no other's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_fngd import capture
from hf_fngd.errors import FNGDError

# Optimizers (`LayerOptimizer`) whose layers have weighted gradients now.
_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def claim(optimizer: Any) -> None:
    """Keep the gradients of an optimizer's layers from all others."""
    _owners.add(optimizer)


def release(optimizer: Any) -> None:
    """Leave the layers of an optimizer to others."""
    _owners.discard(optimizer)


class FirstLook:
    """Hook on the model that looks at the first batch it is trained with."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None
        self.hook: Any = None

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look, and let go of the model."""
        optimizer = self.optimizer()
        if optimizer is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.hook.remove()
        batch = optimizer.batches.current
        size = None if batch is None else batch.size
        capture.find_order(model, args, kwargs, size, optimizer.captured)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model must not speak to the original's optimizer.
        return FirstLook, (None,)


def _wraps(optimizer: torch.optim.Optimizer, owner: Any) -> bool:
    """Return whether an optimizer has the owner, whose step it calls, as SAM does."""
    held = [*vars(optimizer).values()]
    held += [one for some in held if isinstance(some, (list, tuple)) for one in some]
    return any(one is owner for one in held)


def _refuse_foreign(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Keep weighted gradients from all optimizers but the one that weighted them."""
    for owner in list(_owners):
        if optimizer is owner or _wraps(optimizer, owner):
            continue
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, (module, layer) in zip(owner.layer_names, owner.captured, strict=True):
            weight, bias = layer.parameters()
            if capture.owner(module) is layer and (id(weight) in held or id(bias) in held):
                raise FNGDError(
                    f"{owner.config.title} is attached to {name} and weights its gradients, "
                    f"which are not for {type(optimizer).__name__}: call detach() of the "
                    f"{owner.config.title} optimizer, and compute the gradients anew"
                )


register_optimizer_step_pre_hook(_refuse_foreign)

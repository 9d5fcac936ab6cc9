"""The methods, all by one protocol: FNGD, KFAC, EKFAC, Eva, TENGraD, SENG, and plain rules.

A method is a file here with a config, an optimizer half (`hf_fngd.optimizer.LayerOptimizer` says
what it may define) and a layer half (`hf_fngd.capture.LayerMethod`), and a line in `METHODS`. Read
`fngd` first, or `curvature` and `preconditioned` for the methods that precondition whole gradients
at the optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_fngd.errors import FNGDError, suggestion
from hf_fngd.layers.selection import parameter_groups
from hf_fngd.methods.ekfac import EKFAC, EKFACConfig
from hf_fngd.methods.eva import Eva, EvaConfig
from hf_fngd.methods.fngd import FNGD, FNGDConfig, create_fngd_optimizer
from hf_fngd.methods.kfac import KFAC, KFACConfig
from hf_fngd.methods.plain import PlainConfig, PlainOptimizer
from hf_fngd.methods.seng import SENG, SENGConfig
from hf_fngd.methods.tengrad import TENGraD, TENGraDConfig
from hf_fngd.optimizer import LayerOptimizer

METHODS: dict[str, type[LayerOptimizer]] = {
    kind.method: kind for kind in (FNGD, KFAC, EKFAC, Eva, TENGraD, SENG, PlainOptimizer)
}
_MUON = {"update_rule": "muon"}
# Every name of `--optim`: the optimizer, and the settings that the name stands for.
OPTIMIZERS: dict[str, tuple[type[LayerOptimizer], dict[str, str]]] = {
    **{name: (kind, {}) for name, kind in METHODS.items()},
    "fngd_adamw": (FNGD, {"update_rule": "adamw"}),
    "fngd_muon": (FNGD, _MUON),
    "muon": (PlainOptimizer, _MUON),
    "muon_soap": (PlainOptimizer, {**_MUON, "update_scale": "rms", "other_rule": "soap"}),
    "soap": (PlainOptimizer, {"update_rule": "soap", "other_rule": "soap"}),
}
__all__ = [
    "EKFAC",
    "FNGD",
    "KFAC",
    "METHODS",
    "OPTIMIZERS",
    "SENG",
    "EKFACConfig",
    "Eva",
    "EvaConfig",
    "FNGDConfig",
    "KFACConfig",
    "PlainConfig",
    "PlainOptimizer",
    "SENGConfig",
    "TENGraD",
    "TENGraDConfig",
    "create_fngd_optimizer",
    "create_preconditioned_optimizer",
    "settings_of_name",
]


def settings_of_name(name: str, given: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that an optimizer's name stands for.

    Args:
        name: A name in `OPTIMIZERS`.
        given: Settings beside the name.

    Returns:
        Values by name.

    Raises:
        FNGDError: If a given setting contradicts the name.
    """
    settings = OPTIMIZERS[name][1]
    for key, value in settings.items():
        if given.get(key, value) != value:
            raise FNGDError(
                f"{name} stands for {key}={value}, and {key}={given[key]} is given: leave one out"
            )
    return settings


def create_preconditioned_optimizer(
    model: nn.Module, *, method: str, lr: float, weight_decay: float = 0.0, **config: Any
) -> LayerOptimizer:
    """Make an optimizer of any method for a model and attach it: one line of a plain loop.

        optimizer = create_preconditioned_optimizer(model, method="kfac", lr=1e-2, damping=0.1)

    Args:
        model: The model to train.
        method: Any name of `--optim`: fngd, kfac, ekfac, eva, tengrad, seng, plain (update rules
            without natural gradient), or such as muon, soap or muon_soap.
        lr: Learning rate of the selected weights, and of the others unless `other_lr` is given.
        weight_decay: Decoupled weight decay of parameters with at least two dimensions.
        **config: Fields of the method's config, as `KFACConfig`.

    Returns:
        The attached optimizer; `detach()` undoes the attachment.

    Raises:
        FNGDError: For an unknown method, bad settings, or if no layer can be selected.
    """
    if method not in OPTIMIZERS:
        raise FNGDError(f"method={method!r} is unknown: {suggestion(method, OPTIMIZERS)}")
    config |= settings_of_name(method, config)
    groups = parameter_groups(model, weight_decay)
    return OPTIMIZERS[method][0](groups, lr, module=model, **config)

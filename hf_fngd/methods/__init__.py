"""The methods, all by one protocol: FNGD, KFAC, EKFAC, Eva, TENGraD, SENG, and plain rules.

A method is a file here with a config, an optimizer half (`hf_fngd.optimizer.LayerOptimizer` says
what it may define) and a layer half (`hf_fngd.capture.LayerMethod`), and a line in `METHODS`. Read
`fngd` first, or `curvature` and `preconditioned` for the methods that precondition whole gradients
at the optimizer step.
"""

from __future__ import annotations

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
__all__ = [
    "EKFAC",
    "FNGD",
    "KFAC",
    "METHODS",
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
]


def create_preconditioned_optimizer(
    model: nn.Module, *, method: str, lr: float, weight_decay: float = 0.0, **config: Any
) -> LayerOptimizer:
    """Make an optimizer of any method for a model and attach it: one line of a plain loop.

        optimizer = create_preconditioned_optimizer(model, method="kfac", lr=1e-2, damping=0.1)

    Args:
        model: The model to train.
        method: fngd, kfac, ekfac, eva, tengrad, seng, or plain (update rules without natural
            gradient).
        lr: Learning rate of the selected weights, and of the others unless `other_lr` is given.
        weight_decay: Decoupled weight decay of parameters with at least two dimensions.
        **config: Fields of the method's config, as `KFACConfig`.

    Returns:
        The attached optimizer; `detach()` undoes the attachment.

    Raises:
        FNGDError: For an unknown method, bad settings, or if no layer can be selected.
    """
    if method not in METHODS:
        raise FNGDError(f"method={method!r} is unknown: {suggestion(method, METHODS)}")
    groups = parameter_groups(model, weight_decay)
    return METHODS[method](groups, lr, module=model, **config)

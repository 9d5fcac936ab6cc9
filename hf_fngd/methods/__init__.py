"""KFAC, Eva, TENGraD and SENG, the systems that FNGD is compared with, and plain update rules."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.methods.eva import EvaConfig, EvaLayer
from hf_fngd.methods.kfac import KFACConfig, KFACLayer
from hf_fngd.methods.optimizer import PreconditionedOptimizer
from hf_fngd.methods.plain import PlainConfig, PlainOptimizer
from hf_fngd.methods.seng import SENGConfig, SENGLayer
from hf_fngd.methods.tengrad import TENGraDConfig, TENGraDLayer
from hf_fngd.optimizer import FNGD
from hf_fngd.parameter_groups import parameter_groups


class KFAC(PreconditionedOptimizer):
    """KFAC (Martens & Grosse 2015) for the selected layers, AdamW for the rest."""

    config_class, layer_class, method = KFACConfig, KFACLayer, "kfac"


class Eva(PreconditionedOptimizer):
    """Eva (Zhang, Shi & Li 2023) for the selected layers, AdamW for the rest."""

    config_class, layer_class, method = EvaConfig, EvaLayer, "eva"


class TENGraD(PreconditionedOptimizer):
    """TENGraD (arXiv 2106.03947) for the selected layers, AdamW for the rest."""

    config_class, layer_class, method = TENGraDConfig, TENGraDLayer, "tengrad"


class SENG(PreconditionedOptimizer):
    """SENG (arXiv 2006.05924) for the selected layers, AdamW for the rest."""

    config_class, layer_class, method = SENGConfig, SENGLayer, "seng"


METHODS: dict[str, type[LayerOptimizer]] = {
    kind.method: kind for kind in (FNGD, KFAC, Eva, TENGraD, SENG, PlainOptimizer)
}
__all__ = [
    "KFAC",
    "METHODS",
    "SENG",
    "Eva",
    "EvaConfig",
    "KFACConfig",
    "PlainConfig",
    "PlainOptimizer",
    "PreconditionedOptimizer",
    "SENGConfig",
    "TENGraD",
    "TENGraDConfig",
    "create_preconditioned_optimizer",
]


def create_preconditioned_optimizer(
    model: nn.Module, *, method: str, lr: float, weight_decay: float = 0.0, **config: Any
) -> LayerOptimizer:
    """Makes an optimizer of any method for a model and attaches it: one line of a plain loop.

        optimizer = create_preconditioned_optimizer(model, method="kfac", lr=1e-2, damping=0.1)

    Args:
        model: The model to train.
        method: fngd, kfac, eva, tengrad, seng, or plain (update rules without natural gradient).
        lr: Learning rate of the selected weights, and of the others unless `other_lr` is given.
        weight_decay: Decoupled weight decay of parameters with at least two dimensions.
        **config: Fields of the method's config, as `KFACConfig`.

    Returns:
        The attached optimizer; `detach()` undoes the attachment.

    Raises:
        FNGDError: For an unknown method, bad settings, or if no layer can be selected.
    """
    if method not in METHODS:
        raise FNGDError(f"method={method!r} is unknown: choose {', '.join(METHODS)}")
    groups = parameter_groups(model, weight_decay)
    return METHODS[method](groups, lr, module=model, **config)

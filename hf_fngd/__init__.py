"""Optimizers by name for the Hugging Face Trainer and plain loops.

FNGD (arXiv 2403.03473), KFAC, EKFAC, Eva, TENGraD, SENG, and SGD, AdamW and Muon without
preconditioning. Importing the package registers the names with transformers, where it is installed;
the core needs torch only. `README.md` in this folder shows how the package is laid out.
"""

import importlib.util
import logging

from hf_fngd.errors import FNGDError
from hf_fngd.methods import (
    EKFAC,
    FNGD,
    KFAC,
    SENG,
    EKFACConfig,
    Eva,
    EvaConfig,
    FNGDConfig,
    KFACConfig,
    PlainConfig,
    PlainOptimizer,
    SENGConfig,
    TENGraD,
    TENGraDConfig,
    create_fngd_optimizer,
    create_preconditioned_optimizer,
)

__version__ = "0.1.0"
__all__ = [
    "EKFAC",
    "FNGD",
    "KFAC",
    "SENG",
    "EKFACConfig",
    "Eva",
    "EvaConfig",
    "FNGDConfig",
    "FNGDError",
    "KFACConfig",
    "PlainConfig",
    "PlainOptimizer",
    "SENGConfig",
    "TENGraD",
    "TENGraDConfig",
    "create_fngd_optimizer",
    "create_preconditioned_optimizer",
]

if importlib.util.find_spec("transformers") is not None:
    from hf_fngd.hf.averaging import AveragingCallback
    from hf_fngd.hf.callback import FNGDCallback
    from hf_fngd.hf.registry import register
    from hf_fngd.hf.trainer import FNGDMixin, FNGDSeq2SeqTrainer, FNGDTrainer

    __all__ += ["AveragingCallback", "FNGDCallback", "FNGDMixin", "FNGDSeq2SeqTrainer"]
    __all__ += ["FNGDTrainer", "register"]
    try:
        register()
    except FNGDError as error:
        # FNGDTrainer works without the names; `python -m hf_fngd` fails on them.
        logging.getLogger(__name__).warning("%s", error)

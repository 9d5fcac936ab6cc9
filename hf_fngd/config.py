"""Settings of FNGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_fngd.errors import FNGDError
from hf_fngd.settings import OptimizerConfig, damping, setting

_ROUTES = {"sample": ("auto", "direct", "hadamard"), "token": ("auto", "exact", "nystrom")}


@dataclass
class FNGDConfig(OptimizerConfig):
    """Settings of FNGD (arXiv 2403.03473), checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "FNGD"

    damping: float = damping(1.0)
    update_scale: str = setting(
        "auto",
        "none, rms (every selected weight's update gets the root mean square 0.2 of a typical "
        "AdamW update, so that AdamW learning rates carry over), or auto: rms for "
        "update_rule=sgd, none for the others. The paper: none.",
        choices=("auto", "none", "rms"),
        resumed=True,
    )
    share: str = setting(
        "sample",
        "What the coefficients of the first epoch are kept for: sample (each data set row), label "
        "(each class or token id), position (each place in the batch), layer (one number a layer) "
        "or none (computed afresh at every step: exact block natural gradient).",
        choices=("sample", "label", "position", "layer", "none"),
        resumed=True,
    )
    refresh_every: int = setting(
        0,
        "Begin to compute the coefficients anew every so many epochs; 0: never.",
        at_least=0,
        resumed=True,
    )
    collect_from: int = setting(
        0,
        "Epoch, from 0, in which coefficients are first computed; before it the gradient is plain.",
        at_least=0,
        resumed=True,
    )
    collect_epochs: int = setting(
        1,
        "Epochs in a row in which coefficients are computed; what is kept is their mean.",
        at_least=1,
        resumed=True,
    )
    collect_every: int = setting(
        1,
        "In such an epoch every so many optimizer steps compute coefficients, from its first on; "
        "the others take the mean of those. With share=label, position or layer.",
        at_least=1,
        resumed=True,
    )
    leave_one_out: bool = setting(
        False,
        "Whether each sample's gradient meets the Fisher of the other samples of its batch alone, "
        "so that a large one does not shrink itself (an addition of hf_fngd).",
        resumed=True,
    )
    gamma_scale: str = setting(
        "free",
        "free (γ as computed) or one (γ over its mean in the batch: it weights samples and leaves "
        "the length of the layer's step alone).",
        choices=("free", "one"),
        resumed=True,
    )
    gamma_max: float | None = setting(
        None,
        "Bound b: γ, after gamma_scale, is clipped to [0, b].",
        above=0.0,
        resumed=True,
    )
    gamma_power: float = setting(
        1.0,
        "Exponent α in [0, 1]: γ, after gamma_max, becomes max(γ, 0)^α; 1: as computed, 0: plain "
        "gradient.",
        at_least=0.0,
        at_most=1.0,
        resumed=True,
    )
    fisher_unit: str = setting(
        "sample",
        "sample (the paper: one gradient a sequence or image) or token (each position counts as a "
        "sample; an addition of hf_fngd, with share none or label).",
        choices=("sample", "token"),
        resumed=True,
    )
    num_landmarks: int = setting(
        128,
        "Random positions that span the Nyström approximation of fisher_unit=token.",
        at_least=1,
        resumed=True,
    )
    gram_route: str = setting(
        "auto",
        "How Gram matrices are formed: auto (fewest operations), direct or hadamard; for "
        "fisher_unit=token: auto, exact or nystrom.",
        choices=("auto", "direct", "hadamard", "exact", "nystrom"),
    )
    gram_memory_mb: int = setting(
        256, "Upper bound in MiB of the workspace of one layer's Gram matrix.", at_least=1
    )
    gram_dtype: str = setting(
        "auto",
        "Precision of a Gram matrix's products, which are added up and solved in float32: bfloat16 "
        "(a cheaper first epoch where the machine is faster in it), float32 (float64 for gradients "
        "in float64), or auto: that of the gradients, but float32 for float16.",
        choices=("auto", "float32", "bfloat16"),
        resumed=True,
    )
    gram_outputs: int | None = setting(
        None,
        "Output features, drawn anew for every layer and step, from which its Gram matrix is "
        "estimated without bias: a cheaper first epoch; default: all, exactly.",
        at_least=1,
        resumed=True,
    )
    gram_inputs: int | None = setting(
        None,
        "The same for input features (of a convolution: channels), of which no more than these are "
        "then looked at.",
        at_least=1,
        resumed=True,
    )
    store_dtype: str = setting(
        "float32",
        "Precision of stored coefficients: float32 or float16.",
        choices=("float32", "float16"),
        resumed=True,
    )
    store_dir: str | None = setting(
        None,
        "Folder in which each process keeps the coefficients of share=sample, in a nameless file "
        "(and in a second one while it writes a checkpoint); default: main memory.",
    )
    num_samples: int | None = setting(
        None,
        "Rows of the training set, when known: bounds the coefficient store from the start.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_scale == "auto":
            self.update_scale = "rms" if self.update_rule == "sgd" else "none"
        if self.gram_route not in _ROUTES[self.fisher_unit]:
            raise FNGDError(
                f"gram_route={self.gram_route} does not go with fisher_unit={self.fisher_unit}: "
                f"choose {', '.join(_ROUTES[self.fisher_unit])}"
            )
        if not (self.store_dir is None or isinstance(self.store_dir, str) and self.store_dir):
            raise FNGDError(f"store_dir must be the name of a folder, not {self.store_dir!r}")
        if 0 < self.refresh_every < self.collect_epochs:
            raise FNGDError(
                f"refresh_every={self.refresh_every} is less than collect_epochs="
                f"{self.collect_epochs}: coefficients would be computed in every epoch; "
                "set share=none for that"
            )
        for name in ("gram_outputs", "gram_inputs"):
            if self.fisher_unit == "token" and getattr(self, name) is not None:
                raise FNGDError(
                    f"{name} goes with fisher_unit=sample; with fisher_unit=token set "
                    "gram_route=nystrom and num_landmarks for a cheaper Gram matrix"
                )
        if self.collect_every > 1 and self.share in ("sample", "none"):
            raise FNGDError(
                f"collect_every={self.collect_every} does not go with share={self.share}, where "
                "no batch has coefficients from others: set share=layer, label or position"
            )
        if self.fisher_unit == "token" and self.share not in ("none", "label"):
            raise FNGDError(
                f"share={self.share} does not go with fisher_unit=token: "
                "set share=none or share=label"
            )

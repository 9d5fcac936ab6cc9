"""Every FNGD setting once: type, default, allowed values and help text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_fngd.errors import FNGDError

CHOICES = {
    "damping_mode": ("relative", "absolute"),
    "share": ("sample", "label", "position", "layer", "none"),
    "fisher_unit": ("sample", "token"),
    "update_rule": ("sgd", "adamw", "muon"),
    "update_scale": ("none", "rms"),
    "gram_route": ("auto", "direct", "hadamard", "exact", "nystrom"),
    "store_dtype": ("float32", "float16"),
}
_ROUTES = {"sample": ("auto", "direct", "hadamard"), "token": ("auto", "exact", "nystrom")}
# A run resumed with another value of these would silently be a different run.
RESUME_FIELDS = (
    "damping",
    "damping_mode",
    "share",
    "refresh_every",
    "fisher_unit",
    "num_landmarks",
    "update_rule",
    "update_scale",
    "store_dtype",
    "seed",
)


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class FNGDConfig:
    """Settings of FNGD (arXiv 2403.03473), checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    damping: float = _setting(
        0.1, "Damping λ > 0; relative: in units of the mean eigenvalue of the layer's UᵀU/N."
    )
    damping_mode: str = _setting(
        "relative",
        "relative (the coefficients do not change when the loss is multiplied by a constant) or "
        "absolute (λ as in the paper; the loss must be a mean over the batch).",
    )
    share: str = _setting(
        "sample",
        "What the coefficients of the first epoch are kept for: sample (each data set row), label "
        "(each class or token id), position (each place in the batch), layer (one number a layer) "
        "or none (computed afresh at every step: exact block natural gradient).",
    )
    refresh_every: int = _setting(
        0, "Compute the coefficients anew in one epoch out of this many; 0: first epoch only."
    )
    fisher_unit: str = _setting(
        "sample",
        "sample (the paper: one gradient a sequence or image) or token (each position counts as a "
        "sample; an addition of hf_fngd, with share none or label).",
    )
    num_landmarks: int = _setting(
        128, "Random positions that span the Nyström approximation of fisher_unit=token."
    )
    target_modules: str | list[str] | None = _setting(
        None,
        "Layers to select: all-linear, a regular expression that matches the whole module path, or "
        "a list of names (in --optim_args: joined by '|'). Default: every supported layer but the "
        "vocabulary head and tied weights.",
    )
    exclude_modules: str | list[str] | None = _setting(
        None, "Layers to leave out, written like target_modules."
    )
    update_rule: str = _setting(
        "sgd",
        "What the selected weights are updated by: sgd (momentum; the paper), adamw or muon. "
        "All other parameters follow AdamW.",
    )
    momentum: float = _setting(0.9, "Momentum of the sgd and muon rules, in [0, 1).")
    nesterov: bool | None = _setting(
        None, "Nesterov momentum; default: off for sgd, on for muon, as in torch.optim."
    )
    update_scale: str = _setting(
        "none",
        "none, or rms: every selected weight's update gets the root mean square 0.2 of a typical "
        "AdamW update, so that AdamW learning rates carry over.",
    )
    other_lr: float | None = _setting(
        None,
        "Learning rate of the parameters that are not selected (embeddings, norms, head); "
        "default: the same as for the selected ones.",
    )
    gram_route: str = _setting(
        "auto",
        "How Gram matrices are formed: auto (fewest operations), direct or hadamard; for "
        "fisher_unit=token: auto, exact or nystrom.",
    )
    gram_memory_mb: int = _setting(
        256, "Upper bound in MiB of the workspace of one layer's Gram matrix."
    )
    store_dtype: str = _setting("float32", "Precision of stored coefficients: float32 or float16.")
    num_samples: int | None = _setting(
        None, "Rows of the training set, when known: bounds the coefficient store from the start."
    )
    adam_beta1: float = _setting(0.9, "AdamW β₁, in [0, 1).")
    adam_beta2: float = _setting(0.999, "AdamW β₂, in [0, 1).")
    adam_epsilon: float = _setting(1e-8, "AdamW ε, at least 0.")
    seed: int = _setting(0, "Seed of the random landmarks.")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise FNGDError(
                    f"{name}={getattr(self, name)!r} is not allowed: choose "
                    f"{', '.join(choices)}{_nearest(getattr(self, name), choices)}"
                )
        self._check_number("damping", above=0.0)
        self._check_number("momentum", at_least=0.0, below=1.0)
        self._check_number("adam_beta1", at_least=0.0, below=1.0)
        self._check_number("adam_beta2", at_least=0.0, below=1.0)
        self._check_number("adam_epsilon", at_least=0.0)
        self._check_number("refresh_every", whole=True, at_least=0)
        self._check_number("num_landmarks", whole=True, at_least=1)
        self._check_number("gram_memory_mb", whole=True, at_least=1)
        if self.other_lr is not None:
            self._check_number("other_lr", at_least=0.0)
        if self.num_samples is not None:
            self._check_number("num_samples", whole=True, at_least=1)
        self._check_number("seed", whole=True)
        if self.nesterov not in (None, True, False):
            raise FNGDError(f"nesterov must be true, false or none, not {self.nesterov!r}")
        if self.gram_route not in _ROUTES[self.fisher_unit]:
            raise FNGDError(
                f"gram_route={self.gram_route} does not go with fisher_unit={self.fisher_unit}: "
                f"choose {', '.join(_ROUTES[self.fisher_unit])}"
            )
        if self.fisher_unit == "token" and self.share not in ("none", "label"):
            raise FNGDError(
                f"share={self.share} does not go with fisher_unit=token: "
                "set share=none or share=label"
            )

    def _check_number(
        self,
        name: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        below: float = math.inf,
        whole: bool = False,
    ) -> None:
        value = getattr(self, name)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (number and above < value < below and value >= at_least):
            bounds = [
                f"above {above:g}" if above > -math.inf else "",
                f"at least {at_least:g}" if at_least > -math.inf else "",
                f"below {below:g}" if below < math.inf else "",
            ]
            wanted = " and ".join(filter(None, bounds))
            kind = "whole" if whole else "finite"
            raise FNGDError(f"{name} must be a {kind} number {wanted}, not {value!r}")

    @classmethod
    def from_strings(cls, values: Mapping[str, str], **overrides: Any) -> FNGDConfig:
        """Reads settings that came as text, as in `--optim_args "damping=0.01,share=sample"`.

        Args:
            values: Names and values as text; lists are joined by `|`, `none` is an absent value.
            **overrides: Settings that are no text, used where `values` does not name them.

        Returns:
            The checked settings.

        Raises:
            FNGDError: For an unknown name (the nearest valid one is named), a value that cannot be
                read as the setting's type, or a value out of range.
        """
        parsed = dict(overrides)
        for name, text in values.items():
            parsed[name] = cls._parse(name, text)
        return cls(**parsed)

    @classmethod
    def _parse(cls, name: str, text: str) -> Any:
        settings = {item.name: item for item in fields(cls)}
        if name not in settings:
            raise FNGDError(
                f"optim_args: {name!r} is not a setting of FNGD{_nearest(name, settings)}; "
                f"valid names: {', '.join(settings)}"
            )
        kind = settings[name].type
        if text.lower() == "none" and "None" in kind:
            return None
        if "list" in kind:
            return text.split("|") if "|" in text else text
        try:
            if "bool" in kind:
                return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            return int(text) if "int" in kind else float(text) if "float" in kind else text
        except (KeyError, ValueError):
            wanted = kind.replace(" | None", "")
            raise FNGDError(f"optim_args: {name}={text!r} is not a {wanted}") from None

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings as plain values, for JSON files and checkpoints.

        Returns:
            Names and values.
        """
        return asdict(self)


def _nearest(name: object, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""

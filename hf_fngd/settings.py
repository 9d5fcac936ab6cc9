"""Settings as checked dataclasses: what all optimizers of the package have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from hf_fngd.checks import check_number, nearest
from hf_fngd.errors import FNGDError

Config = TypeVar("Config", bound="OptimizerConfig")
_IN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def setting(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] | None = None,
    resumed: bool = False,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """Declares one setting.

    Args:
        default: Default value.
        help_text: What it means, a sentence.
        choices: Allowed texts.
        resumed: Whether a run resumed with another value would silently be a different run.
        above: Open lower bound of a number.
        at_least: Lower bound of a number.
        at_most: Upper bound of a number.
        below: Open upper bound of a number.

    Returns:
        A dataclass field.
    """
    bounds = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    finite = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    metadata = {"help": help_text, "choices": choices, "bounds": finite, "resumed": resumed}
    return field(default=default, metadata=metadata)


def damping(default: float) -> Any:
    """Declares the damping, whose best value depends on the method.

    Args:
        default: Default value.

    Returns:
        A dataclass field.
    """
    return setting(
        default,
        "Damping λ > 0; relative: in units of the mean eigenvalue of the layer's UᵀU/N.",
        above=0.0,
        resumed=True,
    )


@dataclass
class OptimizerConfig:
    """Settings that every optimizer of the package has, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "the optimizer"

    damping: float = damping(0.1)
    damping_mode: str = setting(
        "relative",
        "relative (the coefficients do not change when the loss is multiplied by a constant) or "
        "absolute (λ as in the papers; the loss must be a mean over the batch).",
        choices=("relative", "absolute"),
        resumed=True,
    )
    target_modules: str | list[str] | None = setting(
        None,
        "Layers to select: all-linear, a regular expression that matches the whole module path, or "
        "a list of names (in --optim_args: joined by '|'). Default: every supported layer but the "
        "vocabulary head and tied weights.",
    )
    exclude_modules: str | list[str] | None = setting(
        None, "Layers to leave out, written like target_modules."
    )
    update_rule: str = setting(
        "sgd",
        "What the selected weights are updated by: sgd (momentum; the papers), adamw or muon. "
        "All other parameters follow AdamW.",
        choices=("sgd", "adamw", "muon"),
        resumed=True,
    )
    momentum: float = setting(
        0.9, "Momentum of the sgd and muon rules, in [0, 1).", at_least=0.0, below=1.0
    )
    nesterov: bool | None = setting(
        None, "Nesterov momentum; default: off for sgd, on for muon, as in torch.optim."
    )
    update_scale: str = setting(
        "none",
        "none, or rms: every selected weight's update gets the root mean square 0.2 of a typical "
        "AdamW update, so that AdamW learning rates carry over.",
        choices=("none", "rms"),
        resumed=True,
    )
    other_lr: float | None = setting(
        None,
        "Learning rate of the parameters that are not selected (embeddings, norms, head); "
        "default: the same as for the selected ones.",
        at_least=0.0,
    )
    adam_beta1: float = setting(0.9, "AdamW β₁, in [0, 1).", at_least=0.0, below=1.0)
    adam_beta2: float = setting(0.999, "AdamW β₂, in [0, 1).", at_least=0.0, below=1.0)
    adam_epsilon: float = setting(1e-8, "AdamW ε, at least 0.", at_least=0.0)
    seed: int = setting(0, "Seed of everything random in the method.", resumed=True)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata["choices"]
            optional = "None" in str(one.type)
            if choices is not None:
                if value not in choices:
                    raise FNGDError(
                        f"{one.name}={value!r} is not allowed: choose "
                        f"{', '.join(choices)}{nearest(value, choices)}"
                    )
            elif "list" in str(one.type):
                many = value if isinstance(value, list | tuple) else [value]
                if value is not None and not all(isinstance(name, str) for name in many):
                    raise FNGDError(
                        f"{one.name}={value!r}: give names of layers, or one pattern for their "
                        "paths"
                    )
            elif "bool" in str(one.type):
                if not (isinstance(value, bool) or (optional and value is None)):
                    either = "true, false or none" if optional else "true or false"
                    raise FNGDError(f"{one.name} must be {either}, not {value!r}")
            elif str(one.type).startswith(("int", "float")) and not (optional and value is None):
                whole = str(one.type).startswith("int")
                check_number(one.name, value, whole, one.metadata["bounds"])

    @classmethod
    def resumed_fields(cls) -> list[str]:
        """Names the settings that must be the same in a resumed run.

        Returns:
            Field names.
        """
        return [one.name for one in fields(cls) if one.metadata["resumed"]]

    @classmethod
    def from_settings(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Makes the settings from keyword arguments.

        Args:
            values: Names and values.

        Returns:
            The checked settings.

        Raises:
            FNGDError: For unknown names.
        """
        known = [one.name for one in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise FNGDError(
                f"{', '.join(unknown)}: not a setting of {cls.title}"
                f"{nearest(unknown[0], known)}; valid names: {', '.join(known)}"
            )
        return cls(**values)

    @classmethod
    def from_strings(cls: type[Config], values: Mapping[str, str], **overrides: Any) -> Config:
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
        known = {one.name: str(one.type) for one in fields(cls)}
        if name not in known:
            raise FNGDError(
                f"optim_args: {name!r} is not a setting of {cls.title}{nearest(name, known)}; "
                f"valid names: {', '.join(known)}"
            )
        kind = known[name]
        if text.lower() == "none" and "None" in kind:
            return None
        if "list" in kind:
            return text.split("|") if "|" in text else text
        try:
            if "bool" in kind:
                return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            return int(text) if "int" in kind else float(text) if "float" in kind else text
        except (KeyError, ValueError):
            wanted = _IN_WORDS[kind.replace(" | None", "")]
            optional = " or none" if "None" in kind else ""
            raise FNGDError(f"optim_args: {name}={text!r} must be {wanted}{optional}") from None

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings as plain values, for JSON files and checkpoints.

        Returns:
            Names and values.
        """
        return asdict(self)

"""Settings as checked dataclasses, from keyword arguments or from the text of `--optim_args`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from hf_fngd.errors import FNGDError, check_number, suggestion

Config = TypeVar("Config", bound="OptimizerConfig")
_IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_ONE_EPOCH = "coefficients are computed in the first epoch, and anew with refresh_every"
_NOT_SOFTENED = "softened coefficients did not help (one seed); set damping instead"
_SAMPLES_ONLY = (
    "a sample is a sequence or an image; positions as samples fell behind over ten epochs "
    "(one seed)"
)
_EXACT_GRAM = (
    "Gram matrices are always exact; where an estimate helped, --optim tengrad helped more (one "
    "seed)"
)
_NO_CURVATURE = "the plain update rules have no curvature to damp"
_KERNELS = "torch chooses the fastest kernels by itself, so leave it out"
# Arguments of torch's optimizers, and what to do instead.
_OF_TORCH = {
    "adjust_lr_fn": "set update_scale=rms for Muon's match_rms_adamw",
    "amsgrad": "AdamW keeps its usual second moment, so leave it out",
    "betas": "set adam_beta1 and adam_beta2",
    "capturable": "a step cannot be part of a CUDA graph, so leave it out",
    "dampening": "momentum is not dampened, so leave it out",
    "differentiable": "no gradient passes through a step, so leave it out",
    "eps": "set adam_epsilon",
    "foreach": _KERNELS,
    "fused": _KERNELS,
    "maximize": "negate the loss",
    "nesterov": "Nesterov momentum is on with update_rule=muon and off with sgd",
    "ns_coefficients": "Muon has torch's default, so leave it out",
    "ns_steps": "Muon has torch's default, so leave it out",
}
# Settings and values of earlier versions, or of other methods, and why they are not there.
_REMOVED = _OF_TORCH | {
    "collect_from": _ONE_EPOCH,
    "collect_epochs": _ONE_EPOCH,
    "collect_every": _ONE_EPOCH,
    "gamma_scale": _NOT_SOFTENED,
    "gamma_max": _NOT_SOFTENED,
    "gamma_power": _NOT_SOFTENED,
    "fisher_unit": _SAMPLES_ONLY,
    "num_landmarks": _SAMPLES_ONLY,
    "gram_inputs": _EXACT_GRAM,
    "gram_outputs": _EXACT_GRAM,
    "gram_route": "the route with fewer operations is always taken",
    "num_samples": "the Trainer counts the rows; a plain loop may call optimizer.bind_dataset",
    "reference_sketch": "sketches are always unbiased",
    "big_product": "big layers always take the paper's product of sums",
    "batch_norm": "AdamW updates the weights of BatchNorm2d",
    "rank_threshold": "the inverse is always exact",
    "loss_terms": "it had no effect under relative damping; set damping instead",
    "step_control": "set kl_clip to a number to clip the step, or to none not to",
    "seed": "this method draws nothing at random",
    "damping": _NO_CURVATURE,
    "damping_mode": _NO_CURVATURE,
    "share=label": "set share=sample, layer or none",
    "share=position": "share=layer does the same (one seed on each of two tasks)",
}


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
    """Declare one setting.

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
    """Declare the damping; each method has its own best default."""
    return setting(
        default,
        "Damping λ > 0; relative: in units of the mean eigenvalue of the layer's UᵀU/N.",
        above=0.0,
        resumed=True,
    )


def refuse_arguments_of_torch(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group that asks for what only torch's optimizers have.

    Args:
        group: The group; an argument that is off is no request.

    Raises:
        FNGDError: For the first such argument.
    """
    for name, advice in _OF_TORCH.items():
        if name not in ("betas", "eps") and group.get(name):
            raise FNGDError(f"{name} is not a setting of a parameter group: {advice}")


def _kinds(config: Any) -> dict[str, tuple[set[Any], bool]]:
    """Return the types of each setting, and whether it may be None."""
    found = {}
    hints = get_type_hints(config)
    for one in fields(config):
        hint = hints[one.name]
        parts = set(get_args(hint)) or {hint}
        found[one.name] = (parts - {NoneType}, NoneType in parts)
    return found


def _check(
    name: str, value: Any, kinds: set[Any], optional: bool, metadata: Mapping[str, Any]
) -> None:
    choices = metadata["choices"]
    if optional and value is None:
        return
    if choices is not None and value not in choices:
        gone = _REMOVED.get(f"{name}={value}")
        if gone:
            raise FNGDError(f"{name}={value} was removed: {gone}")
        raise FNGDError(f"{name}={value!r} is not allowed: {suggestion(value, choices)}")
    if list[str] in kinds:
        many = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(one, str) for one in many):
            raise FNGDError(
                f"{name}={value!r}: give names of layers, or one pattern for their paths"
            )
    elif kinds == {bool}:
        if not isinstance(value, bool):
            raise FNGDError(f"{name} must be true or false, not {value!r}")
    elif kinds == {str}:
        if not (isinstance(value, str) and value):
            raise FNGDError(f"{name} must be a text, not {value!r}")
    else:
        check_number(name, value, kinds == {int}, metadata["bounds"])


@dataclass
class OptimizerConfig:
    """Settings that every optimizer of the package has, checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "the optimizer"

    target_modules: str | list[str] | None = setting(
        None,
        "Layers to select: all-linear, a regular expression that matches the whole module path, or "
        "a list of names (in --optim_args: joined by '|'). Default: every supported layer except "
        "the vocabulary head and tied weights.",
    )
    exclude_modules: str | list[str] | None = setting(
        None, "Layers to leave out, written like target_modules."
    )
    update_rule: str = setting(
        "sgd",
        "Update rule of the selected weights: sgd (momentum; the papers), adamw, muon or soap.",
        choices=("sgd", "adamw", "muon", "soap"),
        resumed=True,
    )
    other_rule: str = setting(
        "adamw",
        "Update rule of all other parameters: adamw, or soap (AdamW in the eigenbasis of the "
        "features of embeddings and of the head).",
        choices=("adamw", "soap"),
        resumed=True,
    )
    momentum: float = setting(
        0.9,
        "Momentum of the sgd and muon rules, in [0, 1); with muon it is Nesterov's.",
        at_least=0.0,
        below=1.0,
    )
    update_scale: str = setting(
        "none",
        "none, or rms: each selected weight's update gets a root mean square of 0.2, like a "
        "typical AdamW update, so that AdamW's learning rates carry over.",
        choices=("none", "rms"),
        resumed=True,
    )
    other_lr: float | None = setting(
        None,
        "Learning rate of the parameters that are not selected (embeddings, norms, head); "
        "default: that of the selected ones.",
        at_least=0.0,
    )
    adam_beta1: float = setting(0.9, "AdamW β₁, in [0, 1).", at_least=0.0, below=1.0)
    adam_beta2: float = setting(0.999, "AdamW β₂, in [0, 1).", at_least=0.0, below=1.0)
    adam_epsilon: float = setting(1e-8, "AdamW ε, at least 0.", at_least=0.0)

    def __post_init__(self) -> None:
        known = _kinds(type(self))
        for one in fields(self):
            _check(one.name, getattr(self, one.name), *known[one.name], one.metadata)

    @classmethod
    def _refuse_unknown(cls, names: Mapping[str, Any]) -> None:
        known = [one.name for one in fields(cls)]
        for name in names:
            if name in known:
                continue
            if name in _REMOVED:
                raise FNGDError(f"{name} is not a setting of {cls.title}: {_REMOVED[name]}")
            raise FNGDError(f"{name!r} is not a setting of {cls.title}: {suggestion(name, known)}")

    @classmethod
    def resumed_fields(cls) -> list[str]:
        """Return the names of the settings that must be the same in a resumed run."""
        return [one.name for one in fields(cls) if one.metadata["resumed"]]

    @classmethod
    def from_settings(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Make the settings from keyword arguments.

        Args:
            values: Names and values.

        Returns:
            The checked settings.

        Raises:
            FNGDError: For an unknown name or a value out of range.
        """
        cls._refuse_unknown(values)
        return cls(**values)

    @classmethod
    def from_strings(cls: type[Config], values: Mapping[str, str], **overrides: Any) -> Config:
        """Read settings given as text, as in `--optim_args "damping=0.01,share=sample"`.

        Args:
            values: Names and values as text; lists are joined by `|`, `none` is an absent value.
            **overrides: Settings that are not text, used where `values` does not name them.

        Returns:
            The checked settings.

        Raises:
            FNGDError: For an unknown name (the nearest valid one is named), a value that cannot be
                read as the setting's type, or a value out of range.
        """
        try:
            cls._refuse_unknown(values)
            parsed = {name: cls._parse(name, text) for name, text in values.items()}
        except FNGDError as error:
            raise FNGDError(f"optim_args: {error}") from None
        return cls(**{**overrides, **parsed})

    @classmethod
    def _parse(cls, name: str, text: str) -> Any:
        kinds, optional = _kinds(cls)[name]
        if optional and text.lower() == "none":
            return None
        if list[str] in kinds:
            return text.split("|") if "|" in text else text
        (kind,) = kinds
        try:
            return _BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            wanted = _IN_WORDS[kind] + (" or none" if optional else "")
            raise FNGDError(f"{name}={text!r} must be {wanted}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON files and checkpoints."""
        return asdict(self)


@dataclass
class DampedConfig(OptimizerConfig):
    """Settings of every method that damps a curvature.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    damping: float = damping(0.1)
    damping_mode: str = setting(
        "relative",
        "relative (multiplying the loss by a constant changes nothing) or absolute (λ as in the "
        "papers; the loss must be a mean over the batch).",
        choices=("relative", "absolute"),
        resumed=True,
    )

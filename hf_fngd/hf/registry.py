"""`--optim fngd` and the other names, registered with transformers, which has no hook for that.

Six places of transformers change, each once: the `OptimizerNames` enum gets members (so that
argument parsers and `TrainingArguments` accept the names), `TrainingArguments.__post_init__` checks
`--optim_args` of these names (so that a wrong one is refused before anything is loaded), the static
`Trainer.get_optimizer_cls_and_kwargs` gets a branch for them, `FNGDCallback` joins the default
callbacks, where it does nothing unless the optimizer is one of the package, `Trainer.train` lets
go of the model also where it ends by an exception or an interrupt, and a resumed epoch keeps the
row numbers of its loader (`skip_first_batches`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import trainer as trainer_module
from transformers.training_args import OptimizerNames, TrainingArguments

from hf_fngd.config import OptimizerConfig
from hf_fngd.errors import FNGDError
from hf_fngd.hf.callback import FNGDCallback, refuse_unsupported
from hf_fngd.hf.row_numbers import numbered_again
from hf_fngd.methods import OPTIMIZERS, settings_of_name
from hf_fngd.optimizer import LayerOptimizer

# Where `settings_of` keeps them, among the attributes of the arguments.
_SETTINGS = "_fngd_settings"
_ENUM_TABLES = ("_member_names_", "_member_map_", "_value2member_map_")


def optimizer_name(args: TrainingArguments) -> str:
    """Return `--optim` as text."""
    return str(getattr(args.optim, "value", args.optim))


def split_words(text: str) -> dict[str, str]:
    """Split settings as `--optim_args` writes them.

    Args:
        text: name=value, several with commas; empty: none.

    Returns:
        Values as text, by name.

    Raises:
        FNGDError: For an entry that is not name=value, and for a name given twice.
    """
    values: dict[str, str] = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        name, separator, value = item.partition("=")
        if not (name and separator and value) or "=" in value:
            raise FNGDError(
                f'optim_args: {item!r} is not name=value; write --optim_args "damping=0.1,share='
                "sample\", with '|' between the entries of a list"
            )
        if name in values:
            raise FNGDError(f"optim_args: {name} is given twice: leave one out")
        values[name] = value
    return values


def config_from_args(args: TrainingArguments) -> OptimizerConfig:
    """Read the optimizer's settings from `--optim`, `--optim_args` and `--optim_target_modules`.

    Args:
        args: Training arguments.

    Returns:
        The checked settings, FNGD's where `--optim` is not one of the package's. AdamW's betas and
        epsilon come from `--adam_beta1` and so on.

    Raises:
        FNGDError: For malformed text, unknown names, bad values, or settings given twice.
    """
    values = split_words(args.optim_args or "")
    overrides: dict[str, Any] = {
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
    }
    name = optimizer_name(args)
    name = name if name in OPTIMIZERS else "fngd"
    overrides |= settings_of_name(name, values)
    if args.optim_target_modules is not None:
        if "target_modules" in values:
            raise FNGDError(
                "give the layers by --optim_target_modules or in --optim_args, not both"
            )
        overrides["target_modules"] = args.optim_target_modules
    return OPTIMIZERS[name][0].config_class.from_strings(values, **overrides)


def optimizer_arguments(
    args: TrainingArguments, model: nn.Module | None, config: OptimizerConfig
) -> tuple[type[LayerOptimizer], dict[str, Any]]:
    """Return the arguments of `Trainer.create_optimizer`, without the parameter groups.

    Args:
        args: Training arguments.
        model: The model to train.
        config: Settings.

    Returns:
        The optimizer's class and keyword arguments.

    Raises:
        FNGDError: If there is no model, or the launch cannot work with the method.
    """
    if model is None:
        raise FNGDError(
            f"{config.title} needs the model to select its layers: pass model= to the Trainer"
        )
    kind = next(kind for kind, _ in OPTIMIZERS.values() if kind.config_class is type(config))
    refuse_unsupported(args, kind)
    # Not `model=`: the Trainer takes an argument of that name for the parameters.
    return kind, {"lr": args.learning_rate, "module": model, "config": config}


@contextlib.contextmanager
def settings_of(args: TrainingArguments, config: OptimizerConfig) -> Iterator[None]:
    """Let the Trainer of these arguments make the optimizer of a config, whatever they name.

    Args:
        args: Training arguments.
        config: Settings.

    Yields:
        Nothing.
    """
    vars(args)[_SETTINGS] = config
    try:
        yield
    finally:
        del vars(args)[_SETTINGS]


def register() -> None:
    """Register the optimizer names with transformers; calling it again changes nothing.

    Raises:
        FNGDError: If this version of transformers lacks a name that is needed.
    """
    trainer_class = getattr(trainer_module, "Trainer", None)
    missing = [
        f"{owner}.{name}"
        for owner, holder, names in (
            ("OptimizerNames", OptimizerNames, _ENUM_TABLES),
            ("TrainingArguments", TrainingArguments, ("__post_init__",)),
            ("Trainer", trainer_class, ("get_optimizer_cls_and_kwargs", "train")),
            ("transformers.trainer", trainer_module, ("DEFAULT_CALLBACKS", "skip_first_batches")),
        )
        for name in names
        if not hasattr(holder, name)
    ]
    if missing:
        raise FNGDError(
            f"transformers {transformers.__version__} is not supported by --optim fngd (it has no "
            f"{', '.join(missing)}): use FNGDTrainer, or transformers 5.2 to 5.23"
        )
    for name in OPTIMIZERS:
        _add_member(name)
    _wrap(TrainingArguments, "__post_init__", _checked)
    _wrap(trainer_class, "get_optimizer_cls_and_kwargs", _dispatched)
    _wrap(trainer_class, "train", _released)
    _wrap(trainer_module, "skip_first_batches", numbered_again)
    if FNGDCallback not in trainer_module.DEFAULT_CALLBACKS:
        trainer_module.DEFAULT_CALLBACKS.append(FNGDCallback)


def _add_member(value: str) -> None:
    if value in OptimizerNames._value2member_map_:
        return
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    # Python 3.13 looks plain values up here.
    if hasattr(OptimizerNames, "_hashable_values_"):
        OptimizerNames._hashable_values_.append(value)
    type.__setattr__(OptimizerNames, name, member)


def _wrap(owner: Any, name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a method by what `make` returns for it, once."""
    original = getattr(owner, name)
    if getattr(original, "knows_fngd", False):
        return
    wrapped: Any = functools.wraps(original)(make(original))
    wrapped.knows_fngd = True
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def _checked(original: Any) -> Callable[..., Any]:
    def check(self: TrainingArguments) -> None:
        original(self)
        if optimizer_name(self) in OPTIMIZERS:
            config_from_args(self)

    return check


def _dispatched(original: Any) -> Callable[..., Any]:
    def dispatch(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        config = vars(args).get(_SETTINGS)
        if config is None and optimizer_name(args) in OPTIMIZERS:
            config = config_from_args(args)
        if config is None:
            return original(args, model)
        return optimizer_arguments(args, model, config)

    return dispatch


def _released(original: Any) -> Callable[..., Any]:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            # `on_train_end` has done so after a training that ended well.
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, FNGDCallback):
                    callback.release(self.optimizer)

    return train

"""`FNGDTrainer`, `FNGDSeq2SeqTrainer`, and the mixin that makes either of any Trainer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_fngd.config import OptimizerConfig
from hf_fngd.errors import FNGDError
from hf_fngd.hf.callback import FNGDCallback, tell_loss_scale, unwrap_optimizer
from hf_fngd.hf.checkpoints import check_complete, last_complete, reading
from hf_fngd.hf.registry import config_from_args, optimizer_name, settings_of
from hf_fngd.hf.row_numbers import number
from hf_fngd.hf.samples import announce
from hf_fngd.methods import OPTIMIZERS

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class LossScaleMixin(_Base):
    """Trainer mixin: corrects the loss of models that accept `num_items_in_batch` and ignore it.

    Marian, T5, BART, mBART, Pegasus, M2M100 and Whisper average the loss over the micro-batch,
    although their signature makes the Trainer believe that they divide by the tokens of the whole
    update. Under gradient accumulation and several processes the loss is then too large by their
    number, for every optimizer alike. The model is probed once, on the first training batch. With
    the correction, one batch of 32 and four accumulated ones of 8 give the same gradient.
    """

    _ignores_num_items: bool | None = None

    def compute_loss(  # noqa: D102
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        corrected = (
            model.training
            and num_items_in_batch is not None
            and isinstance(inputs, Mapping)
            and inputs.get("labels") is not None
            # A loss of the user's class has the scale that the user gave it.
            and self._loss_is_transformers
            # With these the Trainer computes the loss itself, and does so correctly.
            and getattr(self, "label_smoother", None) is None
            and getattr(self, "compute_loss_func", None) is None
            and self._ignores(model, inputs, num_items_in_batch)
        )
        tokens = (inputs["labels"] != -100).sum() if corrected else None
        result = super().compute_loss(
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        if tokens is None:
            return result
        loss = (result[0] if return_outputs else result) * tokens / num_items_in_batch
        return (loss, *result[1:]) if return_outputs else loss

    @property
    def _loss_is_transformers(self) -> bool:
        """Whether `compute_loss` is transformers' own, and nobody said what its scale is."""
        owners = [kind for kind in type(self).__mro__ if "compute_loss" in vars(kind)]
        own = all(kind is LossScaleMixin or _is_transformers(kind) for kind in owners)
        return own and getattr(self, "loss_is_scaled_for_ga", None) is None

    def _ignores(self, model: nn.Module, inputs: Any, num_items: Any) -> bool:
        """Probe once whether the model's loss ignores the number of items."""
        if self._ignores_num_items is None:
            plain = self.accelerator.unwrap_model(model)
            accepts = bool(getattr(self, "model_accepts_loss_kwargs", False))
            self._ignores_num_items = accepts and _same_loss(plain, inputs, num_items)
            if self._ignores_num_items:
                logger.warning(
                    "%s ignores num_items_in_batch: its loss is rescaled to the mean over all "
                    "tokens of an update, for this run and for baselines alike",
                    type(plain).__name__,
                )
        return self._ignores_num_items


def _is_transformers(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "transformers"


@torch.no_grad()
def _same_loss(model: nn.Module, inputs: Mapping[str, Any], num_items: Any) -> bool:
    training = model.training
    model.eval()
    try:
        losses = []
        for factor in (1, 3):
            out = model(**inputs, num_items_in_batch=num_items * factor)
            losses.append((out["loss"] if isinstance(out, Mapping) else out[0]).float())
        return bool(torch.isclose(losses[0], losses[1], rtol=1e-3))
    except Exception:  # The model is code of other people: what cannot be probed is left as it is.
        return False
    finally:
        model.train(training)


class FNGDMixin(LossScaleMixin):
    """Trains with FNGD, or any method of the package, in any Trainer.

    `class MySFTTrainer(FNGDMixin, SFTTrainer): pass` adapts a Trainer of your own.

    Batches know their row numbers (`row_numbers`), so that coefficients belong to samples even
    under random augmentation.

    Args:
        *args: Arguments of the Trainer.
        fngd_config: Settings; by default they are read from `--optim_args`. Their type says which
            method it is: `FNGDConfig`, `KFACConfig`, `EKFACConfig`, `EvaConfig`, `TENGraDConfig`,
            `SENGConfig`.
        **kwargs: Keyword arguments of the Trainer.

    Raises:
        FNGDError: If settings are given twice, or `--optim` names another optimizer.
    """

    # The Trainer's own.
    optimizer_cls_and_kwargs: Any
    train_dataset: Any
    model: Any
    training_step: Any

    def __init__(
        self, *args: Any, fngd_config: OptimizerConfig | None = None, **kwargs: Any
    ) -> None:
        self._fngd_config = fngd_config
        self._warned_of_generation = False
        super().__init__(*args, **kwargs)
        # In the instance: a subclass may have a training step that does not call ours.
        self.training_step = _announcing(self)
        self._fngd_callback = FNGDCallback(announces=False)
        callbacks = self.callback_handler.callbacks
        # In the place of the registered one: before the reporters, which print what it adds.
        places = [i for i, one in enumerate(callbacks) if isinstance(one, FNGDCallback)]
        if places:
            callbacks[places[0]] = self._fngd_callback
        else:
            callbacks.insert(1, self._fngd_callback)
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            self._settings()
        elif fngd_config is not None:
            raise FNGDError(
                "the Trainer has an optimizer already (optimizers= or optimizer_cls_and_kwargs=), "
                "and fngd_config asks for another one: give one of them"
            )

    def _settings(self) -> OptimizerConfig:
        # Read anew for each optimizer: a hyper-parameter search changes the arguments.
        args = self.args
        default = TrainingArguments.__dataclass_fields__["optim"]
        by_default = default.default if isinstance(default.default, str) else None
        name = optimizer_name(args)
        standard = {str(getattr(by_default, "value", by_default)), "adamw_torch_fused"}
        if name not in OPTIMIZERS and name not in standard | {"adamw_torch"}:
            raise FNGDError(
                f"{type(self).__name__} trains with FNGD and --optim names {name}: leave it out, "
                f"or choose {', '.join(OPTIMIZERS)}, or use the plain Trainer"
            )
        given = self._fngd_config
        if given is not None and name in OPTIMIZERS:
            kind = OPTIMIZERS[name][0]
            if type(given) is not kind.config_class:
                raise FNGDError(
                    f"--optim {name} needs a {kind.config_class.__name__}, fngd_config is a "
                    f"{type(given).__name__}: leave one of them out"
                )
        if given is None:
            return config_from_args(args)
        if args.optim_args or args.optim_target_modules is not None:
            raise FNGDError("give the settings by fngd_config or by --optim_args, not both")
        return given

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            with settings_of(self.args, self._settings()):
                return super().create_optimizer(*args, **kwargs)
        return super().create_optimizer(*args, **kwargs)

    def train(  # noqa: D102
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
        elif resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def get_train_dataloader(self) -> Any:  # noqa: D102
        return number(super().get_train_dataloader())

    def _announce(self, model: nn.Module, inputs: Any) -> None:
        """Tell the optimizer what there is to tell of a batch before its training step."""
        optimizer = unwrap_optimizer(self.optimizer)
        if optimizer is None or not optimizer.captured:
            return
        # The last window of an epoch may be shorter than the callback knows.
        steps = getattr(self, "current_gradient_accumulation_steps", 1)
        tell_loss_scale(optimizer, steps, getattr(self.accelerator, "scaler", None))
        model = self.accelerator.unwrap_model(model)
        callback, size = self._fngd_callback, announce(optimizer, model, inputs)
        if size is None:
            callback.listen(self.model, optimizer)
            if optimizer.needs_rows and not self._warned_of_generation:
                self._warned_of_generation = True
                callback.stop_warning()
                logger.warning(
                    "%s: batches hold no tensors, so samples are known by what the model gets. "
                    "Rows that are generated, as in GRPO, are new at every step, and their "
                    "coefficients are never used again: set share=none or share=layer",
                    optimizer.config.title,
                )
        if callback.hook is not None:
            callback.hook.size = size

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        norm = super()._clip_grad_norm(model)
        if norm is not None:
            self._fngd_callback.count_norm(norm, self.args.max_grad_norm)
        return norm


def _announcing(trainer: FNGDMixin) -> Callable[..., Any]:
    """Return a training step that announces the batch, then does that of the Trainer's class."""
    # A Trainer that holds itself would keep the model in memory until Python looks for cycles.
    this = weakref.ref(trainer)

    def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = this()
        trainer._announce(model, inputs)
        return type(trainer).training_step(trainer, model, inputs, *args, **kwargs)

    return training_step


class FNGDTrainer(FNGDMixin, Trainer):
    """`transformers.Trainer` with FNGD."""


class FNGDSeq2SeqTrainer(FNGDMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with FNGD."""

"""`FNGDCallback`: checks at the start, phase switch at each epoch, `fngd/...` logs."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fngd.errors import FNGDError
from hf_fngd.hf.samples import SampleHook, fingerprint
from hf_fngd.hf.support import refuse_unsupported
from hf_fngd.optimizer import FNGD

logger = logging.getLogger(__name__)
_LOW_REUSE = 0.9


def unwrap_optimizer(optimizer: Any) -> FNGD | None:
    """Finds FNGD inside accelerate's wrappers.

    Args:
        optimizer: What the Trainer holds.

    Returns:
        The FNGD optimizer, or None if it is another one.
    """
    while optimizer is not None and not isinstance(optimizer, FNGD):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


class FNGDCallback(TrainerCallback):
    """Runs FNGD inside a Trainer; does nothing with other optimizers.

    Args:
        announces: Whether batches must be announced by hashing their content, as in a stock
            Trainer. `FNGDTrainer` announces row numbers itself.
    """

    def __init__(self, announces: bool = True) -> None:
        self.announces = announces
        self._handle: Any = None
        self._epoch = -1
        self._warned = False
        self._clipped: Tensor | float = 0.0
        self._norms_seen = 0

    def count_norm(self, norm: Tensor | float, bound: float) -> None:
        """Counts a step towards the share of clipped steps.

        Args:
            norm: Gradient norm before clipping.
            bound: `max_grad_norm`.
        """
        self._clipped = self._clipped + (norm > bound)
        self._norms_seen += 1

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuses what cannot work, attaches the layers and says what was chosen.

        Raises:
            FNGDError: If the launch or the data set cannot work with FNGD.
        """
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        refuse_unsupported(args)
        loader = kwargs.get("train_dataloader")
        data = getattr(loader, "dataset", None)
        rows = None if data is None or not hasattr(data, "__len__") else len(data)
        if optimizer.config.share == "sample" and rows is None:
            raise FNGDError(
                "share=sample needs a data set with a length (an IterableDataset has none): set "
                "share=layer or share=none, or load the data as a map-style Dataset"
            )
        optimizer.bind_dataset(rows, fingerprint(data))
        optimizer.attach()
        self._remove_hook()
        if self.announces:
            hook = SampleHook(optimizer)
            self._handle = kwargs["model"].register_forward_pre_hook(hook, with_kwargs=True)
        self._epoch = -1
        if state.is_world_process_zero:
            logger.info("FNGD layers:\n%s", optimizer.selection)
            chosen, left = len(optimizer.selection.chosen), len(optimizer.selection.left_out)
            logger.warning(
                "FNGD preconditions %d layers and leaves %d to AdamW (%s)",
                chosen,
                left,
                "print(optimizer.selection) lists them",
            )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Enters the epoch: computes coefficients in the first one, reuses them later."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        known_length = _has_length(kwargs.get("train_dataloader"))
        if known_length or self._epoch < 0:
            # state.epoch is a whole number here, or lies inside the epoch that is resumed.
            epoch = int((state.epoch or 0.0) + 1e-6) if known_length else self._resumed(optimizer)
        else:
            epoch = self._epoch + 1
        before = optimizer.coefficients.collecting
        optimizer.start_epoch(epoch)
        if before and not optimizer.coefficients.collecting and state.is_world_process_zero:
            logger.info("FNGD: epoch %d reuses the coefficients (first-order cost)", epoch)
        self._epoch = epoch

    @staticmethod
    def _resumed(optimizer: FNGD) -> int:
        return optimizer.coefficients.epoch

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Makes the coefficients equal on all ranks before one of them writes a checkpoint."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        best = getattr(args.save_strategy, "value", args.save_strategy) == "best"
        if optimizer is not None and (control.should_save or (best and control.should_evaluate)):
            optimizer.coefficients.synchronize()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Warns once if few samples find their coefficients again."""
        self.on_step_end(args, state, control, **kwargs)
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        rate = optimizer.coefficients.statistics.reuse_rate if optimizer is not None else None
        if rate is not None and rate < _LOW_REUSE and not self._warned:
            self._warned = True
            logger.warning(
                "FNGD: only %.0f %% of this epoch's samples have stored coefficients, the others "
                "are computed afresh at the cost of a first epoch. Random augmentation or masking "
                "changes the content: use FNGDTrainer (row numbers), or share=layer or none",
                100 * rate,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the `fngd/...` series to training logs and to `trainer_state.json`."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None or logs is None or "loss" not in logs:
            return
        if self.announces and args.max_grad_norm and "grad_norm" in logs:
            self.count_norm(logs["grad_norm"], args.max_grad_norm)
        numbers = optimizer.statistics()
        numbers["reusing"] = float(numbers.pop("phase") == "reuse")
        if self._norms_seen:
            numbers["clipped"] = float(self._clipped) / self._norms_seen
            self._clipped, self._norms_seen = 0.0, 0
        series = {f"fngd/{name}": value for name, value in numbers.items()}
        logs.update(series)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(series)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leaves the model as it was: no hook, no captured layer."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is not None:
            self._remove_hook()
            optimizer.detach()

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _has_length(loader: DataLoader | None) -> bool:
    try:
        return loader is not None and len(loader) > 0
    except TypeError:
        return False

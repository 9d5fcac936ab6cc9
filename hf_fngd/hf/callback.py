"""`FNGDCallback`: checks at the start, phase switch at each epoch, logs of the method."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.hf.announce import SampleHook
from hf_fngd.hf.samples import fingerprint
from hf_fngd.hf.support import refuse_unsupported
from hf_fngd.optimizer import FNGD

logger = logging.getLogger(__name__)
_LOW_REUSE = 0.9


def unwrap_optimizer(optimizer: Any) -> LayerOptimizer | None:
    """Finds an optimizer of the package inside accelerate's wrappers.

    Args:
        optimizer: What the Trainer holds.

    Returns:
        The optimizer, or None if it is another one.
    """
    while optimizer is not None and not isinstance(optimizer, LayerOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def unwrap_fngd(optimizer: Any) -> FNGD | None:
    """Finds FNGD inside accelerate's wrappers.

    Args:
        optimizer: What the Trainer holds.

    Returns:
        The FNGD optimizer, or None if it is another one.
    """
    found = unwrap_optimizer(optimizer)
    return found if isinstance(found, FNGD) else None


def needs_scale(optimizer: LayerOptimizer) -> bool:
    """Tells whether the scale of the loss matters to a method.

    Args:
        optimizer: The optimizer.

    Returns:
        False for FNGD with relative damping, whose coefficients do not depend on it.
    """
    return optimizer.config.damping_mode == "absolute" or not isinstance(optimizer, FNGD)


def set_scale(optimizer: LayerOptimizer, micro_batches: int, scaler: Any) -> None:
    """Tells a method how its gradients relate to those of single samples.

    Args:
        optimizer: The optimizer.
        micro_batches: Those of one update, among which the loss is divided.
        scaler: GradScaler of fp16, or None.
    """
    scale = scaler.get_scale() if scaler is not None else 1.0
    optimizer.tracker.accumulation = micro_batches / scale


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
        refuse_unsupported(args, type(optimizer))
        loader = kwargs.get("train_dataloader")
        data = getattr(loader, "dataset", None)
        rows = None if data is None or not hasattr(data, "__len__") else len(data)
        if getattr(optimizer.config, "share", None) == "sample" and rows is None:
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
            logger.info("%s layers:\n%s", optimizer.config.title, optimizer.selection)
            chosen, left = len(optimizer.selection.chosen), len(optimizer.selection.left_out)
            logger.warning(
                "%s: %d layers are selected, %d are left to AdamW (%s)",
                optimizer.config.title,
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
        optimizer = unwrap_fngd(kwargs.get("optimizer"))
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

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tells the method the scale of the loss, as far as the arguments know it."""
        wrapper = kwargs.get("optimizer")
        optimizer = unwrap_optimizer(wrapper)
        if optimizer is not None and needs_scale(optimizer):
            set_scale(optimizer, args.gradient_accumulation_steps, getattr(wrapper, "scaler", None))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Lets ranks exchange what a checkpoint, or a log, will say of all of them."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        # Not in on_log, which a user's code may reach on one rank only.
        if control.should_log and isinstance(optimizer, FNGD):
            optimizer.coefficients.statistics.gather_counts()
        best = getattr(args.save_strategy, "value", args.save_strategy) == "best"
        if optimizer is not None and (control.should_save or (best and control.should_evaluate)):
            optimizer.synchronize()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Warns once if few samples find their coefficients again."""
        self.on_step_end(args, state, control, **kwargs)
        optimizer = unwrap_fngd(kwargs.get("optimizer"))
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
        """Adds the method's series (`fngd/...`, `kfac/...`) to logs and `trainer_state.json`."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None or logs is None or "loss" not in logs:
            return
        if self.announces and args.max_grad_norm and "grad_norm" in logs:
            self.count_norm(logs["grad_norm"], args.max_grad_norm)
        numbers = optimizer.statistics()
        if "phase" in numbers:
            numbers["reusing"] = float(numbers.pop("phase") == "reuse")
        if self._norms_seen:
            numbers["clipped"] = float(self._clipped) / self._norms_seen
            self._clipped, self._norms_seen = 0.0, 0
        series = {f"{optimizer.method}/{name}": value for name, value in numbers.items()}
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

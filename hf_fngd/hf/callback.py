"""`FNGDCallback`: runs a method inside any Trainer, and refuses launches that cannot work."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fngd.errors import FNGDError
from hf_fngd.hf.row_numbers import has_rows, number
from hf_fngd.hf.samples import SampleHook, fingerprint
from hf_fngd.optimizer import LayerOptimizer
from hf_fngd.rules import NAMES

logger = logging.getLogger(__name__)
_LOW_REUSE = 0.9
_CHANGING = (
    "Random augmentation, masking or generation changes the content: use FNGDTrainer (row numbers) "
    "where the data loader changes it, or set share=layer or none"
)
_CHANGED = (
    "The first epoch left them out (dataloader_drop_last), or they have no row numbers (several "
    "rows for one of the data set, a loader that accelerate has not prepared) and their content "
    "changes: if the rate stays low, set share=layer or none"
)


def unwrap_optimizer(optimizer: Any) -> LayerOptimizer | None:
    """Find an optimizer of the package inside accelerate's wrappers.

    Args:
        optimizer: The Trainer's optimizer.

    Returns:
        The optimizer, or None if it is another one.
    """
    while optimizer is not None and not isinstance(optimizer, LayerOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def tell_loss_scale(optimizer: LayerOptimizer, micro_batches: int, scaler: Any) -> None:
    """Tell a method the scale of the loss, where that matters to it.

    Args:
        optimizer: The optimizer.
        micro_batches: Micro-batches of an update, among which the loss is divided.
        scaler: GradScaler of fp16, or None.
    """
    if optimizer.needs_loss_scale:
        scale = scaler.get_scale() if scaler is not None else 1.0
        optimizer.set_loss_scale(micro_batches, scale)


def refuse_unsupported(args: TrainingArguments, optimizer: type[LayerOptimizer]) -> None:
    """Refuse launches in which a layer's backward does not see whole weights and samples.

    Args:
        args: Training arguments.
        optimizer: The optimizer's class.

    Raises:
        FNGDError: For DataParallel, DeepSpeed, FSDP1, and any FSDP where the method changes whole
            gradients at the optimizer step.
    """
    title = optimizer.config_class.title
    whole_gradients = optimizer.needs_whole_gradients
    if args.n_gpu > 1:
        raise FNGDError(
            f"{title} does not work with torch.nn.DataParallel: start with torchrun or accelerate "
            "launch, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    shared = AcceleratorState._shared_state
    kind = shared.get("distributed_type")
    if getattr(args, "deepspeed", None) or kind == DistributedType.DEEPSPEED:
        sharded = "" if whole_gradients else " or FSDP2 (fsdp_version: 2)"
        raise FNGDError(
            f"{title} does not work with DeepSpeed, which hides gradients from the optimizer: use "
            f"DDP (torchrun){sharded}"
        )
    if kind == DistributedType.FSDP and whole_gradients:
        raise FNGDError(
            f"{title} does not work with FSDP, which divides the gradients that it needs as a "
            "whole: use DDP (torchrun)"
        )
    plugin = shared.get("fsdp_plugin")
    if kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 1:
        raise FNGDError(
            f"{title} does not work with FSDP1, which flattens the weights: set fsdp_version: 2, "
            "or use DDP (torchrun)"
        )


class FNGDCallback(TrainerCallback):
    """Runs a method of the package inside a Trainer; does nothing with other optimizers.

    Args:
        announces: Whether batches are announced when the model gets them, as in a stock Trainer.
            `FNGDTrainer` announces the batches of its loader before that.
    """

    def __init__(self, announces: bool = True) -> None:
        self.announces = announces
        self.hook: SampleHook | None = None
        self._handle: Any = None
        self._epoch = -1
        self._warned = False
        # Parameters that train although the optimizer does not have them, as the user made them.
        self._others: set[int] | None = None
        self._clipped: Tensor | float = 0.0
        self._norms_seen = 0

    def stop_warning(self) -> None:
        """Give no warning of samples that do not find their coefficients again."""
        self._warned = True

    def count_norm(self, norm: Tensor | float, bound: float) -> None:
        """Count a step towards the share of clipped steps.

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
        """Refuse launches that cannot work, attach the layers and say which were chosen.

        Raises:
            FNGDError: If the launch or the data set cannot work with the method.
        """
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        refuse_unsupported(args, type(optimizer))
        loader = kwargs.get("train_dataloader")
        data: Any = getattr(loader, "dataset", None)
        rows = len(data) if has_rows(data) else None
        if optimizer.needs_rows and rows is None:
            raise FNGDError(
                "share=sample needs a data set with a length (an IterableDataset has none): set "
                "share=layer or share=none, or load the data as a map-style Dataset"
            )
        optimizer.bind_dataset(rows, fingerprint(data))
        optimizer.attach()
        self._remove_hook()
        if not self.announces:
            # A loader of the user's own `get_train_dataloader`.
            number(loader)
        # A hook would break the graph of a compiled model, and is seldom needed.
        if self.announces or not args.torch_compile:
            self.listen(kwargs["model"], optimizer)
        self._epoch = -1
        self._others = {id(p) for _, p in _strangers(kwargs["model"], optimizer)}
        if state.is_world_process_zero:
            title, selection = optimizer.config.title, optimizer.selection
            logger.info("%s layers:\n%s", title, selection)
            logger.warning(
                "%s: %d layers selected, %d other modules updated by %s; "
                "print(optimizer.selection) lists them",
                title,
                len(selection.chosen),
                len(selection.left_out),
                NAMES[optimizer.config.other_rule],
            )

    def listen(self, model: nn.Module, optimizer: LayerOptimizer) -> None:
        """Announce what the model gets; does nothing where this is so already.

        Args:
            model: The model without wrappers.
            optimizer: Its optimizer.
        """
        if self._handle is None:
            self.hook = SampleHook(optimizer)
            self._handle = model.register_forward_pre_hook(self.hook, with_kwargs=True)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Enter the epoch, whose number tells a method whether to compute or to reuse."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        if self._epoch >= 0:
            # Not by state.epoch, which is no whole number where a callback ended an epoch early.
            epoch = self._epoch + 1
        elif _has_length(kwargs.get("train_dataloader")):
            epoch = int((state.epoch or 0.0) + 1e-6)
        else:
            epoch = optimizer.epoch
        optimizer.start_epoch(epoch)
        self._epoch = epoch

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell the method the scale of the loss, as far as the arguments know it.

        Raises:
            FNGDError: If no parameter of the model trains any more.
        """
        wrapper = kwargs.get("optimizer")
        optimizer = unwrap_optimizer(wrapper)
        if optimizer is None:
            return
        scaler = getattr(wrapper, "scaler", None)
        tell_loss_scale(optimizer, args.gradient_accumulation_steps, scaler)
        self._look_at_parameters(kwargs["model"], optimizer)

    def _look_at_parameters(self, model: nn.Module, optimizer: LayerOptimizer) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise FNGDError(
                "no parameter of the model trains any more (merge_and_unload of PEFT leaves the "
                "frozen base): change the model after train(), or give it to a new Trainer"
            )
        if self._others is None:
            return
        new = [name for name, p in _strangers(model, optimizer) if id(p) not in self._others]
        if new:
            self._others = None
            logger.warning(
                "%s: %d parameters train that the optimizer does not have, the first is %s: they "
                "were thawed or added after it was made, and keep their values. Freeze layers "
                "after the optimizer has been made (in on_train_begin) to thaw them later, and add "
                "layers before that",
                optimizer.config.title,
                len(new),
                new[0],
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let ranks exchange what a checkpoint, or a log, will say of all of them."""
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        if optimizer is None:
            return
        # Not in on_log, which a user's code may reach on one rank only.
        if control.should_log:
            optimizer.synchronize(counts=True)
        best = getattr(args.save_strategy, "value", args.save_strategy) == "best"
        if control.should_save or (best and control.should_evaluate):
            optimizer.synchronize()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Warn once if few samples find their coefficients again."""
        self.on_step_end(args, state, control, **kwargs)
        optimizer = unwrap_optimizer(kwargs.get("optimizer"))
        rate = None if optimizer is None else optimizer.reuse_rate
        if rate is not None and rate < _LOW_REUSE and not self._warned:
            self._warned = True
            logger.warning(
                "FNGD: only %.0f %% of this epoch's samples have stored coefficients, the others "
                "are computed afresh at the cost of a first epoch. %s",
                100 * rate,
                _CHANGING if self.announces else _CHANGED,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the method's series (`fngd/...`, `kfac/...`) to logs and `trainer_state.json`."""
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
        series = {f"{optimizer.series}/{name}": value for name, value in numbers.items()}
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
        """Leave the model as it was."""
        self.release(kwargs.get("optimizer"))

    def release(self, optimizer: Any) -> None:
        """Leave the model as it was: no hook, no captured layer.

        Args:
            optimizer: The Trainer's optimizer, of the package or not.
        """
        self._remove_hook()
        ours = unwrap_optimizer(optimizer)
        if ours is not None:
            ours.detach()

    def _remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = self.hook = None


def _strangers(model: nn.Module, optimizer: LayerOptimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a model that train and are not the optimizer's."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in known]


def _has_length(loader: DataLoader | None) -> bool:
    try:
        return loader is not None and len(loader) > 0
    except TypeError:
        return False

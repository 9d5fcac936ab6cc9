"""The Trainer of a script, the course of a training, and its clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.averaging import AverageArguments, last_weights
from hf_fngd import FNGDTrainer
from hf_fngd.hf.trainer import LossScaleMixin
from hf_fngd.methods import OPTIMIZERS
from hf_fngd.report.card import CardMixin
from hf_fngd.report.hub import HubMixin


class ScriptTrainer(CardMixin, HubMixin, FNGDTrainer):
    """The Trainer for the optimizers of hf_fngd."""


class BaselineTrainer(CardMixin, HubMixin, LossScaleMixin, Trainer):
    """The Trainer for every other optimizer, with the same correction of the loss scale."""


def make_trainer(
    args: TrainingArguments,
    average: AverageArguments,
    kinds: tuple[type[Trainer], type[Trainer]] = (ScriptTrainer, BaselineTrainer),
    **options: Any,
) -> Trainer:
    """Create the Trainer that the optimizer needs, with a clock.

    Args:
        args: Training arguments.
        average: Average of the weights.
        kinds: The Trainer for the optimizers of hf_fngd, and that for every other one.
        **options: Further arguments of the Trainer.

    Returns:
        The Trainer.
    """
    ours = str(getattr(args.optim, "value", args.optim)) in OPTIMIZERS
    # The clock comes last, so that it counts the others' work.
    callbacks = [*average.callbacks(), TrainingClock()]
    return kinds[0 if ours else 1](args=args, callbacks=callbacks, **options)


def train(trainer: Trainer) -> dict[str, Any]:
    """Train, and save the model and the state.

    Args:
        trainer: The Trainer.

    Returns:
        `train` (metrics), `history` (what was logged, without any later evaluation), and
        `averaging` where the weights are an average.
    """
    trained = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    # An internal call, because any other one pushes a card without results.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    history = list(trainer.state.log_history)
    return {"train": trained.metrics, "history": history, **last_weights(trainer)}


def push(trainer: Trainer) -> None:
    """Upload the output folder after a training, if `--push_to_hub` says so.

    Args:
        trainer: A Trainer that has reported. Every rank must call this; one of them uploads.
    """
    if not (trainer.args.push_to_hub and trainer.args.do_train):
        return
    # The training switched them on again, and their last output would hide the message.
    disable_progress_bars()
    done = trainer.push_to_hub()
    if done is not None:
        print(f"pushed: {done.repo_url}")


class TrainingClock(TrainerCallback):
    """Add `train_seconds`, the wall-clock seconds of training, to every entry of the log history.

    Steps and data loading count; evaluations, saves and logging do not, so that curves can be drawn
    against time. A resumed run continues from the last entry of the checkpoint's history.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark: float | None = None

    def _advance(self, counts: bool) -> None:
        """Count the time since the last event, or leave it out."""
        if self._mark is not None:
            now = time.perf_counter()
            self.seconds += (now - self._mark) * counts
            self._mark = now

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        known = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds = known[-1] if known else 0.0
        self._mark = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the loading of the batch."""
        self._advance(True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step; before a pause, wait for the accelerator to finish it."""
        pauses = control.should_log or control.should_evaluate or control.should_save
        if pauses and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._advance(True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the end of the epoch as a step."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out an evaluation."""
        self._advance(False)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out a save."""
        self._advance(False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave out the time until now, and record the seconds."""
        self._advance(False)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["train_seconds"] = round(self.seconds, 3)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._mark = None

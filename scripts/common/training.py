"""Which optimizers are ours, the clock of a training, and its usual course."""

from __future__ import annotations

import time
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fngd.hf.registry import OPTIMIZERS


def is_ours(optim: Any) -> bool:
    """Says whether an optimizer is one of hf_fngd's.

    Args:
        optim: `--optim`, as text or as transformers' enum.

    Returns:
        True if the FNGD Trainers take it.
    """
    return str(getattr(optim, "value", optim)) in OPTIMIZERS


def train(trainer: Trainer) -> dict[str, Any]:
    """Trains, and saves the model and the state.

    Args:
        trainer: The Trainer.

    Returns:
        `train` (metrics) and `history` (what was logged, without any later evaluation).
    """
    trained = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    # As an internal call, for it would push a card that knows no results yet.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    return {"train": trained.metrics, "history": list(trainer.state.log_history)}


def push(trainer: Trainer) -> None:
    """Sends the output folder to the Hub; every rank calls it, one of them does it.

    Args:
        trainer: A Trainer that has trained and reported.
    """
    # Training has put them on again, and what they write at the end hides a message.
    disable_progress_bars()
    done = trainer.push_to_hub()
    if done is not None:
        print(f"pushed: {done.repo_url}")


class TrainingClock(TrainerCallback):
    """Adds `train_seconds` to every entry of the log history: wall-clock seconds of training.

    Steps and data loading count; evaluations, saves and logging do not, so that curves can be drawn
    against time. A resumed run goes on where the checkpoint's history ends.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark: float | None = None

    def _advance(self, counts: bool) -> None:
        """Counts the time since the last event, or leaves it out."""
        if self._mark is not None:
            now = time.perf_counter()
            self.seconds += (now - self._mark) * counts
            self._mark = now

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        known = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds = known[-1] if known else 0.0
        self._mark = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the loading of the batch."""
        self._advance(True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the step; what it left to the accelerator is waited for if a pause follows."""
        pauses = control.should_log or control.should_evaluate or control.should_save
        if pauses and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._advance(True)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As after a step."""
        self.on_step_end(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves out an evaluation."""
        self._advance(False)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves out a save."""
        self._advance(False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Leaves out the time until here, and writes the seconds down."""
        self._advance(False)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["train_seconds"] = round(self.seconds, 3)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock."""
        self._mark = None

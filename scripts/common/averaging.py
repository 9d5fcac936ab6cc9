"""Arguments for an average of the weights, and what a run reports of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer

from hf_fngd import FNGDError
from hf_fngd.hf.averaging import AveragingCallback
from hf_fngd.report.runs import METRIC_NAMES, format_score, scores


@dataclass
class AverageArguments:
    """An average of the weights in place of the last ones."""

    average_start: float | None = field(
        default=None,
        metadata={
            "help": "End with the average of the weights since this share of the training (0.5: of "
            "its second half). It helps where the learning rate does not decay to zero."
        },
    )
    average_every: int = field(
        default=1, metadata={"help": "Steps from one point of the average to the next."}
    )
    average_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of an exponential average. Default: all points count the same."},
    )

    def __post_init__(self) -> None:
        given = (self.average_every, self.average_decay) != (1, None)
        if self.average_start is None and given:
            raise ValueError("--average_every and --average_decay need --average_start")
        try:
            self.callbacks()
        except FNGDError as error:
            raise ValueError(f"--average_{error}") from None

    def callbacks(self) -> list[AveragingCallback]:
        """Return the callback, if an average is asked for."""
        if self.average_start is None:
            return []
        return [AveragingCallback(self.average_start, self.average_every, self.average_decay)]

    def settings(self) -> dict[str, Any]:
        """Return the arguments that differ from their defaults."""
        return {name: value for name, value in vars(self).items() if value not in (None, 1)}


def last_weights(trainer: Trainer) -> dict[str, Any]:
    """Score the last weights, which the average has replaced.

    Args:
        trainer: A Trainer after its training.

    Returns:
        `averaging`: how many points the average has, and scores of the last weights on the
        validation set, if there is one; nothing without an average.
    """
    found = (c for c in trainer.callback_handler.callbacks if isinstance(c, AveragingCallback))
    averaging = next(found, None)
    if averaging is None or not averaging.replaced:
        return {}
    report: dict[str, Any] = {"points": averaging.count}
    if trainer.args.do_eval and trainer.eval_dataset is not None:
        averaging.swap(trainer.model)
        report["last"] = trainer.evaluate(metric_key_prefix="last")
        averaging.swap(trainer.model)
    return {"averaging": report}


def sentence(found: Mapping[str, Any]) -> str:
    """Say what was averaged, and how the last weights scored.

    Args:
        found: Content of metrics.json.

    Returns:
        Sentences for the card; none without an average.
    """
    if "averaging" not in found:
        return ""
    averaging = found["averaging"]
    text = f"The weights are the average of those after {averaging['points']} of its steps."
    last, mine = averaging.get("last", {}), found.get("validation", {})
    read = {name: value for name, value in scores(last, "last").items() if f"eval_{name}" in mine}
    numbers = [
        f"{METRIC_NAMES.get(name, name)} {format_score(name, value)} (the average: "
        f"{format_score(name, mine[f'eval_{name}'])})"
        for name, value in read.items()
    ]
    if "last_loss" in last and "eval_loss" in mine:
        numbers.append(f"loss {last['last_loss']:.3f} ({mine['eval_loss']:.3f})")
    if numbers:
        text += f" On the validation set, the last weights alone have {', '.join(numbers)}."
    return text

"""Metrics of `evaluate` that a run computes besides those of its task."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE

from common.arguments import InputError


@dataclass
class MetricArguments:
    """Metrics besides those of the task."""

    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More metrics of the package evaluate: names on the Hub (meteor), or local "
            "folders or .py files; options follow a colon: f1:average=macro."
        },
    )


class Metric:
    """A metric of `evaluate`.

    Args:
        word: Name, folder or file, with options after a colon.
        kinds: Types of the script's predictions, as `datasets` names them: `string`, `int`. The
            metric takes the first one that fits.

    Attributes:
        kind: The type that it takes.
        names: Names of the numbers that it computes, known after `rehearse`.

    Raises:
        InputError: If it cannot be loaded, or scores something else than pairs of these types.
    """

    def __init__(self, word: str, kinds: Sequence[str]) -> None:
        self.word = word
        place, _, options = word.partition(":")
        self.options = _options(word, options)
        self._module = _load(place)
        self.name = Path(place).stem
        self.names: set[str] = set()
        features = self._module.features
        forms = features if isinstance(features, list) else [features]
        found = (form for kind in kinds for one in forms if (form := _form(one, kind)))
        try:
            self.kind, self._several = next(found)
        except StopIteration:
            wanted = " or ".join(", ".join(f"{n}: {kind}" for n, kind in f.items()) for f in forms)
            raise InputError(
                f"--metrics: {word!r} wants {wanted}, and this script has predictions and "
                f"references of type {' or '.join(kinds)}: choose another metric"
            ) from None

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Score predictions against one reference each.

        Args:
            predictions: Values of the metric's type.
            references: Values of the same type.

        Returns:
            The numbers among the results, by name, and the means of those that come one a
            prediction (as bertscore's do). The metric's name precedes a name that does not begin
            with it.
        """
        wanted = [[one] for one in references] if self._several else list(references)
        found = self._module.compute(
            predictions=list(predictions), references=wanted, **self.options
        )
        means = {
            name: _mean(value, len(predictions)) if isinstance(value, list) else value
            for name, value in found.items()
        }
        return {
            name if name.startswith(self.name) else f"{self.name}_{name}": float(value)
            for name, value in means.items()
            if _is_number(value)
        }


def load_metrics(args: MetricArguments, *kinds: str) -> list[Metric]:
    """Load the metrics of the command line.

    Args:
        args: Metric arguments.
        *kinds: Types of the script's predictions.

    Returns:
        The metrics.
    """
    return [Metric(word, kinds) for word in args.metrics]


def rehearse(metrics: Sequence[Metric], **values: Sequence[Any]) -> None:
    """Score perfect predictions, so that a metric that cannot work fails before the training.

    Args:
        metrics: The metrics, which get their `names`.
        **values: Values by type.

    Raises:
        InputError: If a metric fails or computes no number, or two compute one of the same name.
    """
    known: set[str] = set()
    for metric in metrics:
        try:
            metric.names = set(metric(values[metric.kind], values[metric.kind]))
        except Exception as error:  # The metric is code of other people.
            raise InputError(
                f"--metrics: {metric.word!r} fails ({_reason(error)}): give its options after a "
                "colon, as f1:average=macro, or leave it out"
            ) from None
        if not metric.names:
            raise InputError(f"--metrics: {metric.word!r} computes no number: leave it out")
        if metric.names & known:
            raise InputError(
                f"--metrics: {metric.word!r} and another metric both compute "
                f"{min(metric.names & known)!r}: leave one out"
            )
        known |= metric.names


def metric_names(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of all numbers that rehearsed metrics compute."""
    return [name for metric in metrics for name in sorted(metric.names)]


def score_all(
    metrics: Sequence[Metric],
    predictions: Mapping[str, Sequence[Any]],
    references: Mapping[str, Sequence[Any]],
) -> dict[str, float]:
    """Score predictions by every metric.

    Args:
        metrics: The metrics.
        predictions: Values by type.
        references: Values by type.

    Returns:
        The numbers by name.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        found |= metric(predictions[metric.kind], references[metric.kind])
    return found


def _load(place: str) -> Any:
    try:
        import evaluate
    except ImportError:
        raise InputError("--metrics needs evaluate: pip install 'hf-fngd[scripts]'") from None
    if HF_HUB_OFFLINE:
        evaluate.config.HF_EVALUATE_OFFLINE = True
    try:
        # In memory, because several processes would share a file.
        return evaluate.load(place, module_type="metric", keep_in_memory=True)
    except Exception as error:  # Loading runs code of other people.
        raise InputError(
            f"--metrics: cannot load {place!r} ({_reason(error)}): give a metric's name on the "
            "Hub, its folder or its .py file, and install what it needs"
        ) from None


def _form(features: Mapping[str, Any], kind: str) -> tuple[str, bool] | None:
    """Return the type and whether a prediction has a list of references; None: it does not fit."""
    if features.keys() != {"predictions", "references"}:
        return None
    prediction, reference = features["predictions"], features["references"]
    # datasets has had several classes for a list, and a list of one feature.
    inner = reference[0] if isinstance(reference, list) else getattr(reference, "feature", None)
    types = (getattr(one, "dtype", "") or "" for one in (prediction, inner or reference))
    return (kind, inner is not None) if all(one.startswith(kind) for one in types) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _mean(values: list[Any], count: int) -> float | None:
    """Return the mean of one number a prediction; None for another list."""
    one_each = len(values) == count > 0 and all(map(_is_number, values))
    return sum(values) / count if one_each else None


def _options(word: str, text: str) -> dict[str, Any]:
    options = {}
    for item in filter(None, text.split(",")):
        name, separator, value = item.partition("=")
        if not (name and separator and value):
            raise InputError(f"--metrics: {word!r} must be NAME or NAME:option=value,option=value")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file, and the Hub has none or cannot be reached"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__

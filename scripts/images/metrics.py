"""Accuracy of a classifier, and further metrics of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from common.metrics import Metric, score_all
from transformers import EvalPrediction


class ComputeMetrics:
    """The Trainer's `compute_metrics`: accuracy, and further metrics.

    Args:
        names: Class names, for metrics of texts.
        more: Further metrics. The accuracy stays if one has a number of that name.
    """

    def __init__(self, names: Sequence[str], more: Sequence[Metric] = ()) -> None:
        self.names, self.more = names, more

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score one evaluation.

        Args:
            prediction: Logits, and the labels.

        Returns:
            The scores; `accuracy` is the share of images whose highest logit is the right one.
        """
        best, labels = best_classes(prediction.predictions), np.asarray(prediction.label_ids)
        more = score_all(self.more, self._by_type(best), self._by_type(labels))
        return {**more, "accuracy": float((best == labels).mean())}

    def _by_type(self, classes: np.ndarray) -> dict[str, list[Any]]:
        numbers = classes.tolist()
        return {"int": numbers, "string": [self.names[number] for number in numbers]}


def best_classes(logits: Any) -> np.ndarray:
    """Return the class with the highest logit, for each row of logits or of a tuple's first."""
    return np.asarray(logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

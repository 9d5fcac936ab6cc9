"""Perplexity over all tokens of a set; long texts weigh more than short ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction


def surprise(logits: Any, labels: Tensor) -> Tensor:
    """Reduce the logits of a batch to the sums that the perplexity needs, to save memory.

    Args:
        logits: Logits `[rows, length, vocabulary]`, or a tuple that begins with them.
        labels: Tokens `[rows, length]`; -100 is not counted.

    Returns:
        Matrix `[rows, 2]`: sum of the cross-entropies, and number of predicted tokens.
    """
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    wanted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none")
    return torch.stack([losses.double().sum(1), (wanted != -100).double().sum(1)], 1)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Score one evaluation.

    Args:
        prediction: The sums of `surprise`.

    Returns:
        The perplexity; infinite if it exceeds a float.
    """
    loss, tokens = prediction.predictions.sum(0)
    mean = loss / tokens if tokens else math.nan
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf}

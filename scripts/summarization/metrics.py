"""ROUGE of summaries, by rouge_score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.arguments import InputError
from common.facts import TASKS

METRICS = TASKS["summarization"].metrics


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Score summaries against one reference each.

    Args:
        predictions: Summaries.
        references: Reference summaries.

    Returns:
        Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (over the whole text, words stemmed), in percent.

    Raises:
        InputError: If rouge_score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs rouge_score: pip install 'hf-fngd[scripts]'") from None
    scorer = RougeScorer(METRICS, use_stemmer=True)
    found = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {
        name: 100 * sum(float(one[name].fmeasure) for one in found) / max(len(found), 1)
        for name in METRICS
    }

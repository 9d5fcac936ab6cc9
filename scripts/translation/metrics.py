"""BLEU and chrF of translations, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sacrebleu import BLEU, CHRF


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Score translations against one reference each.

    Args:
        predictions: Translations.
        references: Reference translations.

    Returns:
        `bleu` and `chrf`, each with its sacrebleu signature.
    """
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(predictions, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(predictions, [references]).score,
        "chrf_signature": str(chrf.get_signature()),
    }

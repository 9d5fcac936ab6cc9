"""BLEU and chrF of translations, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu import BLEU, CHRF
from transformers import EvalPrediction, PreTrainedTokenizerBase


def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Scores translations against one reference each.

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


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Turns token ids into text.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids `[rows, length]`; -100 stands for padding.

    Returns:
        A text for each row.
    """
    ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


class ComputeMetrics:
    """What the Trainer calls with generated tokens; keeps the last texts.

    The references are the texts as they stand in the data: decoding the labels would lose what the
    vocabulary cannot write.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.references: Sequence[str] = []
        self.predictions: list[str] = []
        self._labels: list[list[int]] = []

    def expect(self, references: Sequence[str], labels: Sequence[list[int]]) -> None:
        """Says what the next evaluations score, since the Trainer does not.

        Args:
            references: Reference translations, in the order of the data.
            labels: Their tokens.
        """
        self.references = references
        self._labels = [self._without_padding(np.asarray(row)) for row in labels]

    def _without_padding(self, row: np.ndarray) -> list[int]:
        return row[(row != -100) & (row != self.tokenizer.pad_token_id)].tolist()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores one evaluation.

        Args:
            prediction: Generated tokens, and the labels.

        Returns:
            BLEU and chrF.

        Raises:
            RuntimeError: If the rows come in another order than the references.
        """
        tokens, labels = prediction.predictions, np.asarray(prediction.label_ids)
        if [self._without_padding(row) for row in labels] != self._labels:
            raise RuntimeError("the Trainer evaluates in another order than that of the data")
        self.predictions = decode(
            self.tokenizer, tokens[0] if isinstance(tokens, tuple) else tokens
        )
        scores = score(self.predictions, self.references)
        return {"bleu": scores["bleu"], "chrf": scores["chrf"]}

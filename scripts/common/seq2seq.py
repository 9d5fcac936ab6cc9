"""Sequence-to-sequence models: tokens, the Trainer, and the scores of generated texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from common import report
from common.averaging import AverageArguments
from common.metrics import Metric, MetricArguments, load_metrics, rehearse, score_all
from common.training import make_trainer
from hf_fngd import FNGDSeq2SeqTrainer
from hf_fngd.hf.trainer import LossScaleMixin
from hf_fngd.report.card import CardMixin
from hf_fngd.report.hub import HubMixin

SHOWN = 10


class InOrderMixin(Seq2SeqTrainer):
    """Trainer mixin: evaluation has every row once and in order, because references have no ids.

    Under `group_by_length` the Trainer would sort the rows, and Seq2SeqTrainer leaves the rows in
    with which several processes fill up the last batch.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> SequentialSampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class ScriptWriter(InOrderMixin, CardMixin, HubMixin, FNGDSeq2SeqTrainer):
    """The Trainer for the optimizers of hf_fngd."""


class BaselineWriter(InOrderMixin, CardMixin, HubMixin, LossScaleMixin, Seq2SeqTrainer):
    """The Trainer for every other optimizer, with the same correction of the loss scale."""


class ComputeMetrics:
    """The Trainer's `compute_metrics`: scores generated tokens as texts, and keeps the texts.

    The references are the texts of the data. Decoded labels would lack what the vocabulary cannot
    write.

    Args:
        tokenizer: The tokenizer.
        score: Function that returns the scores of texts and their references, and notes on them.
        more: Further metrics. Where one has a number of the same name as `score`, that of `score`
            stays.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        score: Callable[[Sequence[str], Sequence[str]], dict[str, Any]],
        more: Sequence[Metric] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.score, self.more = score, more
        self.references: Sequence[str] = []
        self.predictions: list[str] = []
        self.scores: dict[str, Any] = {}
        self._labels: list[list[int]] = []

    def expect(self, references: Sequence[str], labels: Sequence[list[int]]) -> None:
        """Set the references of the next evaluations.

        Args:
            references: Reference texts, in the order of the data.
            labels: Their tokens.
        """
        self.references = references
        self._labels = [self._without_padding(np.asarray(row)) for row in labels]

    def _without_padding(self, row: np.ndarray) -> list[int]:
        return row[(row != -100) & (row != self.tokenizer.pad_token_id)].tolist()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Score one evaluation.

        Args:
            prediction: Generated tokens, and the labels.

        Returns:
            The scores; `scores` has the notes as well.

        Raises:
            RuntimeError: If the rows come in another order than the references.
        """
        tokens, labels = prediction.predictions, np.asarray(prediction.label_ids)
        if [self._without_padding(row) for row in labels] != self._labels:
            raise RuntimeError("the Trainer evaluates in another order than that of the data")
        self.predictions = decode(
            self.tokenizer, tokens[0] if isinstance(tokens, tuple) else tokens
        )
        more = score_all(self.more, {"string": self.predictions}, {"string": self.references})
        self.scores = self.score(self.predictions, self.references)
        self.scores |= {name: value for name, value in more.items() if name not in self.scores}
        return {name: value for name, value in self.scores.items() if isinstance(value, float)}


def load_text_metrics(args: MetricArguments) -> list[Metric]:
    """Load the further metrics of the command line, and try them on two texts.

    Args:
        args: Metric arguments.

    Returns:
        The metrics.
    """
    metrics = load_metrics(args, "string")
    rehearse(metrics, string=["A first text.", "A second one."])
    return metrics


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Turn token ids into text.

    Args:
        tokenizer: The tokenizer.
        ids: Token ids `[rows, length]`; -100 stands for padding.

    Returns:
        A text for each row.
    """
    ids = np.where(ids == -100, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def tokenize(
    pairs: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: Any
) -> datasets.Dataset:
    """Turn pairs of texts into model inputs.

    Args:
        pairs: Columns `source` and `target`.
        tokenizer: The tokenizer.
        args: Data arguments: length limits and prefix.

    Returns:
        Columns `input_ids`, `attention_mask` and `labels`.
    """

    def encode(rows: dict[str, list[str]]) -> Any:
        sources = [args.source_prefix + text for text in rows["source"]]
        inputs = tokenizer(sources, max_length=args.max_source_length, truncation=True)
        inputs["labels"] = tokenizer(
            text_target=rows["target"], max_length=args.max_target_length, truncation=True
        )["input_ids"]
        return inputs

    return pairs.map(encode, batched=True, remove_columns=pairs.column_names)


def make_writer(
    model: PreTrainedModel,
    args: Seq2SeqTrainingArguments,
    average: AverageArguments,
    data_args: Any,
    pairs: datasets.DatasetDict,
    metrics: ComputeMetrics,
) -> tuple[Seq2SeqTrainer, dict[str, datasets.Dataset]]:
    """Create the Trainer that the optimizer needs; it evaluates by generated texts.

    Args:
        model: The model.
        args: Training arguments.
        average: Average of the weights.
        data_args: Data arguments: length limits and prefix.
        pairs: Columns `source` and `target` of each split.
        metrics: The scores of an evaluation.

    Returns:
        The Trainer, and the tokens of each split.
    """
    args.predict_with_generate = True
    args.generation_max_length = args.generation_max_length or data_args.max_target_length
    tokenizer = metrics.tokenizer
    tokens = {split: tokenize(rows, tokenizer, data_args) for split, rows in pairs.items()}
    if "validation" in pairs:
        metrics.expect(pairs["validation"]["target"], tokens["validation"]["labels"])
    trainer = make_trainer(
        args,
        average,
        (ScriptWriter, BaselineWriter),
        model=model,
        train_dataset=tokens.get("train"),
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, pad_to_multiple_of=None),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    return trainer, tokens


def write_predictions(folder: Path, pairs: datasets.Dataset, predictions: Sequence[str]) -> Path:
    """Write predictions.jsonl, and print the first rows.

    Args:
        folder: Output folder.
        pairs: Columns `source` and `target` of the test set.
        predictions: The generated texts.

    Returns:
        The file.
    """
    rows = list(zip(pairs["source"], pairs["target"], predictions, strict=True))
    names = ("source", "reference", "prediction")
    path = folder / "predictions.jsonl"
    report.write_rows(path, (dict(zip(names, row, strict=True)) for row in rows))
    for source, reference, prediction in rows[:SHOWN]:
        print(f"\n  {source}\n  = {reference}\n  > {prediction}")
    return path

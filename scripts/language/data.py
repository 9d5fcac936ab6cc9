"""Texts, and the tokens that the model gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
from common.source import SourceArguments
from transformers import PreTrainedTokenizerBase


@dataclass
class DataArguments(SourceArguments):
    """Texts: a data set on the Hub, or local .txt, .json, .jsonl or .jsonl.gz files."""

    text_column: str = field(
        default="text",
        metadata={
            "help": "Column of the texts, or the path of a nested one: translation.de. A .txt file "
            "has one text in each line, in the column `text`; empty lines are left out."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Longest text, in tokens."})


def tokenize(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Turn texts into model inputs, one row for each text.

    Args:
        texts: Column `text`.
        tokenizer: The tokenizer.
        max_length: Longest text in tokens, with the one that ends it.

    Returns:
        Columns `input_ids`, `attention_mask` and `labels`.
    """
    end = tokenizer.eos_token_id

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer(rows["text"], truncation=True, max_length=max_length)["input_ids"]
        ids = [row if row[-1:] == [end] else [*row, end][:max_length] for row in found]
        return {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": ids,
        }

    return texts.map(encode, batched=True, remove_columns=texts.column_names)

"""Where the texts come from, and what the model is given of them."""

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
            "help": "Column of the texts; of a nested one the path: translation.de. A .txt file "
            "has one text a line, in the column `text`; empty lines are left out."
        },
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of a text kept at most."})


def tokenize(
    texts: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> datasets.Dataset:
    """Turns texts into model inputs, one row a text.

    Args:
        texts: Column `text`.
        tokenizer: The tokenizer.
        max_length: Tokens kept at most, the one that ends a text among them.

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

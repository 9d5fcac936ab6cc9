"""Texts and their summaries: loaded and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
from common.arguments import InputError
from common.source import SourceArguments, load_columns


@dataclass
class DataArguments(SourceArguments):
    """Texts with summaries: a data set on the Hub, or local .json, .jsonl or .jsonl.gz files."""

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    summary_column: str = field(default="summary", metadata={"help": "Column of the summaries."})
    source_prefix: str = field(
        default="", metadata={"help": 'Text put before every text ("summarize: " for T5).'}
    )
    max_source_length: int = field(default=512, metadata={"help": "Longest text, in tokens."})
    max_target_length: int = field(default=64, metadata={"help": "Longest summary, in tokens."})


def load_pairs(args: DataArguments) -> datasets.DatasetDict:
    """Load and check all splits.

    Args:
        args: Data arguments.

    Returns:
        The splits that exist, with the columns `source` and `target`.

    Raises:
        InputError: For a missing file, an empty split, or rows without text or summary.
    """
    if args.text_column == args.summary_column:
        raise InputError(
            f"--text_column and --summary_column are both {args.text_column!r}: name two"
        )
    columns = {"source": args.text_column, "target": args.summary_column}
    return load_columns(args, columns)

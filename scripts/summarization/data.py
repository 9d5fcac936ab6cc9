"""Where the texts and their summaries come from, and whether they can be used."""

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
        default="", metadata={"help": 'Put before every text ("summarize: " for T5).'}
    )
    max_source_length: int = field(default=512, metadata={"help": "Text tokens kept at most."})
    max_target_length: int = field(default=64, metadata={"help": "Summary tokens kept at most."})


def load_pairs(args: DataArguments) -> datasets.DatasetDict:
    """Loads and checks all splits.

    Args:
        args: Data arguments.

    Returns:
        Splits `train`, `validation` and `test`, as far as they exist, with the columns `source` and
        `target`.

    Raises:
        InputError: For a missing file, an empty split, or rows without text or summary.
    """
    if args.text_column == args.summary_column:
        raise InputError(f"--text_column and --summary_column are both {args.text_column!r}")
    columns = {"source": args.text_column, "target": args.summary_column}
    return load_columns(args, columns)

"""Rows of a data set: from the Hub or from local files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from common.arguments import InputError

SPLITS = ("train", "validation", "test")
TEXT_FILES = {**dict.fromkeys((".json", ".json.gz", ".jsonl", ".jsonl.gz"), "json"), ".txt": "text"}


@dataclass
class SourceArguments:
    """A data set on the Hub or local files, and how much of it is used."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, in place of files."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Local file."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Like train_file; evaluated during the training."}
    )
    test_file: str | None = field(
        default=None, metadata={"help": "Like train_file; predicted once, at the end."}
    )
    dataset_label: str | None = field(
        default=None, metadata={"help": "Name of the data on the model card."}
    )
    dataset_id: str | None = field(
        default=None,
        metadata={"help": "Hub id of the data set from which the local files are, for the card."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first training rows."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first validation rows."}
    )
    max_predict_samples: int | None = field(
        default=None, metadata={"help": "Use only the first test rows."}
    )


def load_hub(name: str, config: str | None) -> datasets.DatasetDict:
    """Load a data set of the Hub.

    Args:
        name: Its id.
        config: Its configuration, if there are several.

    Returns:
        All splits.

    Raises:
        InputError: If there is none.
    """
    try:
        return datasets.load_dataset(name, config)
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load the data set {name!r}: {reason}") from None


def load_file(split: str, name: str, builders: dict[str, str]) -> datasets.Dataset:
    """Load one local file, so that an error can name it.

    Args:
        split: `train`, `validation` or `test`.
        name: Path of the file.
        builders: Builder of `datasets` by the ending of the name.

    Returns:
        All rows.

    Raises:
        InputError: If it does not exist, is empty, of another kind, or damaged.
    """
    if not Path(name).is_file():
        raise InputError(f"--{split}_file: there is no file {name!r}: check the path")
    builder = next((b for ending, b in builders.items() if name.endswith(ending)), None)
    if builder is None:
        *first, last = builders
        raise InputError(f"--{split}_file: {name!r} is no {', '.join(first)} or {last} file")
    if Path(name).stat().st_size == 0:
        raise InputError(f"--{split}_file: {name!r} is empty: give a file with rows")
    try:
        return datasets.load_dataset(builder, data_files=name, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, EOFError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        kind = "JSON lines, or a damaged .gz" if builder == "json" else f"a {builder} file"
        raise InputError(f"--{split}_file: {name!r} is not {kind}: {reason}") from None


def load_columns(args: SourceArguments, columns: dict[str, str]) -> datasets.DatasetDict:
    """Load and check columns of text of all splits.

    Args:
        args: Data arguments.
        columns: Source of each column: a name, or a path in nested rows, such as `a.b`.

    Returns:
        The splits that exist, with `columns` only.

    Raises:
        InputError: For a missing file, an empty split, or rows without text.
    """
    if args.dataset_name:
        raw = load_hub(args.dataset_name, args.dataset_config_name)
    else:
        named = {split: getattr(args, f"{split}_file") for split in SPLITS}
        raw = {split: load_file(split, name, TEXT_FILES) for split, name in named.items() if name}
        for split in (one for one in raw if named[one].endswith(".txt")):
            raw[split] = raw[split].filter(lambda row: bool(row["text"].strip()))
    found = {}
    for split in (one for one in SPLITS if one in raw):
        rows = first_rows(raw[split], split, args)
        texts = {to: _texts(rows, split, path) for to, path in columns.items()}
        found[split] = datasets.Dataset.from_dict(texts)
    if not found:
        raise InputError("no data: give --train_file, --validation_file, --test_file or a data set")
    return datasets.DatasetDict(found)


def _texts(rows: datasets.Dataset, split: str, path: str) -> list[str]:
    name, *inner = path.split(".")
    if name not in rows.column_names:
        raise InputError(
            f"the {split} set has the columns {', '.join(rows.column_names)} but no {name!r}: name "
            "the one with the text"
        )
    try:
        texts = list(rows[name])
    except UnicodeDecodeError as error:
        raise InputError(f"the {split} set is not UTF-8, convert it: {error}") from None
    for key in inner:
        texts = [text.get(key) if isinstance(text, dict) else None for text in texts]
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"row {number} of the {split} set has no text under {path!r}: remove the row or "
                "fill it in"
            )
    return texts


def first_rows(rows: datasets.Dataset, split: str, args: Any) -> datasets.Dataset:
    """Keep the first `max_..._samples` rows.

    Args:
        rows: One split.
        split: `train`, `validation` or `test`.
        args: Data arguments.

    Returns:
        The first rows.

    Raises:
        InputError: If none are left.
    """
    bounds = (args.max_train_samples, args.max_eval_samples, args.max_predict_samples)
    bound = dict(zip(SPLITS, bounds, strict=True))[split]
    if bound is not None:
        rows = rows.select(range(min(bound, len(rows))))
    if len(rows) == 0:
        raise InputError(f"the {split} set has no rows: give one with rows")
    return rows


def test_name(path: str) -> str:
    """Return the name of a further test set: that of its file, without folder and endings."""
    return Path(path).name.split(".")[0]


def describe(args: SourceArguments, split: str) -> str:
    """Name the data of one split for the model card.

    Args:
        args: Data arguments.
        split: `train`, `validation` or `test`.

    Returns:
        The label, the Hub id, or the name of the split's local file or folder.
    """
    if args.dataset_label:
        return args.dataset_label
    if args.dataset_name:
        return " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
    return Path(getattr(args, f"{split}_file") or getattr(args, f"{split}_dir", None) or "").name

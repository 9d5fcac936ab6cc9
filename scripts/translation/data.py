"""Sentence pairs: loaded and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
from common.arguments import InputError
from common.source import SPLITS, SourceArguments, first_rows, load_file, load_hub, test_name

from translation.noise import misalign

BUILDERS = dict.fromkeys((".json", ".json.gz", ".jsonl.gz", ".jsonl"), "json")


@dataclass
class DataArguments(SourceArguments):
    """Sentence pairs: a data set on the Hub, or local files."""

    source_lang: str = field(
        kw_only=True, metadata={"help": "Key of the source language in every row: en."}
    )
    target_lang: str = field(
        kw_only=True, metadata={"help": "Key of the target language in every row: de."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, with a column `translation`."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Local .json, .jsonl or .jsonl.gz file; a row is "
            '{"translation": {"en": "...", "de": "..."}}.'
        },
    )
    source_prefix: str = field(
        default="", metadata={"help": "Text put before every source sentence (T5)."}
    )
    max_source_length: int = field(default=128, metadata={"help": "Longest source, in tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longest target, in tokens."})
    extra_test_file: list[str] = field(
        default_factory=list,
        metadata={"help": "More test sets; their scores end with the name of the file: bleu_NAME."},
    )
    misaligned_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of training pairs whose targets are exchanged, to study noise."},
    )
    misaligned_seed: int = field(default=0, metadata={"help": "Seed that chooses these pairs."})


def load_pairs(args: DataArguments) -> datasets.DatasetDict:
    """Load and check all splits.

    Args:
        args: Data arguments.

    Returns:
        The splits that exist, with the columns `source` and `target`.

    Raises:
        InputError: For a missing file, an empty split, or rows without text in both languages.
    """
    raw = _load(args)
    pairs = {
        split: _check(split, first_rows(raw[split], split, args), args)
        for split in SPLITS
        if split in raw
    }
    if not pairs:
        raise InputError("no data: give --train_file, --validation_file, --test_file or a data set")
    if args.misaligned_fraction and "train" in pairs:
        pairs["train"] = misalign(pairs["train"], args.misaligned_fraction, args.misaligned_seed)
    return datasets.DatasetDict(pairs)


def load_extra_tests(args: DataArguments) -> dict[str, datasets.Dataset]:
    """Load and check the further test sets.

    Args:
        args: Data arguments.

    Returns:
        Columns `source` and `target` of each, by its name.

    Raises:
        InputError: For a missing file, a file without rows or text, or two of one name.
    """
    found: dict[str, datasets.Dataset] = {}
    for path in args.extra_test_file:
        name = test_name(path)
        if name in found or name == "test":
            raise InputError(f"--extra_test_file: a second test set is called {name!r}: rename it")
        rows = load_file("extra_test", path, BUILDERS)
        found[name] = _check(name, first_rows(rows, "test", args), args)
    return found


def sentences(pairs: datasets.DatasetDict) -> Iterator[str]:
    """Yield the training text in both languages.

    Args:
        pairs: All splits.

    Yields:
        Sentences.
    """
    rows = pairs.get("train") or next(iter(pairs.values()))
    yield from rows["source"]
    yield from rows["target"]


def _load(args: DataArguments) -> datasets.DatasetDict:
    if args.dataset_name:
        return load_hub(args.dataset_name, args.dataset_config_name)
    named = {split: getattr(args, f"{split}_file") for split in SPLITS}
    return datasets.DatasetDict(
        {split: load_file(split, name, BUILDERS) for split, name in named.items() if name}
    )


def _check(split: str, rows: datasets.Dataset, args: DataArguments) -> datasets.Dataset:
    if "translation" not in rows.column_names:
        raise InputError(
            f"the {split} set has the columns {', '.join(rows.column_names)} but no `translation`: "
            'rows must look like {"translation": {"en": "...", "de": "..."}}'
        )
    try:
        column = list(rows["translation"])
    except UnicodeDecodeError as error:
        raise InputError(f"the {split} set is not UTF-8, convert it: {error}") from None
    sides: dict[str, list[str]] = {"source": [], "target": []}
    for number, row in enumerate(column):
        for side, language in (("source", args.source_lang), ("target", args.target_lang)):
            if not isinstance(row, dict) or language not in row:
                found = ", ".join(row) if isinstance(row, dict) else repr(row)
                raise InputError(
                    f"row {number} of the {split} set has no {language!r} (it has: {found}): "
                    f"check --{side}_lang"
                )
            text = row[language]
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"row {number} of the {split} set has no text under {language!r}: remove the "
                    "row or fill it in"
                )
            sides[side].append(text)
    return datasets.Dataset.from_dict(sides)

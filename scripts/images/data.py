"""Images and labels: loaded and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from common.arguments import InputError
from common.source import SPLITS, SourceArguments, first_rows, load_file, load_hub

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".jsonl.gz": "json"}


@dataclass
class DataArguments(SourceArguments):
    """Labelled images: a data set on the Hub, local files or folders of images."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub, with images and labels."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Local .parquet file (encoded images), or .json, .jsonl or .jsonl.gz file "
            "(paths of images)."
        },
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with one folder of images for each class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Like train_dir."})
    test_dir: str | None = field(default=None, metadata={"help": "Like train_dir."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    validation_rows: int = field(
        default=0,
        metadata={
            "help": "Take this many of the last training rows as validation set; rows must be in "
            "random order."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "New model: height and width to which images are scaled. Default: no scaling. "
            "A pretrained model has its own size."
        },
    )
    num_channels: int | None = field(
        default=None,
        metadata={"help": "New model: 1 (grey) or 3 (colour). Default: as in the first image."},
    )
    crop_padding: int = field(
        default=0,
        metadata={"help": "Training: crop at random after padding by this many pixels; CIFAR: 4."},
    )
    flip: bool = field(
        default=False, metadata={"help": "Training: mirror every second image at random."}
    )

    def __post_init__(self) -> None:
        checks = {
            "validation_rows": self.validation_rows >= 0,
            "crop_padding": self.crop_padding >= 0,
            "image_size": self.image_size is None or self.image_size > 0,
            "num_channels": self.num_channels in {None, 1, 3},
        }
        for name, good in checks.items():
            if not good:
                raise ValueError(f"--{name} cannot be {getattr(self, name)}")


def load_splits(args: DataArguments) -> datasets.DatasetDict:
    """Load and check all splits.

    Args:
        args: Data arguments.

    Returns:
        The splits that exist, with the columns `image` and `label`.

    Raises:
        InputError: For a missing file or folder, missing columns or an empty split.
    """
    raw = _load(args)
    splits = {name: _columns(name, raw[name], args) for name in SPLITS if name in raw}
    if not splits:
        raise InputError(
            "no data: give --train_file, --validation_file, --test_file, folders or a data set"
        )
    if args.validation_rows:
        splits |= _held_out(splits, args.validation_rows)
    return datasets.DatasetDict(
        {name: first_rows(rows, name, args) for name, rows in splits.items()}
    )


def class_names(rows: datasets.Dataset) -> list[str]:
    """Name the classes of a split.

    Args:
        rows: A split.

    Returns:
        The names in the data, or else numbers as text.

    Raises:
        InputError: If labels are neither names nor whole numbers from 0 on.
    """
    feature = rows.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    labels = [label for label in rows["label"] if label is not None]
    if labels and all(isinstance(label, str) for label in labels):
        return sorted(set(labels))
    if labels and all(isinstance(label, int) and label >= 0 for label in labels):
        return [str(number) for number in range(max(labels) + 1)]
    raise InputError(
        f"labels must be class names or whole numbers from 0 on, not like {rows['label'][0]!r}: "
        "check --label_column"
    )


def class_numbers(split: str, rows: datasets.Dataset, names: Sequence[str]) -> list[int]:
    """Turn the labels of a split into numbers of the given classes, by name.

    Args:
        split: Its name, for errors.
        rows: The split.
        names: Class names of the model.

    Returns:
        A number for each row.

    Raises:
        InputError: For a label that is missing or not among the classes.
    """
    feature = rows.features["label"]
    own = feature.names if isinstance(feature, datasets.ClassLabel) else None
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for row, label in enumerate(rows["label"]):
        known = label is not None and (own is None or 0 <= label < len(own))
        name = str(own[label] if own is not None else label) if known else None
        if name not in numbers:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise InputError(
                f"row {row} of the {split} set has the label {name or label!r}, which is none of "
                f"the {len(names)} classes ({shown}): check --label_column"
            )
        found.append(numbers[name])
    return found


def _load(args: DataArguments) -> dict[str, datasets.Dataset]:
    if args.dataset_name:
        return load_hub(args.dataset_name, args.dataset_config_name)
    splits = {}
    for split in SPLITS:
        file, folder = getattr(args, f"{split}_file"), getattr(args, f"{split}_dir")
        if file and folder:
            raise InputError(f"give --{split}_file or --{split}_dir, not both")
        if file:
            splits[split] = load_file(split, file, BUILDERS)
        elif folder:
            splits[split] = _load_folder(split, folder)
    return splits


def _load_folder(split: str, folder: str) -> datasets.Dataset:
    if not Path(folder).is_dir():
        raise InputError(f"--{split}_dir: there is no folder {folder!r}: check the path")
    try:
        # Without drop_labels=False, images of a single class would have no labels.
        return datasets.load_dataset("imagefolder", data_dir=folder, split="all", drop_labels=False)
    except (
        datasets.exceptions.DatasetGenerationError,
        datasets.exceptions.DataFilesNotFoundError,
        ValueError,
        OSError,
    ) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"--{split}_dir: {folder!r} has no images by class: {reason}") from None


def _columns(split: str, rows: datasets.Dataset, args: DataArguments) -> datasets.Dataset:
    wanted = {"image": args.image_column, "label": args.label_column}
    if args.image_column == args.label_column:
        raise InputError("--image_column and --label_column are the same: choose two columns")
    for kind, name in wanted.items():
        if name not in rows.column_names:
            raise InputError(
                f"the {split} set has the columns {', '.join(rows.column_names)} but no {name!r}: "
                f"check --{kind}_column"
            )
    rows = rows.select_columns(list(wanted.values()))
    rows = rows.rename_columns({name: kind for kind, name in wanted.items()})
    if isinstance(rows.features["image"], datasets.Image):
        return rows
    try:
        return rows.cast_column("image", datasets.Image())
    except (TypeError, ValueError, NotImplementedError, datasets.table.CastError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the column {args.image_column!r} of the {split} set has no images ({reason}): check "
            "--image_column"
        ) from None


def _held_out(splits: dict[str, Any], count: int) -> dict[str, Any]:
    if "train" not in splits or "validation" in splits:
        raise InputError(
            "--validation_rows needs a training set and no other validation set: leave one out"
        )
    rows = splits["train"]
    if count >= len(rows):
        raise InputError(f"--validation_rows {count} leaves none of the {len(rows)} training rows")
    kept = rows.select(range(len(rows) - count))
    last = rows.select(range(len(rows) - count, len(rows)))
    if count > 1 and len(set(last["label"])) == 1 < len(set(kept["label"])):
        raise InputError(
            f"the last {count} training rows are all of one class: shuffle the rows, or give a "
            "validation set"
        )
    return {"train": kept, "validation": last}

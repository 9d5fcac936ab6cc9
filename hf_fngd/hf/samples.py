"""Which data set rows are in a batch: an index column, or a hash of the content as the fallback."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from torch import Tensor

INDEX_COLUMN = "fngd_row"
# Odd 64-bit constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers.
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


# ---- index column ----------------------------------------------------------------------------


class IndexedDataset(torch.utils.data.Dataset):
    """Gives every item of a data set its row number.

    Args:
        rows: A data set with a length.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return _number(self.rows[row], row)

    def __getitems__(self, rows: list[int]) -> list[Any]:  # noqa: PLW3201
        many = getattr(self.rows, "__getitems__", None)
        items = many(rows) if many is not None else [self.rows[row] for row in rows]
        return [_number(item, row) for item, row in zip(items, rows, strict=True)]


class IndexCollator:
    """Carries the row numbers past a data collator, as a list of ints under `INDEX_COLUMN`.

    Args:
        collator: The collator of the user. Rows without a number pass through unchanged.
        as_tensor: Whether the numbers are a tensor instead, as they must be where one process reads
            the batches of all; a list is not moved to the device and back.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], as_tensor: bool = False) -> None:
        self.collator, self.as_tensor = collator, as_tensor

    def __call__(self, features: list[Any]) -> Any:  # noqa: D102
        rows: list[int] = []
        items: list[Any] = []
        for feature in features:
            if isinstance(feature, _NumberedItem):
                rows.append(feature.row)
                items.append(feature.item)
            elif isinstance(feature, Mapping) and INDEX_COLUMN in feature:
                rows.append(int(feature[INDEX_COLUMN]))
                items.append({k: v for k, v in feature.items() if k != INDEX_COLUMN})
            else:
                items.append(feature)
        batch = self.collator(items)
        if len(rows) == len(features) and hasattr(batch, "__setitem__"):
            batch[INDEX_COLUMN] = torch.tensor(rows) if self.as_tensor else rows
        return batch


class _NumberedItem:
    """An item that is no mapping, with its row number."""

    def __init__(self, item: Any, row: int) -> None:
        self.item, self.row = item, row


def _number(item: Any, row: int) -> Any:
    return {**item, INDEX_COLUMN: row} if isinstance(item, Mapping) else _NumberedItem(item, row)


def with_index(dataset: Any) -> Any:
    """Adds row numbers to a training set.

    Args:
        dataset: A data set with a length.

    Returns:
        A `datasets.Dataset` with the column where that works, else a wrapper.
    """
    if isinstance(dataset, datasets.Dataset) and INDEX_COLUMN not in dataset.column_names:
        indexed = dataset.add_column(INDEX_COLUMN, list(range(len(dataset))))
        # A transform may drop columns it does not know.
        if len(indexed) and INDEX_COLUMN in indexed[0]:
            return indexed
    return IndexedDataset(dataset)


def fingerprint(dataset: Any) -> str:
    """Identifies a data set by its length and, for `datasets`, by columns and a few rows.

    Args:
        dataset: Any data set; one without a length has the length -1.

    Returns:
        Short text that changes with the data, but not with transforms or caches.
    """
    length = len(dataset) if hasattr(dataset, "__len__") else -1
    text = f"{length} rows"
    if isinstance(dataset, datasets.Dataset) and length > 0:
        plain = dataset.with_format("arrow")
        columns = [name for name in dataset.column_names if name != INDEX_COLUMN]
        chosen = sorted({round(i * (length - 1) / 7) for i in range(8)})
        rows = [plain[i].select(columns).to_pylist() for i in chosen]
        digest = hashlib.sha256(repr((columns, rows)).encode()).hexdigest()[:12]
        text += f", content {digest}"
    return text


# ---- content hash ----------------------------------------------------------------------------


def content_ids(
    inputs: Mapping[str, Any], pad_token_id: int | None = None, eos_token_id: int = -1
) -> list[int]:
    """Identifies samples by their tokens (or pixels) and labels, whatever the padding.

    Args:
        inputs: The model's inputs.
        pad_token_id: Padding of `decoder_input_ids`, which have no mask.
        eos_token_id: End token of the labels that these were shifted from.

    Returns:
        A 64-bit integer for each row. Anything random in the inputs (augmentation, masking) makes
        it a new one every epoch.
    """
    total: Tensor | None = None
    for salt, key in enumerate(_hashed_keys(inputs)):
        values = inputs[key].detach()
        if values.is_floating_point():
            values = values.float().contiguous().view(torch.int32)
        values = values.reshape(len(values), -1).long()
        mask = torch.ones_like(values, dtype=torch.bool)
        if key == "input_ids" and inputs.get("attention_mask") is not None:
            given = inputs["attention_mask"]
            mask = given.bool() if given.shape == values.shape else mask
        elif key == "labels":
            mask = values != -100
        elif key == "decoder_input_ids" and pad_token_id is not None:
            # Shifted labels: the longest row of a batch has lost its last token, the end token.
            mask = (values != pad_token_id) & (values != eos_token_id)
        rank = mask.cumsum(1)
        mixed = _mix(_mix(values + salt + 1) + rank * _MIX[0]) * mask
        total = mixed.sum(1) if total is None else _mix(total) + mixed.sum(1)
    assert total is not None
    return total.tolist()


def _hashed_keys(inputs: Mapping[str, Any]) -> list[str]:
    main = [k for k in ("input_ids", "pixel_values", "input_features") if _is_tensor(inputs, k)]
    if not main:
        main = [k for k in inputs if _is_tensor(inputs, k) and inputs[k].dim() > 0][:1]
    extra = [k for k in ("labels", "decoder_input_ids") if _is_tensor(inputs, k)][:1]
    return [*main, *(k for k in extra if k not in main)]


def _is_tensor(inputs: Mapping[str, Any], key: str) -> bool:
    return isinstance(inputs.get(key), Tensor)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))

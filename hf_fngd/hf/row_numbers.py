"""Row numbers of a Trainer's batches, which travel beside the batch and not in it.

`number` changes a prepared data loader inside: its data set notes which rows a batch asks for, its
collator puts the batch and the numbers into one tuple, and the loader takes them apart when it
hands the batch out. In between worker processes, pinned memory and accelerate treat the tuple like
any other. The numbers then lie on the batch's tensors as an attribute, where `rows_of` finds them:
no order of batches is assumed, and copies of the batch keep its tensors. Data set, collator and
batch are the user's own wherever the user meets them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor

_MARK = "_fngd_rows"


class NumberedBatch(NamedTuple):
    """A batch on its way from the collator to the loader's user.

    Attributes:
        batch: The user's batch.
        rows: Its row numbers.
    """

    batch: Any
    rows: list[int] | Tensor


class _Items(NamedTuple):
    """What the data set gave for a batch, and the numbers of its rows."""

    items: Any
    rows: list[int]


class _NotedRows:
    """A data set that notes which rows a batch asks for; everything else is the data set's."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["noted"] = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["noted"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.noted, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self.noted.__class__

    def __reduce__(self) -> tuple[Any, ...]:
        return _NotedRows, (self.noted,)

    def __len__(self) -> int:
        return len(self.noted)

    def __getitem__(self, row: Any) -> Any:
        return self.noted[row]

    def __getitems__(self, rows: Sequence[Any]) -> Any:  # noqa: PLW3201
        many = getattr(self.noted, "__getitems__", None)
        items = many(rows) if many else [self.noted[row] for row in rows]
        try:
            return _Items(items, [operator.index(row) for row in rows])
        except TypeError:  # A sampler of keys, not of numbers.
            return items


class _Collator:
    """Calls the user's collator and adds the row numbers.

    Args:
        collator: The collator of the user.
        as_tensor: Whether the numbers are a tensor, as they must be where one process reads the
            batches of all; a list is not moved to the device and back.
    """

    def __init__(self, collator: Callable[[Any], Any], as_tensor: bool) -> None:
        self.collator, self.as_tensor = collator, as_tensor

    def __call__(self, items: Any) -> Any:
        if not isinstance(items, _Items):
            return self.collator(items)
        batch = self.collator(items.items)
        return NumberedBatch(batch, torch.tensor(items.rows) if self.as_tensor else items.rows)


@functools.cache
def _numbered_class(kind: type) -> type:
    """Return a subclass of one of accelerate's loaders that hands out plain batches."""

    def dataset(self: Any) -> Any:
        return self.base_dataloader.dataset.noted

    def collate_fn(self: Any) -> Any:
        return self.base_dataloader.collate_fn.collator

    def hand_out(self: Any) -> Iterator[Any]:
        for given in kind.__iter__(self):  # type: ignore[attr-defined]
            yield _unnumbered(given) if isinstance(given, NumberedBatch) else given

    members = {
        "__module__": kind.__module__,
        "__iter__": hand_out,
        "dataset": property(dataset),
        "collate_fn": property(collate_fn),
    }
    return type(kind.__name__, (kind, _Numbered), members)


class _Numbered:
    """Marks the classes of loaders that `number` has changed."""


def number(loader: Any) -> Any:
    """Let a data loader note the row numbers of every batch that it hands out.

    Args:
        loader: A loader that accelerate has prepared. Any other one, and one without numbered
            rows, stays as it is.

    Returns:
        The same loader.
    """
    kind: Any = type(loader)
    prepared = isinstance(loader, DataLoaderShard | DataLoaderDispatcher)
    if not prepared or issubclass(kind, _Numbered) or loader.batch_sampler is None:
        return loader
    base = loader.base_dataloader
    if not has_rows(base.dataset):
        return loader
    # torch forbids to assign a data set, accelerate to assign a class.
    vars(base)["dataset"] = _NotedRows(base.dataset)
    base.collate_fn = _Collator(base.collate_fn, isinstance(loader, DataLoaderDispatcher))
    vars(object)["__class__"].__set__(loader, _numbered_class(kind))
    return loader


def numbered_again(skip: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap accelerate's `skip_first_batches`, which makes a new loader of the user's parts.

    Args:
        skip: The function.

    Returns:
        The same function, with row numbers where the first loader had them.
    """

    def skip_first_batches(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        rest = skip(dataloader, *args, **kwargs)
        return number(rest) if issubclass(type(dataloader), _Numbered) else rest

    return skip_first_batches


def has_rows(dataset: Any) -> bool:
    """Return whether a data set has numbered rows; streams have none, with or without a length."""
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        return False
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def rows_of(batch: Any) -> list[int] | None:
    """Find the row numbers of a batch that a numbered loader handed out.

    Args:
        batch: The batch or a part of it: tensors, nested in mappings, lists and tuples.

    Returns:
        Row numbers, or None where there are none.
    """
    found = (getattr(tensor, _MARK, None) for _, tensor in named_tensors(batch))
    return next((rows for rows in found if rows is not None), None)


def _unnumbered(given: NumberedBatch) -> Any:
    rows = given.rows.tolist() if isinstance(given.rows, Tensor) else given.rows
    for _, tensor in named_tensors(given.batch):
        # A tensor that comes with several batches does not tell which one it is.
        before = getattr(tensor, _MARK, rows)
        setattr(tensor, _MARK, rows if before == rows else None)
    return given.batch


def named_tensors(batch: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Find the tensors of a nested batch.

    Args:
        batch: Tensors, nested in mappings, lists and tuples.
        prefix: Beginning of all names.

    Yields:
        Each tensor with its dotted name.
    """
    items: Iterable[tuple[Any, Any]] = batch.items() if isinstance(batch, Mapping) else ()
    if isinstance(batch, list | tuple):
        items = enumerate(batch)
    for name, value in items:
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from named_tensors(value, f"{prefix}{name}.")

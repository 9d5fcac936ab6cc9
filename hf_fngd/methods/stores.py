"""Where FNGD keeps coefficients between epochs: one a data set row and layer, or one a layer.

Both stores answer the same calls: `start_epoch`, `write`, `read`, `values`, `drop`, `merge`,
`state_dict` and `load_state_dict`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.errors import FNGDError
from hf_fngd.ranks import gather

_MIB = 2**20
_GROWTH = 1.25
_MIN_ROWS = 256
# Rows that ranks exchange, or whose mean is taken, at a time.
_PIECE = 2**18


class LayerStore:
    """The mean of all coefficients of a layer, for each layer (share=layer).

    Args:
        num_layers: Number of selected layers.
    """

    def __init__(self, num_layers: int) -> None:
        # Sum and count; `local` is what this rank has collected since the last merge.
        self.total, self.local = torch.zeros(2, 2, num_layers, dtype=torch.float64, device="cpu")

    def start_epoch(self, collecting: bool) -> None:
        """Forget everything before coefficients are collected anew."""
        if collecting:
            self.total.zero_()
            self.local.zero_()

    def write(self, rows: Tensor | None, values: Tensor) -> None:
        """Add the coefficients of a batch to the means.

        Args:
            rows: Not needed here.
            values: Matrix `[N, layers]`; NaN entries are skipped.
        """
        self.local[0] += values.nansum(0, dtype=torch.float64)
        self.local[1] += (~values.isnan()).sum(0)

    def read(self, rows: Tensor | None) -> Tensor:
        """Return the means as float32 `[1, layers]`, with 1 where nothing was collected."""
        total, count = self.total + self.local
        return (total / count).nan_to_num(1.0).float().unsqueeze(0)

    def values(self) -> Tensor:
        """Return the means as float32 `[1, layers]`, with NaN where nothing was collected."""
        total, count = self.total + self.local
        return (total / count).float().unsqueeze(0)

    def drop(self, layer: int) -> None:
        """Forget the coefficients of one layer."""
        self.total[:, layer] = self.local[:, layer] = 0.0

    def merge(self) -> None:
        """Make the store equal on all ranks: sums and counts are added."""
        parts = gather(self.local)
        if parts is not None:
            self.total += torch.stack(parts).sum(0)
            self.local.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the content as tensors."""
        return {"total": self.total.clone(), "local": self.local.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the content from `state_dict`."""
        self.total, self.local = state["total"].cpu().clone(), state["local"].cpu().clone()


class SampleStore:
    """One coefficient for each data set row and layer (share=sample).

    Memory: 4 bytes (float32) or 2 (float16) x samples x layers. Ids are row numbers below
    `num_samples`, or any 64-bit integers, which also need a dictionary. With these, or without
    `num_samples`, the table grows by a quarter at a time as ids appear, and each new epoch cuts it
    to size. With a folder the table lies in a file there, and so does the copy from which a
    checkpoint is written.

    Args:
        num_layers: Number of selected layers.
        dtype: torch.float32 or torch.float16.
        num_samples: Rows of the data set, if known. An epoch that reuses coefficients adds no
            samples beyond it, so that contents that change all the time do not fill the memory.
        folder: Folder of the table; None for main memory.
    """

    def __init__(
        self,
        num_layers: int,
        dtype: torch.dtype,
        num_samples: int | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.folder = folder
        # Unknown rows hold zeros, which take no room before they are written to.
        self.table = zeros(0, num_layers, dtype, folder)
        self.rows: dict[int, int] | None = None
        self.known = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.dirty = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._means: Tensor | None = None

    def start_epoch(self, collecting: bool) -> None:
        """Give back the memory of rows that growth left unused."""
        if collecting and self.rows is not None and len(self.rows) > (self.num_samples or 0):
            # All coefficients are computed anew, and contents that have changed never come back.
            self.clear()
        if self._used() < len(self.table):
            self._resize(self._used())

    def clear(self) -> None:
        """Forget all samples."""
        self.table = self.table[:0].clone()
        self.known, self.dirty = torch.zeros(2, 0, dtype=torch.bool, device="cpu")
        self.rows = self._means = None

    def locate(self, ids: Sequence[int], *, create: bool, bounded: bool = False) -> Tensor:
        """Find the table rows of sample ids.

        Args:
            ids: Sample ids of a batch.
            create: Whether to make rows for new ids.
            bounded: Whether to make no more of them than the data set has rows.

        Returns:
            Row numbers `[N]`, -1 where an id has none.
        """
        expected = self.num_samples or 0
        if self.rows is None and not all(0 <= i < expected for i in ids):
            # Ids other than row numbers; the numbers that came before keep their rows.
            self.rows = {i: i for i in range(len(self.table))}
        if self.rows is None:
            if len(self.table) == 0:
                self._resize(expected)
            return _numbers(ids)
        if create:
            for i in ids:
                if not bounded or self.num_samples is None or len(self.rows) < self.num_samples:
                    self.rows.setdefault(i, len(self.rows))
            if len(self.rows) > len(self.table):
                grown = max(_MIN_ROWS, int(len(self.table) * _GROWTH), len(self.rows))
                self._resize(min(grown, expected) if len(self.rows) <= expected else grown)
        return _numbers([self.rows.get(i, -1) for i in ids])

    def _resize(self, rows: int) -> None:
        known, dirty = torch.zeros(2, rows, dtype=torch.bool, device="cpu")
        kept = min(rows, len(self.table))
        known[:kept], dirty[:kept] = self.known[:kept], self.dirty[:kept]
        self.table = self._copy(self.table[:kept], rows)
        self.known, self.dirty = known, dirty

    def _copy(self, table: Tensor, rows: int) -> Tensor:
        copy = zeros(rows, self.table.shape[1], self.table.dtype, self.folder)
        copy[: len(table)] = table
        return copy

    def count_known(self, rows: Tensor) -> int:
        """Count the rows of a batch that have coefficients."""
        return int(self.known[rows[rows >= 0]].sum())

    def read(self, rows: Tensor | None) -> Tensor:
        """Look up the coefficients of a batch for all layers at once.

        Args:
            rows: Row numbers from `locate`.

        Returns:
            float32 matrix `[N, layers]`; a missing entry is the layer's mean over all rows, or 1.
        """
        assert rows is not None
        values = self._stored(rows.clamp(min=0)).float()
        values[rows < 0] = torch.nan
        missing = values.isnan()
        if missing.any():
            values = torch.where(missing, self._layer_means(), values)
        return values

    def _stored(self, rows: Tensor) -> Tensor:
        if len(self.table) == 0:
            return self.table.new_full((len(rows), self.table.shape[1]), torch.nan)
        return self.table[rows].masked_fill_(~self.known[rows].unsqueeze(1), torch.nan)

    def _layer_means(self) -> Tensor:
        if self._means is None:
            total, count = torch.zeros(2, self.table.shape[1], dtype=torch.float64, device="cpu")
            for rows in self.known.nonzero().squeeze(1).split(_PIECE):
                part = self.table[rows].float()
                total += part.nansum(0, dtype=torch.float64)
                count += (~part.isnan()).sum(0)
            self._means = (total / count).nan_to_num(1.0).float()
        return self._means

    def values(self) -> Tensor:
        """Return all coefficients as float32 `[rows, layers]`, with NaN where nothing is stored."""
        used = self._used()
        return self.table[:used].float().masked_fill(~self.known[:used].unsqueeze(1), torch.nan)

    def _used(self) -> int:
        # Growth leaves rows that no sample has.
        return len(self.table) if self.rows is None else len(self.rows)

    def write(self, rows: Tensor | None, values: Tensor) -> None:
        """Store the coefficients of a batch.

        Args:
            rows: Row numbers from `locate`.
            values: Matrix `[N, layers]`; NaN entries change nothing.
        """
        assert rows is not None
        keep = rows >= 0
        self._means = None
        limit = torch.finfo(self.table.dtype).max
        rows, values = rows[keep], values[keep].clamp(-limit, limit).to(self.table)
        self.table[rows] = torch.where(values.isnan(), self._stored(rows), values)
        filled = rows[~values.isnan().all(1)]
        self.known[filled] = True
        self.dirty[filled] = True

    def drop(self, layer: int) -> None:
        """Forget the coefficients of one layer."""
        self.table[self.known, layer] = torch.nan
        self._means = None

    def merge(self) -> None:
        """Make the store equal on all ranks; a row seen by several gets the mean."""
        mine = self.dirty.nonzero().squeeze(1)
        ids = mine if self.rows is None else _numbers(list(self.rows))[mine]
        counts = gather(len(ids))
        if counts is not None:
            pieces = 1 + sum(counts) // _PIECE
            for piece in range(pieces):
                here = ids.remainder(pieces) == piece
                self._write_mean(gather((ids[here], self.table[mine[here]])) or [])
        self.dirty.zero_()

    def _write_mean(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        ids, place = torch.cat([ids for ids, _ in parts]).unique(return_inverse=True)
        values = torch.cat([values for _, values in parts]).float()
        total, count = torch.zeros(2, len(ids), values.shape[1], device="cpu")
        total.index_add_(0, place, values.nan_to_num(0.0))
        count.index_add_(0, place, (~values.isnan()).float())
        self.write(self.locate(ids.tolist(), create=True), total / count)

    def state_dict(self) -> dict[str, Any]:
        """Return the content as tensors and builtins."""
        ids = None if self.rows is None else _numbers(list(self.rows))
        used = self._used()
        return {
            "table": self._copy(self.table[:used], used),
            "known": self.known[:used].clone(),
            "ids": ids,
            "num_samples": self.num_samples,
            "dirty": self.dirty[:used].clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the content from `state_dict`.

        Args:
            state: The saved content.

        Raises:
            FNGDError: If it belongs to a data set of another size.
        """
        saved = state["num_samples"]
        if None not in (saved, self.num_samples) and saved != self.num_samples:
            raise FNGDError(
                f"the checkpoint's coefficients belong to a data set of {saved} rows, this one has "
                f"{self.num_samples}: resume with the same data, or start without the checkpoint"
            )
        self._means = None
        self.num_samples = self.num_samples or saved
        self.table = self._copy(state["table"], len(state["table"]))
        self.known = state["known"].cpu().clone()
        ids = state["ids"]
        self.rows = None if ids is None else {i: row for row, i in enumerate(ids.tolist())}
        self.dirty = state["dirty"].cpu().clone()


def _numbers(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device="cpu")


def zeros(rows: int, columns: int, dtype: torch.dtype, folder: str | os.PathLike | None) -> Tensor:
    """Make a matrix of zeros, in memory or in a private file.

    The file has lost its name when this returns: no other process finds it, and nothing of it is
    left when the matrix is gone, however the process ends.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        dtype: Type of the entries.
        folder: Folder of the file; None for main memory.

    Returns:
        The matrix `[rows, columns]`.

    Raises:
        FNGDError: If there is no such folder, or no room in it.
    """
    count = rows * columns
    if folder is None or count == 0:
        return torch.zeros(rows, columns, dtype=dtype, device="cpu")
    size = count * dtype.itemsize
    try:
        descriptor, path = tempfile.mkstemp(prefix="hf_fngd-", dir=folder)
        try:
            # A mapped file that later finds the disk full ends the process (SIGBUS).
            os.posix_fallocate(descriptor, 0, size)
            table = torch.from_file(path, shared=True, size=count, dtype=dtype, device="cpu")
        finally:
            os.close(descriptor)
            os.unlink(path)
    except (OSError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not on this system"
        raise FNGDError(
            f"store_dir={str(folder)!r} cannot take the {size / _MIB:.0f} MiB of coefficients "
            f"({reason}): name a folder with room for them, leave store_dir out, or set "
            "share=layer, which needs little"
        ) from None
    return table.view(rows, columns)

"""The batch under way: its samples, and which forward pass of which layer belongs to it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.errors import FNGDError
from hf_fngd.layers.calls import Call

logger = logging.getLogger(__name__)
_keys = itertools.count(1)

# A call and the number of the backward pass that it belongs to.
Delivery = tuple[int, Call]


class Batch:
    """One micro-batch.

    `fresh` is decided when the batch opens, since the forward pass already depends on it: layers
    gather all their calls before a method computes something from them, and pass each call by
    itself where its weights are known.

    Args:
        size: Number of rows; None until the first layer shows it.
        fresh: Whether the method computes something from this batch's gradients.
        lengths: Positions of each sample, where one row holds several samples.
    """

    def __init__(self, size: int | None, fresh: bool, lengths: list[int] | None = None) -> None:
        self.size = size if lengths is None else 1
        self.fresh, self.lengths = fresh, lengths
        # Whether `set_batch` opened it, and not the first layer of a forward pass.
        self.announced = size is not None
        # Whether a backward pass has gone through it, and the layers that did so.
        self.used = False
        self.delivered: set[int] = set()
        self.first_layer = ""
        # Parameters behind their gate, and the calls that have been delivered, by layer number.
        self.gates: dict[int, tuple[Tensor, Tensor | None, list[Delivery]]] = {}
        # For a method that keeps coefficients: samples that have some, of how many that were looked
        # up; its store's rows `[N]` and γ `[N, layers]`.
        self.looked_up = (0, 0)
        self.rows: Tensor | None = None
        self.gamma: Tensor | None = None

    def samples(self, rows: int) -> int:
        """Return the number of samples in a batch of so many rows."""
        return rows if self.lengths is None else len(self.lengths)


class Batches:
    """The open batches of one optimizer; holds neither the optimizer nor the model.

    Args:
        names: Paths of the captured layers.
        title: Name of the method, for messages.
    """

    def __init__(self, names: Sequence[str], title: str) -> None:
        self.names, self.title = list(names), title
        # Whether forward passes are captured at all, and whether the next batch is a fresh one.
        self.active = True
        self.fresh = True
        # Why a forward pass without `set_batch` is refused, if it is.
        self.must_announce: str | None = None
        self.current: Batch | None = None
        self.left_out: set[str] = set()
        # Layers (`LayerMethod`) that will break a compiled graph from the next step on, since
        # checkpointing allows no other way through a layer before.
        self.to_gate: list[Any] = []
        # For compiled graphs: announced batches by number, and the number of the last one.
        self.by_key: dict[int, Batch] = {}
        self.key = torch.tensor(0)
        self._warned: set[str] = set()
        self._pass = -1

    def open(self, batch: Batch) -> None:
        """Make a batch the current one, for eager and compiled forward passes."""
        self._drop_gates()
        self.current = batch
        if batch.announced:
            key = next(_keys)
            self.by_key[key], self.key = batch, torch.tensor(key)

    def of_forward(self, rows: int, name: str) -> Batch | None:
        """Find the batch that a layer's forward pass belongs to.

        Args:
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch, or None if the layer is left alone: nothing is captured now, or the layer
            does not have one row a sample.

        Raises:
            FNGDError: If the batch had to be announced and was not, or layers disagree about its
                size.
        """
        if not self.active:
            return None
        batch = self.current
        if batch is None or (not batch.announced and batch.used and backward_pass() == -1):
            if self.must_announce:
                raise FNGDError(self.must_announce)
            batch = Batch(None, self.fresh)
            self.open(batch)
        if batch.size is None:
            batch.size, batch.first_layer = rows, name
        return batch if self._fits(batch, rows, name) else None

    def of_graph(self, key: int, rows: int, name: str) -> Batch | None:
        """Find the batch of a compiled forward pass, during its backward pass.

        Args:
            key: Number of the batch, 0 if it was not announced.
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch, or None if the layer is left alone.

        Raises:
            FNGDError: As in `of_forward`, or if the batch has been closed.
        """
        if key:
            if key not in self.by_key:
                raise FNGDError(
                    "the backward pass of a compiled model came after the optimizer step of its "
                    "batch: call backward before step()"
                )
            batch = self.by_key[key]
            return batch if self._fits(batch, rows, name) else None
        # Unannounced batch: each backward pass is a batch.
        number = backward_pass()
        if self.current is not None and not self.current.announced and self._pass != number:
            self.current = None
        self._pass = number
        return self.of_forward(rows, name)

    def _fits(self, batch: Batch, rows: int, name: str) -> bool:
        if rows == batch.size:
            return True
        if not batch.announced:
            raise FNGDError(
                f"layers disagree about the batch size ({batch.first_layer}: {batch.size}, "
                f"{name}: {rows}): call set_batch(sample_ids=...), or exclude the layer whose "
                "first dimension is not the batch"
            )
        self.left_out.add(name)
        self.warn_once(
            name, f"is left out: its first dimension {rows} is not the batch {batch.size}"
        )
        if len(self.left_out) == len(self.names):
            self.warn_once(
                "all layers",
                "are left out, so there is no natural gradient: announce as many samples as the "
                "batch has rows",
            )
        return False

    def warn_once(self, name: str, text: str) -> None:
        """Log a warning, the first time it is due.

        Args:
            name: Path of the layer that it is about, or another subject.
            text: The warning.
        """
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s: %s %s", self.title, name, text)

    def close(self) -> None:
        """Forget all open batches: the next forward pass belongs to another one."""
        self._drop_gates()
        self.current = None
        self.by_key.clear()
        self.key = torch.tensor(0)
        for layer in self.to_gate:
            layer.gated = True
        self.to_gate.clear()

    def _drop_gates(self) -> None:
        # A forward pass without a backward pass would otherwise keep itself alive by its gates.
        if self.current is not None:
            self.current.gates.clear()


def backward_pass() -> int:
    """Return the number of the backward pass that autograd runs in this thread, -1 for none.

    During recomputation by activation checkpointing a forward pass runs inside a backward pass.
    """
    return torch._C._current_graph_task_id()

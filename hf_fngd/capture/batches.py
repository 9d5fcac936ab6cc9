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
        size: Number of rows; None until the first layer delivers a gradient.
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
        # Layers (`LayerMethod`) that a forward pass called with another number of rows; those
        # whose rows turned out to be samples, and the others with their number of rows.
        self.odd: set[Any] = set()
        self.fits: set[Any] = set()
        self.misfits: dict[Any, int] = {}
        # Parameters behind their gate, and the calls that have been delivered, by layer number.
        self.gates: dict[int, tuple[Tensor, Tensor | None, list[Delivery]]] = {}
        # For a method that keeps coefficients: samples that have some, of how many that were looked
        # up; its store's rows `[N]` and γ `[N, layers]`.
        self.looked_up = (0, 0)
        self.rows: Tensor | None = None
        self.gamma: Tensor | None = None
        # The columns of γ in the devices and precisions in which they are needed.
        self.columns: dict[Any, tuple[Tensor, ...]] = {}


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
        # Paths of layers that have plain gradients for good, and of those that have them until
        # they fit a batch.
        self.left_out: set[str] = set()
        self.unfit: set[str] = set()
        # Layers (`LayerMethod`) that will break a compiled graph from the next step on, since
        # checkpointing allows no other way through a layer before.
        self.to_gate: list[Any] = []
        # Layers that are left out; their forward passes are captured until the step, because
        # recomputation by checkpointing must do what the original did.
        self._to_skip: list[Any] = []
        # Batches since the last step; for compiled graphs also by number, with the last number.
        self._opened: list[Batch] = []
        self.by_key: dict[int, Batch] = {}
        self.key = torch.tensor(0, device="cpu")
        self._warned: set[str] = set()
        self._pass = -1

    def open(self, batch: Batch) -> None:
        """Make a batch the current one, for eager and compiled forward passes."""
        self._drop_gates()
        self.current = batch
        self._opened.append(batch)
        if batch.announced:
            key = next(_keys)
            self.by_key[key], self.key = batch, torch.tensor(key, device="cpu")

    def of_forward(self, layer: Any, rows: int) -> Batch | None:
        """Find the batch that a layer's forward pass belongs to.

        Args:
            layer: The layer's method.
            rows: First dimension of the layer's input.

        Returns:
            The batch, or None if nothing is captured now.

        Raises:
            FNGDError: If the batch had to be announced and was not.
        """
        if not self.active:
            return None
        batch = self.current
        if batch is None or (not batch.announced and batch.used and backward_pass() == -1):
            if self.must_announce:
                raise FNGDError(self.must_announce)
            batch = Batch(None, self.fresh)
            self.open(batch)
        if batch.announced and rows != batch.size:
            batch.odd.add(layer)
        return batch

    def of_graph(self, layer: Any, key: int, rows: int) -> Batch | None:
        """Find the batch of a compiled forward pass, during its backward pass.

        Args:
            layer: The layer's method.
            key: Number of the batch, 0 if it was not announced.
            rows: First dimension of the layer's input.

        Returns:
            The batch, or None if nothing is captured now.

        Raises:
            FNGDError: As in `of_forward`, or if the batch has been closed.
        """
        if key:
            if key not in self.by_key:
                raise FNGDError(
                    "the backward pass of a compiled model came after the optimizer step of its "
                    "batch: call backward before step()"
                )
            return self.by_key[key]
        # Unannounced batch: each backward pass is a batch.
        number = backward_pass()
        if self.current is not None and not self.current.announced and self._pass != number:
            self.current = None
        self._pass = number
        return self.of_forward(layer, rows)

    def judge(self, batch: Batch, layer: Any, calls: Sequence[Call]) -> bool:
        """Decide whether the rows of a layer's calls are the batch's samples.

        Calls are judged when their gradients come: one without a gradient changes nothing.

        Args:
            batch: The batch.
            layer: The layer's method.
            calls: All calls of a fresh batch, or one where the weights are known.

        Returns:
            Whether the method may treat the layer's rows as samples in this batch.

        Raises:
            FNGDError: If the batch was not announced and layers disagree about its size.
        """
        rows = [call.x.shape[0] for call in calls]
        if batch.size is None and batch.fresh:
            batch.size, batch.first_layer = min(rows), layer.name
        size = batch.size
        if size is not None and (odd := [count for count in rows if count != size]):
            if not batch.announced and layer.name != batch.first_layer:
                raise FNGDError(
                    f"layers disagree about the batch size ({batch.first_layer}: {batch.size}, "
                    f"{layer.name}: {odd[0]}): call set_batch(sample_ids=...), or exclude the "
                    "layer whose first dimension is not the batch"
                )
            batch.misfits[layer] = odd[0]
            self.unfit.add(layer.name)
            return False
        if not layer.rows_are_sure and batch.size != 1:
            square = [_is_square(layer, call) for call in calls]
            if True in square and False not in square:
                self.warn_once(
                    f"inputs with as many positions as samples ({batch.size})",
                    "do not show which dimension is the batch: their layers have the plain "
                    "gradient until another batch shows it; if all batches are like this one, "
                    "choose another batch size",
                )
                self.unfit.add(layer.name)
                return False
            layer.rows_are_sure = False in square
        batch.fits.add(layer)
        if self.unfit:
            self.unfit.discard(layer.name)
        return True

    def _settle(self, batch: Batch) -> None:
        """Leave out for good what did not fit a batch that other layers fitted."""
        for layer, rows in batch.misfits.items() if batch.fits else ():
            layer.leave_out(f"its first dimension {rows} is not the batch {batch.size}")
        if batch.misfits and not batch.fits:
            rows = next(iter(batch.misfits.values()))
            self.warn_once(
                "all layers",
                f"have the plain gradient in a batch whose first dimension {rows} is not the "
                f"number of samples {batch.size}: announce as many samples as the batch has rows",
            )

    def leave_out(self, layer: Any, why: str) -> None:
        """Take note that a layer is left out for good, and warn.

        Args:
            layer: The layer's method.
            why: The reason.
        """
        self.left_out.add(layer.name)
        self._to_skip.append(layer)
        logger.warning("%s: %s is left out: %s", self.title, layer.name, why)

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
        for batch in self._opened:
            self._settle(batch)
        self._opened.clear()
        self.current = None
        self.by_key.clear()
        self.key = torch.tensor(0, device="cpu")
        for layer in self.to_gate:
            layer.gated = True
        self.to_gate.clear()
        for layer in self._to_skip:
            layer.skipped = True
        self._to_skip.clear()

    def _drop_gates(self) -> None:
        # A forward pass without a backward pass would otherwise keep itself alive by its gates.
        if self.current is not None:
            self.current.gates.clear()


def _is_square(layer: Any, call: Call) -> bool | None:
    """Return whether samples and positions are as many; None if they cannot be exchanged."""
    if layer.kind.batched_dim > 2 or call.x.dim() != 3:
        return None
    return call.x.shape[0] == call.x.shape[1]


def backward_pass() -> int:
    """Return the number of the backward pass that autograd runs in this thread, -1 for none.

    During recomputation by activation checkpointing a forward pass runs inside a backward pass.
    """
    return torch._C._current_graph_task_id()

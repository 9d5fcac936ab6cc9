"""The batch that is under way: its size, and the layers whose first dimension is not the batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hf_fngd.capture import backward_pass, in_backward
from hf_fngd.errors import FNGDError
from hf_fngd.handlers import Pass
from hf_fngd.layers import LinearAdapter

logger = logging.getLogger(__name__)
_tickets = itertools.count(1)


class SizedPass(Pass):
    """A forward pass over one micro-batch.

    Args:
        size: Number of samples; None until the first layer shows it.
        fresh: Whether something is computed from this batch's gradients.
    """

    def __init__(self, size: int | None, fresh: bool) -> None:
        super().__init__(fresh)
        self.size = size
        self.announced = size is not None
        self.used = False
        self.first_layer = ""


P = TypeVar("P", bound=SizedPass)


class BatchTracker(Generic[P]):
    """Tells the calls of one batch from those of the next, and checks their size.

    Args:
        names: Paths of the selected layers.
        title: Name of the method, for messages.
    """

    def __init__(self, names: Sequence[str], title: str) -> None:
        self.names, self.title = list(names), title
        self.batch: P | None = None
        # κ is this times the batch size: micro-batches of an update over the loss scale.
        self.accumulation = 1.0
        self.left_out: set[str] = set()
        self._warned: set[str] = set()
        # For compiled graphs: batches announced since the last step, and number of the last one.
        self.tickets: dict[int, P] = {}
        self.ticket = torch.tensor(0)
        # Layers that compiled graphs must leave from the next step on, since checkpointing allows
        # no other way through a layer before.
        self.to_gate: set[TrackedLayer[Any]] = set()
        self._task = -1

    def _open(self) -> P:
        """Makes the pass of a batch that nobody announced; implemented by each method.

        Raises:
            NotImplementedError: Always, here.
        """
        raise NotImplementedError

    def current(self, rows: int, name: str) -> P | None:
        """Gives the batch that a layer's forward pass belongs to.

        Args:
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch, or None if the layer does not have one row per sample and is left out.

        Raises:
            FNGDError: If the batch was not announced though it must be, or layers disagree about
                its size.
        """
        batch = self.batch
        if batch is None or (not batch.announced and batch.used and not in_backward()):
            batch = self._open()
            self._close()
            self.batch = batch
        if batch.size is None:
            batch.size, batch.first_layer = rows, name
        return batch if self._fits(batch, rows, name) else None

    def _fits(self, batch: P, rows: int, name: str) -> bool:
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

    def announce(self, batch: P) -> None:
        """Makes a batch the present one, for eager and compiled forward passes.

        Args:
            batch: The batch.
        """
        self.batch = batch
        if batch.announced:
            number = next(_tickets)
            self.tickets[number], self.ticket = batch, torch.tensor(number)

    def redeem(self, ticket: int, rows: int, name: str) -> P | None:
        """Gives the batch of a compiled forward pass, in its backward.

        Args:
            ticket: Number of the batch, 0 if it was not announced.
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch, or None if the layer is left out.

        Raises:
            FNGDError: As in `current`, or if the batch has been closed.
        """
        if ticket:
            if ticket not in self.tickets:
                raise FNGDError(
                    "the backward pass of a compiled model came after the optimizer step of its "
                    "batch: call backward before step()"
                )
            batch = self.tickets[ticket]
            return batch if self._fits(batch, rows, name) else None
        # Nobody was there to see the forward pass begin: every backward is a batch of its own.
        task = backward_pass()
        if self.batch is not None and not self.batch.announced and self._task != task:
            self.batch = None
        self._task = task
        return self.current(rows, name)

    def warn_once(self, name: str, what: str) -> None:
        """Logs a warning about a layer, the first time it is due.

        Args:
            name: Path of the layer.
            what: What is to be said of it.
        """
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s: %s %s", self.title, name, what)

    def _close(self) -> None:
        # A forward pass without a backward would otherwise keep itself alive by its gates.
        if self.batch is not None:
            self.batch.gates.clear()

    def forget_batch(self) -> None:
        """Forgets the batches announced so far."""
        self._close()
        self.batch = None
        self.tickets.clear()
        self.ticket = torch.tensor(0)
        for layer in self.to_gate:
            layer.gated = True
        self.to_gate.clear()

    def end_step(self) -> None:
        """Closes an optimizer step: the next forward pass is another batch."""
        self.forget_batch()


T = TypeVar("T", bound=BatchTracker)


class TrackedLayer(Generic[T]):
    """One layer of a tracker, as the capture knows it; methods derive what they do in backward.

    Args:
        state: The tracker.
        number: Number of the layer.
        adapter: Adapter of the layer's type.
    """

    def __init__(self, state: T, number: int, adapter: LinearAdapter) -> None:
        self.state, self.number, self.adapter = state, number, adapter
        self.name = state.names[number]
        self.gated = False

    @property
    def idle(self) -> bool:
        """Whether calls are left alone until the optimizer says otherwise."""
        return False

    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """Gives what a compiled graph takes along.

        Returns:
            Numbers of layer and batch; None if the graph must break here.
        """
        return None

    def begin(self, rows: int) -> SizedPass | None:
        """Gives the pass that a call belongs to; see the tracker's `current`.

        Args:
            rows: First dimension of the input.

        Returns:
            The batch, or None to leave the call alone.
        """
        return self.state.current(rows, self.name)

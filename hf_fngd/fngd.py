"""FNGD's state: the epoch, the samples of the batch, and every layer's coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.batches import BatchTracker, SizedPass
from hf_fngd.checks import whole_numbers
from hf_fngd.config import FNGDConfig
from hf_fngd.errors import FNGDError
from hf_fngd.mean_store import MeanStore
from hf_fngd.sample_store import SampleStore
from hf_fngd.statistics import Statistics

Labels = Tensor | Mapping[str, Tensor]


class Batch(SizedPass):
    """One micro-batch: its size, ids and labels, and what is known of its coefficients.

    Args:
        size: Number of samples; None until the first layer shows it.
        labels: Labels as given to `set_batch`.
        fresh: Whether coefficients are computed in this batch, or looked up.
        lengths: Positions of each sample, where one row holds them all.
    """

    def __init__(
        self,
        size: int | None,
        labels: Labels | None,
        fresh: bool,
        lengths: list[int] | None = None,
    ) -> None:
        super().__init__(size, fresh)
        self.labels, self.lengths = labels, lengths
        self.rows: Tensor | None = None
        self.known: Tensor | None = None
        self.found: Tensor | None = None
        self.computed: set[int] = set()


class FNGDState(BatchTracker[Batch]):
    """Coefficients of all selected layers through a training run.

    Args:
        config: Settings.
        names: Paths of the selected layers.
    """

    def __init__(self, config: FNGDConfig, names: Sequence[str]) -> None:
        super().__init__(names, "FNGD")
        self.config = config
        self.statistics = Statistics()
        self.steps = 0
        self._enter(0)
        self._unwritten: list[Batch] = []
        self.store: SampleStore | MeanStore | None = self._new_store()

    def _new_store(self) -> SampleStore | MeanStore | None:
        config = self.config
        if config.share == "none":
            return None
        if config.share == "sample":
            dtype = getattr(torch, config.store_dtype)
            return SampleStore(len(self.names), dtype, config.num_samples, config.store_dir)
        return MeanStore(len(self.names))

    def _enter(self, epoch: int) -> None:
        self.epoch, self._entered = epoch, self.steps
        # Whether it lies before the first epoch that computes coefficients.
        self.waiting = epoch < self.config.collect_from

    @property
    def collecting(self) -> bool:
        """Whether this epoch computes coefficients."""
        if self.waiting:
            return False
        return self.store is None or self._round < self.config.collect_epochs

    @property
    def _computing(self) -> bool:
        """Whether the present step does."""
        return self.collecting and (self.steps - self._entered) % self.config.collect_every == 0

    @property
    def _round(self) -> int:
        """Number of the epoch since coefficients were last begun to be computed, from 0."""
        since, every = self.epoch - self.config.collect_from, self.config.refresh_every
        return since % every if every else since

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch; entering the present one again (resume) changes nothing.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            FNGDError: For a negative number.
        """
        if epoch < 0:
            raise FNGDError(f"epochs are counted from 0, there is no epoch {epoch}")
        self.flush()
        if epoch == self.epoch:
            return
        self.synchronize()
        self.forget_batch()
        self._enter(epoch)
        self.statistics.start_epoch()
        if isinstance(self.store, SampleStore):
            self.store.trim()
        elif self.store is not None and self._round == 0:
            self.store.reset()

    def synchronize(self) -> None:
        """Makes the store equal on all ranks; all of them must call it together."""
        self.flush()
        if self.store is not None:
            self.store.merge()

    def set_batch(
        self,
        sample_ids: Sequence[int] | Tensor | None,
        labels: Labels | None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Announces the samples of the next forward pass.

        Args:
            sample_ids: Data set rows of the batch, or any 64-bit integers that identify them.
            labels: Class labels `[N]`, token labels `[N, T]`, or a mapping from regular
                expressions on layer paths to token labels, of which the first match counts.
            lengths: Positions of each sample, where one row holds them all.

        Raises:
            FNGDError: If `share` needs what is missing, or samples and lengths do not agree.
        """
        self.flush()
        share = self.config.share
        if share == "sample" and sample_ids is None:
            raise FNGDError(
                "share=sample needs set_batch(sample_ids=...) before every forward pass; "
                "give the data set rows of the batch, or set share=none, layer or position"
            )
        if share == "label" and labels is None:
            raise FNGDError(
                "share=label needs set_batch(labels=...) before every forward pass; "
                "give the labels of the batch, or set share=none"
            )
        size = None if sample_ids is None else len(sample_ids)
        if size is None and isinstance(labels, Tensor):
            size = len(labels)
        packed = None if lengths is None else [int(length) for length in lengths]
        if packed is not None:
            self._check_packed(packed, size)
            size = 1
        self._close()
        if self.waiting:
            self.batch = None
            return
        batch = Batch(size, labels, self._computing, packed)
        self.announce(batch)
        if isinstance(self.store, SampleStore):
            ids = whole_numbers(sample_ids)
            batch.rows = self.store.locate(ids, create=False)
            known = self.store.count_known(batch.rows)
            if not self.collecting:
                self.statistics.count_rows(known, len(ids))
            # A row that nothing is known of makes its batch one of the first epoch.
            if batch.fresh or known < len(ids):
                batch.fresh = True
                batch.rows = self.store.locate(ids, create=True)
                batch.found = torch.full((len(ids), len(self.names)), torch.nan)
                self._unwritten.append(batch)
            else:
                batch.known = self.store.read(batch.rows)

    def _check_packed(self, lengths: list[int], samples: int | None) -> None:
        config = self.config
        if config.share == "label" or config.fisher_unit == "token":
            raise FNGDError(
                "packed rows (lengths) go with fisher_unit=sample and share=sample, position, "
                "layer or none; with fisher_unit=token a packed row is a batch of one: leave "
                "lengths out"
            )
        if samples not in (None, len(lengths)) or min(lengths, default=0) < 1:
            raise FNGDError(
                f"{samples} samples and lengths {lengths}: give each sample of a packed row its "
                "length, 1 at least"
            )

    def _open(self) -> Batch:
        if self.config.share in ("sample", "label"):
            self.set_batch(None, None)
        return Batch(None, None, self._computing)

    def end_step(self) -> None:
        """Closes an optimizer step: the next forward pass must announce its batch."""
        self.forget_batch()
        self.steps += 1

    def forget_batch(self) -> None:
        """Writes what was found, and forgets the batches announced so far."""
        self.flush()
        super().forget_batch()
        self._unwritten.clear()

    def flush(self) -> None:
        """Writes the coefficients that backward passes have found so far to the store."""
        for batch in self._unwritten:
            assert isinstance(self.store, SampleStore)
            if batch.used and batch.rows is not None and batch.found is not None:
                part = 1 / (self._round + 1) if self.collecting else 1.0
                self.store.write(batch.rows, batch.found.cpu(), part)
                # Written again it would count twice in a mean of several epochs.
                batch.found.fill_(torch.nan)
        # A batch that was announced may still be waiting for its backward pass.
        self._unwritten = [b for b in self._unwritten if not b.used or b is self.batch]

    def state_dict(self) -> dict[str, Any]:
        """Gives everything that a resumed run needs, as tensors and builtins.

        Returns:
            State for `load_state_dict`.
        """
        self.flush()
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "entered": self._entered,
            "store": None if self.store is None else self.store.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Args:
            saved: The saved state, of the same layers.
        """
        self.forget_batch()
        if self.store is not None:
            self.store.load_state_dict(saved["store"])
        self._enter(saved["epoch"])
        self.steps, self._entered = saved["steps"], saved["entered"]

"""FNGD's state: the epoch, the samples of the batch, and every layer's coefficients."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd.capture import Pass, in_backward
from hf_fngd.config import FNGDConfig
from hf_fngd.errors import FNGDError
from hf_fngd.mean_store import MeanStore
from hf_fngd.sample_store import SampleStore
from hf_fngd.statistics import Statistics

logger = logging.getLogger(__name__)

Labels = Tensor | Mapping[str, Tensor]


class Batch(Pass):
    """One micro-batch: its size, ids and labels, and what is known of its coefficients.

    Args:
        size: Number of samples; None until the first layer shows it.
        labels: Labels as given to `set_batch`.
        fresh: Whether coefficients are computed in this batch, or looked up.
    """

    def __init__(self, size: int | None, labels: Labels | None, fresh: bool) -> None:
        super().__init__(fresh)
        self.size, self.labels = size, labels
        self.announced = size is not None
        self.used = False
        self.rows: Tensor | None = None
        self.known: Tensor | None = None
        self.found: Tensor | None = None
        self.first_layer = ""
        self.computed: set[int] = set()


class FNGDState:
    """Coefficients of all selected layers through a training run.

    Args:
        config: Settings.
        names: Paths of the selected layers.
    """

    def __init__(self, config: FNGDConfig, names: Sequence[str]) -> None:
        self.config, self.names = config, list(names)
        self.statistics = Statistics()
        self.epoch = 0
        self.steps = 0
        self.accumulation = 1.0
        self.batch: Batch | None = None
        self._unwritten: list[Batch] = []
        self.left_out: set[str] = set()
        self._warned: set[str] = set()
        self.store: SampleStore | MeanStore | None = self._new_store()

    def _new_store(self) -> SampleStore | MeanStore | None:
        config = self.config
        if config.share == "none":
            return None
        if config.share == "sample":
            dtype = getattr(torch, config.store_dtype)
            return SampleStore(len(self.names), dtype, config.num_samples)
        return MeanStore(len(self.names))

    @property
    def collecting(self) -> bool:
        """Whether this epoch computes coefficients for all of its batches."""
        if self.store is None or self.epoch == 0:
            return True
        every = self.config.refresh_every
        return every > 0 and self.epoch % every == 0

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch; entering the present one again (resume) changes nothing.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.flush()
        if epoch == self.epoch:
            return
        self.synchronize()
        self.forget_batch()
        self.epoch = epoch
        self.statistics.start_epoch()
        if isinstance(self.store, SampleStore):
            self.store.trim()
        elif self.store is not None and self.collecting:
            self.store.reset()

    def synchronize(self) -> None:
        """Makes the store equal on all ranks; all of them must call it together."""
        self.flush()
        if self.store is not None:
            self.store.merge()

    def set_batch(self, sample_ids: Sequence[int] | Tensor | None, labels: Labels | None) -> None:
        """Announces the samples of the next forward pass.

        Args:
            sample_ids: Data set rows of the batch, or any 64-bit integers that identify them.
            labels: Class labels `[N]`, token labels `[N, T]`, or a mapping from regular
                expressions on layer paths to token labels, of which the first match counts.

        Raises:
            FNGDError: If `share` needs what is missing.
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
        self._close()
        self.batch = batch = Batch(size, labels, self.collecting)
        if isinstance(self.store, SampleStore):
            assert sample_ids is not None
            ids = sample_ids.tolist() if isinstance(sample_ids, Tensor) else list(sample_ids)
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

    def current(self, rows: int, name: str) -> Batch | None:
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
            if self.config.share in ("sample", "label"):
                self.set_batch(None, None)
            self._close()
            self.batch = batch = Batch(None, None, self.collecting)
        if batch.size is None:
            batch.size, batch.first_layer = rows, name
        if rows == batch.size:
            return batch
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
        return None

    def warn_once(self, name: str, what: str) -> None:
        """Logs a warning about a layer, the first time it is due.

        Args:
            name: Path of the layer.
            what: What is to be said of it.
        """
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("FNGD: %s %s", name, what)

    def end_step(self) -> None:
        """Closes an optimizer step: the next forward pass must announce its batch."""
        self.forget_batch()
        self.steps += 1

    def forget_batch(self) -> None:
        """Writes what was found, and forgets the batches announced so far."""
        self.flush()
        self._close()
        self.batch = None
        self._unwritten.clear()

    def _close(self) -> None:
        # A forward pass without a backward would otherwise keep itself alive by its gates.
        if self.batch is not None:
            self.batch.gates.clear()

    def flush(self) -> None:
        """Writes the coefficients that backward passes have found so far to the store."""
        for batch in self._unwritten:
            assert isinstance(self.store, SampleStore)
            if batch.used and batch.rows is not None and batch.found is not None:
                self.store.write(batch.rows, batch.found.cpu())
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
            "layers": list(self.names),
            "config": self.config.to_dict(),
            "store": None if self.store is None else self.store.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Args:
            saved: The saved state.

        Raises:
            FNGDError: If it belongs to other layers or other data.
        """
        if saved["layers"] != self.names:
            different = sorted(set(saved["layers"]) ^ set(self.names))
            raise FNGDError(
                f"the checkpoint was written with other selected layers (differing: "
                f"{', '.join(different[:5]) or 'their order'}): resume with the same "
                "target_modules and exclude_modules, or start without the checkpoint"
            )
        if self.store is not None:
            self.store.load_state_dict(saved["store"])
        self.epoch, self.steps, self.batch = saved["epoch"], saved["steps"], None

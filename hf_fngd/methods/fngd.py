"""FNGD: coefficients of the natural gradient, computed in the first epoch and shared afterwards.

The damped natural gradient of a layer is a weighted sum of its per-sample gradients (Ou et al.,
arXiv 2403.03473; formulas in `hf_fngd.solve.coefficients`). In a fresh batch each layer forms the
Gram matrix of its per-sample gradients, solves for the weights γ and stores them; in later epochs
γ is looked up, and the weighted gradient costs what a plain one costs. All of this happens inside
the layer's own backward pass, so that `.grad` already is the natural gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd import ranks
from hf_fngd.capture import Batch
from hf_fngd.config import DampedConfig, damping, setting
from hf_fngd.errors import FNGDError, whole_numbers
from hf_fngd.layers.selection import parameter_groups
from hf_fngd.methods.counters import Counters
from hf_fngd.methods.fngd_layer import FNGDLayer
from hf_fngd.methods.stores import LayerStore, SampleStore
from hf_fngd.optimizer import LayerOptimizer

logger = logging.getLogger(__name__)
_NO_IDS = (
    "share=sample needs set_batch(sample_ids=...) before every forward pass: give the data set "
    "rows of the batch, or set share=layer or none"
)


@dataclass
class FNGDConfig(DampedConfig):
    """Settings of FNGD (arXiv 2403.03473), checked when the object is made.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "FNGD"

    damping: float = damping(1.0)
    update_scale: str = setting(
        "auto",
        "none, rms (each selected weight's update gets a root mean square of 0.2, like a typical "
        "AdamW update, so that AdamW's learning rates carry over), or auto: rms for "
        "update_rule=sgd, none for the others. The paper: none.",
        choices=("auto", "none", "rms"),
        resumed=True,
    )
    share: str = setting(
        "sample",
        "Key under which the first epoch's coefficients are kept: sample (each data set row), "
        "layer (one number a layer) or none (computed afresh at every step: exact block natural "
        "gradient).",
        choices=("sample", "layer", "none"),
        resumed=True,
    )
    refresh_every: int = setting(
        0,
        "Compute the coefficients anew in every so many epochs; 0: only in the first.",
        at_least=0,
        resumed=True,
    )
    leave_one_out: bool = setting(
        False,
        "Precondition each sample with the Fisher of the other samples in its batch, so that a "
        "large gradient does not damp itself (an addition of hf_fngd).",
        resumed=True,
    )
    gram_memory_mb: int = setting(
        256, "Upper bound in MiB of the workspace of one layer's Gram matrix.", at_least=1
    )
    gram_dtype: str = setting(
        "auto",
        "Precision of a Gram matrix's products, which are added up and solved in float32: bfloat16 "
        "(a cheaper first epoch where the machine is faster in it), float32 (float64 for gradients "
        "in float64), or auto: that of the gradients, and float32 for float16.",
        choices=("auto", "float32", "bfloat16"),
        resumed=True,
    )
    store_dtype: str = setting(
        "float32",
        "Precision of stored coefficients: float32 or float16.",
        choices=("float32", "float16"),
        resumed=True,
    )
    store_dir: str | None = setting(
        None,
        "Folder in which each process keeps the coefficients of share=sample, in a nameless file "
        "(and in a second one while it writes a checkpoint); default: main memory.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update_scale == "auto":
            self.update_scale = "rms" if self.update_rule == "sgd" else "none"


class FNGD(LayerOptimizer):
    """Fast Natural Gradient Descent (arXiv 2403.03473) for the selected layers, AdamW for the rest.

    The gradients of selected layers are weighted inside their own backward pass, so `.grad` already
    is the natural gradient λ(λI + UUᵀ/N)⁻¹M when `step` sees it; `step` applies the update rule.
    Most users want `create_fngd_optimizer` or the Trainer integration.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        lr: Learning rate of the selected weights.
        module: The model whose layers are selected and attached.
        config: Settings; or give them as keyword arguments.
        weight_decay: Decoupled weight decay of groups that do not name their own.
        **settings: Fields of `FNGDConfig`.

    Raises:
        FNGDError: For bad settings, or if no layer can be selected.
    """

    config_class = FNGDConfig
    layer_class = FNGDLayer
    method = "fngd"
    weights_gradients = True

    def set_up(self, module: nn.Module) -> None:
        config = self.config
        self.counters = Counters()
        self.store: SampleStore | LayerStore | None = None
        if config.share == "sample":
            dtype = getattr(torch, config.store_dtype)
            self.store = SampleStore(len(self.layer_names), dtype, folder=config.store_dir)
            self.batches.must_announce = _NO_IDS
        elif config.share == "layer":
            self.store = LayerStore(len(self.layer_names))
        # Coefficients that are not in the store yet: those of each batch, by layer number.
        self._unwritten: dict[Batch, dict[int, Tensor]] = {}
        # Layers that were frozen when coefficients were computed, and the epoch in which these are
        # computed once more because such a layer trains again.
        self._frozen: set[int] = set()
        self._again = -1
        self._fingerprint: str | None = None
        self._loaded_fingerprint: str | None = None

    @property
    def collecting(self) -> bool:
        """Whether this epoch computes coefficients for every batch."""
        every = self.config.refresh_every
        first = (self.epoch % every if every else self.epoch) == 0
        return self.store is None or first or self.epoch == self._again

    @property
    def needs_rows(self) -> bool:
        return self.config.share == "sample"

    @property
    def needs_loss_scale(self) -> bool:
        # Relative damping takes λ in units of the gradients.
        return self.config.damping_mode == "absolute"

    # ---- batches and epochs --------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Enter an epoch: 0 computes coefficients, later ones reuse them (see `refresh_every`).

        Entering the present epoch again, as a resumed run does, changes nothing. Under
        `torch.distributed` all ranks must call it together, since stores are merged.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            FNGDError: For a negative number.
        """
        self._write()
        if epoch == self.epoch:
            return
        reused = not self.collecting
        super().start_epoch(epoch)
        self.synchronize()
        self.batches.close()
        self.batches.fresh = self.collecting
        self.counters.start_epoch()
        if self.store is not None:
            self.store.start_epoch(self.collecting)
        if not (reused or self.collecting) and ranks.number() == 0:
            logger.info("FNGD: epoch %d reuses the coefficients (first-order cost)", epoch)

    @property
    def reuse_rate(self) -> float | None:
        return self.counters.reuse_rate

    def new_batch(
        self,
        sample_ids: Sequence[int] | Tensor | None,
        size: int | None,
        lengths: list[int] | None,
    ) -> Batch:
        self._write()
        self._notice_thawed()
        batch = super().new_batch(sample_ids, size, lengths)
        if not isinstance(self.store, SampleStore):
            return batch
        if sample_ids is None:
            raise FNGDError(_NO_IDS)
        ids = whole_numbers(sample_ids)
        batch.rows = self.store.locate(ids, create=False)
        known = self.store.count_known(batch.rows)
        if not self.collecting:
            batch.looked_up = known, len(ids)
        # A sample without coefficients makes its batch one of the first epoch.
        batch.fresh |= known < len(ids)
        if batch.fresh:
            batch.rows = self.store.locate(ids, create=True, bounded=not self.collecting)
        else:
            batch.gamma = self.stored(batch)
        return batch

    def precondition(self) -> None:
        if not (self.needs_loss_scale and self.collecting):
            return
        factor = self.scale.find(self.param_groups[0]["params"][0].device)
        if factor != 1.0:
            raise FNGDError(
                f"damping_mode=absolute needs to know the scale of the loss, and this step has "
                f"{self.scale.micro_batches} micro-batches, with gradients "
                f"{self.scale.micro_batches / factor:g} times those at the step: call "
                "set_loss_scale(micro_batches, scale) before the backward passes, with scale=1 "
                "where there is no GradScaler"
            )

    def _notice_thawed(self) -> None:
        """Compute all coefficients once more if a layer trains again that has none."""
        if self.store is None:
            return
        weights = {layer.number: layer.parameters()[0] for layer in self.layers}
        training = {number for number, w in weights.items() if w is not None and w.requires_grad}
        if self._frozen & training and not self.collecting:
            self._again = self.epoch
            self.batches.fresh = True
            logger.info(
                "FNGD: %s trains again: coefficients are computed in the rest of the epoch",
                self.layer_names[min(self._frozen & training)],
            )
        self._frozen -= training
        if self.collecting:
            self._frozen |= {layer.number for layer in self.layers} - training

    def use(self, batch: Batch) -> None:
        """Note that a layer's backward pass has come to a batch."""
        if not batch.used:
            batch.used = True
            self.counters.count_rows(*batch.looked_up)

    def end_step(self) -> None:
        self._write()
        self._notice_thawed()
        super().end_step()

    def detach(self) -> None:
        self._write()
        super().detach()

    # ---- coefficients --------------------------------------------------------------------------

    def stored(self, batch: Batch) -> Tensor:
        """Look up γ of a batch: `[N, layers]`, or `[1, layers]` for share=layer."""
        assert self.store is not None
        return self.store.read(batch.rows)

    def columns(self, batch: Batch, like: Tensor) -> tuple[Tensor, ...]:
        """Look up γ of a batch for all layers at once: one transfer and one cast for the batch.

        Args:
            batch: The batch.
            like: A tensor of the device and precision in which γ is needed.

        Returns:
            γ of each layer: `[N]`, or `[1]` for share=layer.
        """
        key = like.device, like.dtype
        if key not in batch.columns:
            gamma = self.stored(batch) if batch.gamma is None else batch.gamma
            if gamma.device.type == "cpu" and like.device.type == "cuda":
                # Only from pinned memory does a transfer not wait for the device.
                gamma = gamma.pin_memory()
            moved = gamma.to(like.device, non_blocking=True).t().to(like.dtype)
            batch.columns[key] = moved.contiguous().unbind()
        return batch.columns[key]

    def keep(self, batch: Batch, layer: int, gamma: Tensor) -> None:
        """Keep one layer's fresh γ `[N]` for later epochs, if any are kept.

        Args:
            batch: The batch.
            layer: Number of the layer.
            gamma: Its coefficients.
        """
        if self.store is not None:
            self._unwritten.setdefault(batch, {})[layer] = gamma

    def forget(self, layer: int) -> None:
        """Drop the coefficients of one layer.

        Args:
            layer: Number of the layer.
        """
        for found in self._unwritten.values():
            found.pop(layer, None)
        if self.store is not None:
            self.store.drop(layer)

    def _write(self) -> None:
        """Write the coefficients found so far to the store."""
        for batch, found in self._unwritten.items():
            assert self.store is not None
            if not found:
                continue
            # Stacked on the device, so that a batch is one transfer.
            first = next(iter(found.values()))
            missing = torch.full_like(first, torch.nan)
            columns = [found.get(i, missing).to(first) for i in range(len(self.layer_names))]
            self.store.write(batch.rows, torch.stack(columns, 1).float().cpu())
        self._unwritten.clear()

    def coefficients(self) -> Tensor | None:
        """Return the coefficients kept for later epochs.

        Returns:
            float32 matrix with a column for each of `layer_names`, and one row for share=layer. For
            share=sample, row i belongs to data set row i where `bind_dataset` said how many there
            are, and otherwise to the i-th sample that came. NaN: nothing is kept. None for
            share=none.
        """
        self._write()
        return None if self.store is None else self.store.values()

    def synchronize(self, counts: bool = False) -> None:
        """Make the stored coefficients equal on all ranks, which must call it together.

        Args:
            counts: Only add up what the next `statistics` reports.
        """
        if counts:
            self.counters.gather()
            return
        self._write()
        for numbers in ranks.gather([one.number for one in self.layers if one.left_out]) or []:
            for number in numbers:
                self.layers[number].leave_out("another process has left it out")
        if self.store is not None:
            self.store.merge()

    # ---- logs and checkpoints ------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Report on the coefficients since the last call.

        Returns:
            `phase` (collect or reuse), `epoch`, `damping`, `layers` and `layers_dropped`,
            `gram_seconds`, counts of non-finite and refactored Gram matrices (`nonfinite`,
            `fallbacks`); where known, `reuse_rate` of the epoch and mean, minimum and maximum of γ.
        """
        return {
            "phase": "collect" if self.collecting else "reuse",
            "epoch": float(self.epoch),
            "damping": float(self.config.damping),
            **super().statistics(),
            **self.counters.report(),
        }

    def bind_dataset(self, num_samples: int | None, fingerprint: str | None = None) -> None:
        """Say which data the sample ids belong to, so that a resumed run is checked against it.

        Args:
            num_samples: Rows of the data set, if it has a length: bounds the coefficient store.
            fingerprint: Any text that changes with the data. Coefficients of the data that were
                bound before are forgotten where it is another one.

        Raises:
            FNGDError: If loaded coefficients belong to other data.
        """
        self._check_data(self._loaded_fingerprint, fingerprint)
        if isinstance(self.store, SampleStore):
            if self._fingerprint not in (None, fingerprint):
                # Row numbers mean other samples from now on.
                self._write()
                self.store.clear()
                self.store.num_samples = None
            if self.store.num_samples is None:
                self.store.num_samples = num_samples
        if fingerprint is not None:
            self._fingerprint, self._loaded_fingerprint = fingerprint, None

    def _check_data(self, loaded: str | None, present: str | None) -> None:
        if self.needs_rows and None not in (loaded, present) and loaded != present:
            raise FNGDError(
                f"the checkpoint's coefficients belong to other data ({loaded}, now {present}): "
                "resume with the same data, or start without the checkpoint"
            )

    def method_state(self) -> dict[str, Any]:
        self._write()
        return {
            "epoch": self.epoch,
            "store": None if self.store is None else self.store.state_dict(),
            "data": self._fingerprint or self._loaded_fingerprint,
            "frozen": sorted(self._frozen),
        }

    def load_method_state(self, saved: dict[str, Any]) -> None:
        self._check_data(saved["data"], self._fingerprint)
        self._unwritten.clear()
        self.batches.close()
        if self.store is not None:
            self.store.load_state_dict(saved["store"])
        self.epoch, self._again = saved["epoch"], -1
        self._frozen = set(saved["frozen"])
        self.batches.fresh = self.collecting
        self._loaded_fingerprint = saved["data"]


def create_fngd_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, **config: Any
) -> FNGD:
    """Make an FNGD optimizer for a model and attach it: the two lines of a plain loop.

        optimizer = create_fngd_optimizer(model, lr=1e-3)
        ...
        optimizer.start_epoch(epoch)            # before each epoch
        optimizer.set_batch(sample_ids=rows)    # before each forward pass

    Args:
        model: The model to train.
        lr: Learning rate of the selected weights, and of the others unless `other_lr` is given.
        weight_decay: Decoupled weight decay of parameters with at least two dimensions.
        **config: Fields of `FNGDConfig`.

    Returns:
        The attached optimizer; `detach()` undoes the attachment.
    """
    return FNGD(parameter_groups(model, weight_decay), lr, module=model, **config)

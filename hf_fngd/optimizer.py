"""`FNGD`, the optimizer, and the two lines that a plain loop needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.config import FNGDConfig
from hf_fngd.errors import FNGDError
from hf_fngd.fngd import FNGDState, Labels
from hf_fngd.layers import LinearAdapter
from hf_fngd.parameter_groups import parameter_groups
from hf_fngd.sample_store import SampleStore
from hf_fngd.weighting import LayerState


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
    method = "fngd"

    def _set_up(self, module: nn.Module) -> None:
        self.tracker = self.coefficients = FNGDState(self.config, list(self.selection.chosen))
        self._fingerprint: str | None = None
        self._loaded_fingerprint: str | None = None

    def _handler(self, number: int, adapter: LinearAdapter) -> LayerState:
        return LayerState(self.coefficients, number, adapter)

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch: 0 computes coefficients, later ones reuse them (see `refresh_every`).

        Under `torch.distributed` all ranks must call it together, since stores are merged.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.coefficients.start_epoch(epoch)

    def set_batch(
        self,
        sample_ids: Sequence[int] | Tensor | None = None,
        labels: Labels | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Announces the samples of the next forward pass, once per micro-batch.

        Args:
            sample_ids: Data set rows `[N]` of the batch, or any 64-bit integers that identify its
                samples. Needed for share=sample; otherwise they tell the batch size.
            labels: For share=label: classes `[N]`, token labels `[N, T]`, or a mapping from
                regular expressions on layer paths to such tensors, of which the first match counts.
            lengths: For a batch of one row that holds several samples one after the other: the
                positions `[N]` of each.

        Raises:
            FNGDError: If `share` needs what is missing, or samples and lengths do not agree.
        """
        self.coefficients.set_batch(sample_ids, labels, lengths)

    def statistics(self) -> dict[str, Any]:
        """Reports on the coefficients since the last call.

        Returns:
            `phase` (wait, collect or reuse), `epoch`, `damping`, `layers` and `layers_left_out`,
            `gram_seconds`, counts of non-finite and refactored Gram matrices (`nonfinite`,
            `fallbacks`); where known, `reuse_rate` of the epoch and mean, minimum and maximum of γ.
        """
        state = self.coefficients
        return {
            "phase": "wait" if state.waiting else "collect" if state.collecting else "reuse",
            "epoch": float(state.epoch),
            **super().statistics(),
            **state.statistics.report(),
        }

    def bind_dataset(self, num_samples: int | None, fingerprint: str | None) -> None:
        """Says which data the sample ids belong to, so that a resumed run is checked against it.

        Args:
            num_samples: Rows of the data set, if it has a length.
            fingerprint: Any text that changes with the data.

        Raises:
            FNGDError: If loaded coefficients belong to other data.
        """
        self._check_data(self._loaded_fingerprint, fingerprint)
        self._fingerprint = fingerprint
        store = self.coefficients.store
        if isinstance(store, SampleStore) and store.num_samples is None:
            store.num_samples = num_samples

    def synchronize(self) -> None:
        """Makes the stored coefficients equal on all ranks, which must call it together."""
        self.coefficients.synchronize()

    def _check_data(self, loaded: str | None, present: str | None) -> None:
        if self.config.share == "sample" and None not in (loaded, present) and loaded != present:
            raise FNGDError(
                f"the checkpoint's coefficients belong to other data ({loaded}, now {present}): "
                "resume with the same data, or start without the checkpoint"
            )

    def _method_state(self) -> dict[str, Any]:
        fingerprint = self._fingerprint or self._loaded_fingerprint
        return {
            **super()._method_state(),
            **self.coefficients.state_dict(),
            "data": fingerprint,
        }

    def _load_method_state(self, saved: dict[str, Any]) -> None:
        self._check_data(saved["data"], self._fingerprint)
        self.coefficients.load_state_dict(saved)
        self._loaded_fingerprint = saved["data"]


def create_fngd_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, **config: Any
) -> FNGD:
    """Makes an FNGD optimizer for a model and attaches it: the two lines of a plain loop.

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

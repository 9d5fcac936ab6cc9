"""The right loss scale for models that accept `num_items_in_batch` and ignore it.

Marian, T5, BART, mBART, Pegasus, M2M100 and Whisper average the loss over the micro-batch although
their signature makes the Trainer believe that they divide by the tokens of the whole update. Under
gradient accumulation and several processes the loss is then too large by their number. This
concerns every optimizer alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class LossScaleMixin(_Base):
    """Trainer mixin: makes such a model's loss the mean over all tokens of the update.

    The model is probed once, on the first training batch. With the correction, one batch of 32 and
    four accumulated ones of 8 give the same gradient, as they do for models without the flaw.
    """

    _ignores_num_items: bool | None = None

    def compute_loss(  # noqa: D102
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        corrected = (
            model.training
            and num_items_in_batch is not None
            and isinstance(inputs, Mapping)
            and inputs.get("labels") is not None
            # With these the Trainer computes the loss itself, and right.
            and getattr(self, "label_smoother", None) is None
            and getattr(self, "compute_loss_func", None) is None
            and self._ignores(model, inputs, num_items_in_batch)
        )
        tokens = (inputs["labels"] != -100).sum() if corrected else None
        result = super().compute_loss(
            model,
            inputs,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
        if tokens is None:
            return result
        loss = (result[0] if return_outputs else result) * tokens / num_items_in_batch
        return (loss, *result[1:]) if return_outputs else loss

    def _ignores(self, model: nn.Module, inputs: Any, num_items: Any) -> bool:
        """Probes once whether the model's loss reacts to the number of items.

        Returns:
            True if it does not.
        """
        if self._ignores_num_items is None:
            plain = self.accelerator.unwrap_model(model)
            accepts = bool(getattr(self, "model_accepts_loss_kwargs", False))
            self._ignores_num_items = accepts and _same_loss(plain, inputs, num_items)
            if self._ignores_num_items:
                logger.warning(
                    "%s ignores num_items_in_batch: its loss is rescaled to the mean over all "
                    "tokens of an update, for this run and for baselines alike",
                    type(plain).__name__,
                )
        return self._ignores_num_items


@torch.no_grad()
def _same_loss(model: nn.Module, inputs: Mapping[str, Any], num_items: Any) -> bool:
    training = model.training
    model.eval()
    try:
        losses = [
            model(**inputs, num_items_in_batch=num_items * factor)["loss"].float()
            for factor in (1, 3)
        ]
    finally:
        model.train(training)
    return bool(torch.isclose(losses[0], losses[1], rtol=1e-3))

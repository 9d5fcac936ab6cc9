"""The update rules without natural gradient, with the same parameter groups: fair baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.batches import BatchTracker
from hf_fngd.settings import OptimizerConfig


@dataclass
class PlainConfig(OptimizerConfig):
    """Settings of the plain update rules; damping has no effect.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "the plain update rule"


class PlainOptimizer(LayerOptimizer):
    """SGD, AdamW or Muon for the selected weights, AdamW for the rest; gradients stay as they are.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        lr: Learning rate of the selected weights.
        module: The model whose layers are selected.
        **options: As for `LayerOptimizer`.

    Raises:
        FNGDError: For bad settings, or if no layer can be selected.
    """

    config_class = PlainConfig
    method = "plain"

    def _set_up(self, module: nn.Module) -> None:
        self.tracker: BatchTracker[Any] = BatchTracker(list(self.selection.chosen), "plain")

    def attach(self) -> None:
        """Does nothing: no layer is captured."""

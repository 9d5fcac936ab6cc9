"""The update rules without preconditioning, with the same parameter groups: fair baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_fngd.config import OptimizerConfig
from hf_fngd.optimizer import LayerOptimizer


@dataclass
class PlainConfig(OptimizerConfig):
    """Settings of the plain update rules.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    title: ClassVar[str] = "the plain update rule"


class PlainOptimizer(LayerOptimizer):
    """SGD, AdamW, Muon or SOAP for the selected weights, AdamW or SOAP for the rest.

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

    @property
    def series(self) -> str:
        return "muon" if self.config.update_rule == "muon" else self.method

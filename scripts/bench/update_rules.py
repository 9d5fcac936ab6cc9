"""Time of the update rules alone, against torch.optim.AdamW(fused=True) on the same weights.

All run in one process, interleaved (A B C A B C …); medians and quartiles of the ratios to AdamW in
the same round. The weights are those of a Transformer's linear layers.

    python scripts/bench/update_rules.py --output scripts/bench/results/update_rules.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hf_fngd.update_rules import apply_rule
from step_time import Options, report
from torch import Tensor
from transformers import HfArgumentParser


@dataclass
class Weights:
    """Shapes of the weights."""

    d_model: int = field(default=512, metadata={"help": "Width of the model."})
    ffn_dim: int = field(default=2048, metadata={"help": "Width of its feed-forward blocks."})
    layers: int = field(default=6, metadata={"help": "Encoder layers, and as many decoder layers."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})


GROUP = {
    "lr": 1e-3,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "momentum": 0.9,
    "nesterov": False,
    "update_scale": "none",
}
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd, update_scale=rms": {"update_scale": "rms"},
    "adamw": {},
    "muon": {"nesterov": True},
}


def make(shapes: Weights) -> dict[str, Callable[[], None]]:
    """Gives every rule weights of its own.

    Args:
        shapes: Shapes of the weights.

    Returns:
        A step of each.
    """
    steps: dict[str, Callable[[], None]] = {
        "torch.optim.AdamW(fused=True)": torch.optim.AdamW(
            weights(shapes), 1e-3, weight_decay=0.0, fused=True
        ).step,
        "torch.optim.AdamW(fused=False)": torch.optim.AdamW(
            weights(shapes), 1e-3, weight_decay=0.0, fused=False
        ).step,
    }
    for name, changes in RULES.items():
        params = weights(shapes)
        states: list[dict[str, Any]] = [{} for _ in params]

        def step(
            rule: str = name.partition(",")[0],
            params: list[Tensor] = params,
            states: list[dict[str, Any]] = states,
            group: dict[str, Any] = GROUP | changes,
        ) -> None:
            apply_rule(rule, params, states, group)

        steps[f"hf_fngd: {name}"] = torch.no_grad()(step)
    return steps


def weights(shapes: Weights) -> list[Tensor]:
    """Makes the linear layers' weights of a Transformer, with gradients.

    Args:
        shapes: Shapes of the weights.

    Returns:
        Parameters.
    """
    torch.manual_seed(0)
    width, inner = shapes.d_model, shapes.ffn_dim
    block = [(width, width)] * 12 + [(inner, width), (width, inner)] * 2
    params: list[Tensor] = []
    for shape in block * shapes.layers:
        params.append(torch.nn.Parameter(0.02 * torch.randn(shape)))
        params[-1].grad = 1e-3 * torch.randn(shape)
    return params


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Weights, Options], description=__doc__)
    shapes, options = parser.parse_args_into_dataclasses()
    torch.set_num_threads(shapes.threads)
    report(make(shapes), options, shapes)


if __name__ == "__main__":
    main()

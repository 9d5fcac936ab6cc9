"""Measure the time of the update rules alone, against torch.optim.AdamW(fused=True).

All run in one process, in turns (A B C A B C …); the results are median seconds, and medians and
quartiles of the ratios to AdamW in the same round. The weights are those of a Transformer's linear
layers.

    python scripts/bench/update_rules.py --output scripts/bench/results/update_rules.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from measure import Options, parse, report
from torch import Tensor

from hf_fngd.rules import apply_rule


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
    "update_scale": "none",
}
RULES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd, update_scale=rms": {"update_scale": "rms"},
    "adamw": {},
    "muon": {},
}


def make(shapes: Weights) -> dict[str, Callable[[], object]]:
    """Return a step of each rule, with separate weights."""
    steps: dict[str, Callable[[], object]] = {}
    for fused in (True, False):
        adamw = torch.optim.AdamW(weights(shapes), 1e-3, weight_decay=0.0, fused=fused)
        steps[f"torch.optim.AdamW({fused=})"] = adamw.step
    for name, changes in RULES.items():
        params = weights(shapes)
        states: list[dict[str, Any]] = [{} for _ in params]
        step = partial(apply_rule, name.partition(",")[0], params, states, GROUP | changes)
        steps[f"hf_fngd: {name}"] = torch.no_grad()(step)
    return steps


def weights(shapes: Weights) -> list[Tensor]:
    """Draw the weights of a Transformer's linear layers, with gradients."""
    torch.manual_seed(0)
    width, inner = shapes.d_model, shapes.ffn_dim
    block = [(width, width)] * 12 + [(inner, width), (width, inner)] * 2
    params: list[Tensor] = []
    for shape in block * shapes.layers:
        params.append(torch.nn.Parameter(0.02 * torch.randn(shape)))
        params[-1].grad = 1e-3 * torch.randn(shape)
    return params


def main() -> None:
    """Run the benchmark from the command line."""
    shapes, options = parse([Weights, Options], __doc__)
    torch.set_num_threads(shapes.threads)
    report(make(shapes), options, shapes)


if __name__ == "__main__":
    main()

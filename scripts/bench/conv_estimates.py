"""Time of a convolution's Gram matrix, exact and estimated, against its forward and backward.

    python scripts/bench/conv_estimates.py --output scripts/bench/results/conv_estimates.json

The convolutions of ResNet-18's four stages on 32 x 32 images. Numbers of an estimate: gram_inputs
and gram_outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import step_time
import torch
from hf_fngd.calls import gather_calls
from hf_fngd.image_layers import Conv2dAdapter
from hf_fngd.layer_solver import Draws
from step_time import interleave, summarise
from torch import nn
from transformers import HfArgumentParser
from workload import write_results

from hf_fngd.solve.gram import sample_gram

# Input channels, output features.
ESTIMATES = ((None, 64), (16, 64), (8, 32))


@dataclass
class Shapes:
    """The stages and the batch."""

    samples: int = field(default=128, metadata={"help": "N."})
    width: int = field(default=64, metadata={"help": "Channels of the first stage."})
    stages: int = field(default=4, metadata={"help": "Each has twice the channels, half the side."})
    side: int = field(default=32, metadata={"help": "Of the first stage's images."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})

    def stage(self, number: int) -> tuple[int, int]:
        """Gives the size of a stage.

        Args:
            number: From 0.

        Returns:
            Channels, and side of the images.
        """
        return self.width * 2**number, self.side // 2**number


@dataclass
class Options(step_time.Options):
    """How often, and where to."""

    repeats: int = field(default=7, metadata={"help": "Timed rounds."})


def candidates(shapes: Shapes, stage: int) -> dict[str, Callable[[], object]]:
    """Builds what is compared for one layer.

    Args:
        shapes: Sizes.
        stage: From 0.

    Returns:
        Functions by name; `layer` is the unit.
    """
    channels, side = shapes.stage(stage)
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    adapter = Conv2dAdapter(layer)
    x = torch.randn(shapes.samples, channels, side, side)
    g = torch.randn_like(x)
    draws = Draws(0, 0, stage)

    def train() -> None:
        x.requires_grad_()
        layer(x).backward(g)
        x.grad = layer.weight.grad = None

    def form(inputs: int | None, outputs: int | None) -> None:
        with torch.no_grad():
            chosen = draws.features(channels, inputs, x.device)
            a, b = gather_calls(adapter, [(x, g, layer.weight)], inputs=chosen)
            chosen = draws.features(channels, outputs, x.device, stream=1)
            sample_gram(a, b, bias=False, outputs=chosen)

    return {
        "layer": train,
        "exact": lambda: form(None, None),
        **{f"{'all' if i is None else i} x {o}": lambda i=i, o=o: form(i, o) for i, o in ESTIMATES},
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = HfArgumentParser([Shapes, Options], description=__doc__)
    shapes, options = parser.parse_args_into_dataclasses()
    torch.set_num_threads(shapes.threads)
    table = {}
    for stage in range(shapes.stages):
        channels, side = shapes.stage(stage)
        name = f"{channels} channels, {side} x {side}"
        table[name] = summarise(interleave(candidates(shapes, stage), options))
        for variant, row in table[name].items():
            print(f"{name:<24}{variant:<12}{row['median_ratio']:>8.2f}")
    write_results(options.output, shapes, table)


if __name__ == "__main__":
    main()

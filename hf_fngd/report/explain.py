"""`python -m hf_fngd explain MODEL`: what a method would do to a model, from its config alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate  # type: ignore[import-untyped]

from hf_fngd.config import FNGDConfig
from hf_fngd.gram import choose_route, route_costs
from hf_fngd.methods import METHODS
from hf_fngd.report.meta_model import count_positions, load_model
from hf_fngd.selection import Selection, select_layers

_MIB = 2**20
_BIG_STORE = 2**30
# A backward pass is two products of the size of the forward one.
_PASSES = 3


@dataclass
class LayerCost:
    """What FNGD's first epoch adds to one layer, in multiply-adds for a batch.

    Attributes:
        positions: Positions of a sample that share the weight; 0: training leaves the layer alone.
        route: Route of the Gram matrix.
        gram: Cost of the Gram matrix.
        training: Cost of forward and backward.
    """

    positions: int
    route: str
    gram: int
    training: int


def main(arguments: Sequence[str]) -> None:
    """Prints the table and the suggestion.

    Args:
        arguments: Words after `explain`.
    """
    options = _parser().parse_args(arguments)
    target = {"target_modules": options.target_modules} if options.target_modules else {}
    config = METHODS[options.method].config_class.from_strings(target)
    model = load_model(options.model)
    selection = select_layers(
        model, config.target_modules, batch_norm=getattr(config, "batch_norm", False)
    )
    costs: dict[str, LayerCost] = {}
    notes = [f"{len(selection.chosen)} layers chosen, {len(selection.left_out)} left out"]
    if options.method == "fngd":
        positions, failure = count_positions(
            model, selection, options.batch_size, options.length, options.image_size
        )
        if failure:
            notes.append(
                f"No forward pass without weights ({failure}), so each layer is taken to see "
                f"{options.length} positions a sample"
            )
        costs = {
            path: layer_cost(selection, path, options.batch_size, number)
            for path, number in positions.items()
        }
        notes += _totals(costs, options)
    print(tabulate(_rows(selection, costs, options.rows), headers="keys", disable_numparse=True))
    print("\n" + "\n".join(f"{note}." for note in notes))
    print(f"\n{suggestion(options, len(selection.chosen))}")


def layer_cost(selection: Selection, path: str, batch: int, positions: int) -> LayerCost:
    """Counts what the Gram matrix of a layer costs, by the rule that training follows.

    Args:
        selection: Chosen layers.
        path: The layer.
        batch: Samples.
        positions: Positions of a sample.

    Returns:
        The cost.
    """
    module, adapter = selection.chosen[path]
    groups, d_out, d_in = adapter.to_canonical(module.get_parameter("weight").detach()).shape
    shape = (batch, positions, d_in, d_out)
    route = choose_route(*shape)
    gram = groups * route_costs(*shape)[route] if positions else 0
    return LayerCost(positions, route, gram, _PASSES * groups * batch * positions * d_in * d_out)


def suggestion(options: argparse.Namespace, layers: int) -> str:
    """Writes settings to start with.

    Args:
        options: The command line: method, layers and rows.
        layers: Number of chosen layers.

    Returns:
        Options for a training script, and a word on the learning rate.
    """
    values: dict[str, Any] = {"damping": METHODS[options.method].config_class().damping}
    advice = "Its learning rate and damping are its own: search both."
    if options.method == "fngd":
        values |= {"share": "sample", "num_samples": options.rows}
        if _store_bytes(options.rows, layers, "float32") > _BIG_STORE:
            values["store_dtype"] = "float16"
        advice = "Start from AdamW's learning rate; then search damping."
    if options.target_modules:
        values["target_modules"] = options.target_modules
    words = ",".join(f"{name}={value}" for name, value in values.items())
    return f'Settings to start with:\n  --optim {options.method} --optim_args "{words}"\n{advice}'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_fngd explain",
        description="Lists the layers of MODEL that a method preconditions and those it leaves "
        "out, with the reason, and what FNGD's first epoch adds. Reads the config, no weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    methods = [name for name in METHODS if name != "plain"]
    parser.add_argument("--method", choices=methods, default="fngd", help="as in --optim")
    parser.add_argument(
        "--target_modules", help="as in --optim_args: all-linear, a pattern, or names joined by |"
    )
    parser.add_argument("--batch_size", type=_positive, default=32, help="samples of a batch")
    parser.add_argument("--length", type=_positive, default=128, help="tokens of a sample")
    parser.add_argument("--rows", type=_positive, default=10_000, help="rows of the training set")
    parser.add_argument("--image_size", type=_positive, help="pixels a side, if not as configured")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rows(selection: Selection, costs: Mapping[str, LayerCost], rows: int) -> list[dict[str, str]]:
    found = []
    for path, kind, weight, decision in selection.rows():
        row = {"layer": path, "type": kind, "weight": weight, "decision": decision}
        if cost := costs.get(path):
            row["store MiB"] = f"{_store_bytes(rows, 1, 'float32') / _MIB:.2f}"
            row["positions"] = str(cost.positions)
            if cost.positions:
                row["Gram route"] = cost.route
                row["Gram cost"] = f"{cost.gram / cost.training:.2f}"
        found.append(row)
    return found


def _totals(costs: Mapping[str, LayerCost], options: argparse.Namespace) -> list[str]:
    gram = sum(cost.gram for cost in costs.values())
    training = sum(cost.training for cost in costs.values())
    alone = sum(not cost.positions for cost in costs.values())
    store, half = (
        _store_bytes(options.rows, len(costs), dtype) / _MIB for dtype in ("float32", "float16")
    )
    found = [
        f"Coefficient store for {options.rows} rows: {store:.1f} MiB of main memory, {half:.1f} "
        "MiB with store_dtype=float16, in each process and each checkpoint; store_dir puts it in a "
        "file",
        "The workspace of one layer's Gram matrix is bounded by "
        f"gram_memory_mb={FNGDConfig().gram_memory_mb}",
    ]
    if alone:
        found.append(
            f"{alone} layers with 0 positions are left alone in training: a forward pass does not "
            "reach them, or their first dimension is not the batch"
        )
    if training:
        found.append(
            f"Gram matrices, in the first epoch only: {gram / training:.2f} times the operations "
            f"of forward and backward of the chosen layers, for a batch of {options.batch_size}; "
            "Gram cost is this ratio layer by layer"
        )
    return found


def _store_bytes(rows: int, layers: int, dtype: str) -> int:
    return rows * layers * getattr(torch, dtype).itemsize

"""`python -m hf_fngd explain MODEL`: the layers that a method selects, and their cost.

The command reads the config of the model and no weights: the model is built on the meta device,
and a forward pass there shows the shapes that its layers see.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_fngd import FNGDConfig, FNGDError
from hf_fngd.errors import suggestion
from hf_fngd.layers.selection import Selection, select_layers
from hf_fngd.methods import METHODS
from hf_fngd.solve.gram import choose_route, route_costs

_METHODS = [name for name in METHODS if name != "plain"]
_MIB = 2**20
_BIG_STORE = 2**30
# A backward pass is two products of the size of the forward one.
_PASSES = 3
_IMAGE_SIZE = 224
_LONGEST_REASON = 300


@dataclass
class LayerCost:
    """The cost that FNGD's first epoch adds to one layer, in multiply-adds for a batch.

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
    """Print the table and the suggestion.

    A model without a usable config and bad settings end the program with exit code 2.

    Args:
        arguments: Words after `explain`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        _explain(options)
    except FNGDError as error:
        parser.error(str(error))


def _explain(options: argparse.Namespace) -> None:
    if options.method not in _METHODS:
        told = suggestion(options.method, _METHODS)
        raise FNGDError(f"--method: {options.method!r} is unknown: {told}")
    target = {"target_modules": options.target_modules} if options.target_modules else {}
    config = METHODS[options.method].config_class.from_strings(target)
    model = load_model(options.model)
    selection = select_layers(model, config.target_modules)
    costs: dict[str, LayerCost] = {}
    notes = [f"{len(selection.chosen)} layers chosen, {len(selection.left_out)} left out"]
    if options.method == "fngd":
        positions, failure = count_positions(
            model, selection, options.batch_size, options.length, options.image_size
        )
        if failure:
            notes.append(
                f"The forward pass without weights failed ({failure}), so the costs assume "
                f"{options.length} positions a sample in each layer"
            )
        costs = {
            path: layer_cost(selection, path, options.batch_size, number)
            for path, number in positions.items()
        }
        notes += _totals(costs, options)
    print(tabulate(_rows(selection, costs, options.rows), headers="keys", disable_numparse=True))
    print("\n" + "\n".join(f"{note}." for note in notes))
    print(f"\n{starting_point(options, len(selection.chosen))}")


def load_model(name: str) -> nn.Module:
    """Build a model without weights.

    Args:
        name: Hub id or local folder; only its config.json is read.

    Returns:
        The model, on the meta device.

    Raises:
        FNGDError: If there is no config, or transformers has no class for it.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FNGDError(
            f"cannot read the config of {name!r}: give the id of a model on the Hub or a folder "
            f"with its config.json ({_line(error)})"
        ) from None
    # Other attention than eager looks at values before it chooses a kernel.
    config._attn_implementation = "eager"
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
                return kind(config)
            return AutoModel.from_config(config)
    # The model's own code runs here and can raise anything.
    except Exception as error:
        raise FNGDError(
            f"cannot build {name!r} without weights ({_line(error)}): load it, attach an optimizer "
            "and print(optimizer.selection) instead"
        ) from None


def count_positions(
    model: nn.Module, selection: Selection, batch: int, length: int, image_size: int | None
) -> tuple[dict[str, int], str]:
    """Run a forward pass on the meta device, which computes shapes only.

    Args:
        model: A model on the meta device.
        selection: Its layers.
        batch: Samples.
        length: Tokens of a sample.
        image_size: Pixels a side; default: as configured, else 224.

    Returns:
        Positions of a sample for each chosen layer, and the reason if they are only assumed, else
        "". A layer has 0 positions, and training leaves it alone, if the pass does not reach it or
        its first dimension is not the batch.
    """
    failure = ""
    # Some models look at the values of a mask, others look for packed sequences without one.
    for masked in (True, False):
        found = dict.fromkeys(selection.chosen, 0)
        hooks = [_watch(path, *selection.chosen[path], batch, found) for path in found]
        try:
            with torch.no_grad(), torch.device("meta"):
                model.eval()(**_inputs(model, batch, length, image_size, masked))
            return found, ""
        # A model that looks at values can raise anything.
        except Exception as error:
            failure = _line(error)
        finally:
            for hook in hooks:
                hook.remove()
    return dict.fromkeys(selection.chosen, length), failure


def layer_cost(selection: Selection, path: str, batch: int, positions: int) -> LayerCost:
    """Count the cost of a layer's Gram matrix, by the rule that training follows.

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


def starting_point(options: argparse.Namespace, layers: int) -> str:
    """Write settings to start with.

    Args:
        options: The command line: method, target modules and rows.
        layers: Number of chosen layers.

    Returns:
        Options for a training script, and sentences on the learning rates.
    """
    config: Any = METHODS[options.method].config_class()
    values: dict[str, Any] = {"damping": config.damping}
    advice = "Search for its learning rate and damping: AdamW's learning rate does not carry over."
    if options.method == "fngd":
        values["share"] = "sample"
        if _store_bytes(options.rows, layers, "float32") > _BIG_STORE:
            values["store_dtype"] = "float16"
        advice = "Start from AdamW's learning rate, then search for the damping."
    if options.target_modules:
        values["target_modules"] = options.target_modules
    advice += (
        " Search other_lr, the rate of embeddings, norms and head, as well: it matters as much."
    )
    words = ",".join(f"{name}={value}" for name, value in values.items())
    return f'Settings to start with:\n  --optim {options.method} --optim_args "{words}"\n{advice}'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_fngd explain",
        description="List the layers of MODEL that a method preconditions, and the others with the "
        "reason why not. For FNGD, also show the memory and the cost of its first epoch. Reads "
        "the config of the model and no weights.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or local folder")
    parser.add_argument(
        "--method",
        metavar="NAME",
        default="fngd",
        help=f"one of {', '.join(_METHODS)} (default: fngd)",
    )
    parser.add_argument(
        "--target_modules", help="as in --optim_args: all-linear, a pattern, or names joined by |"
    )
    for name, default, told in (
        ("--batch_size", 32, "samples of a batch"),
        ("--length", 128, "tokens of a sample"),
        ("--rows", 10_000, "rows of the training set"),
    ):
        parser.add_argument(
            name, metavar="N", type=_positive, default=default, help=f"{told} (default: {default})"
        )
    parser.add_argument(
        "--image_size",
        metavar="N",
        type=_positive,
        help=f"pixels a side (default: that of the config, else {_IMAGE_SIZE})",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _watch(path: str, module: nn.Module, adapter: Any, batch: int, found: dict[str, int]) -> Any:
    def count(_: nn.Module, __: Any, out: torch.Tensor) -> None:
        if out.shape[0] == batch:
            found[path] += adapter.positions(out)

    return module.register_forward_hook(count)


def _inputs(
    model: nn.Module, batch: int, length: int, image_size: int | None, masked: bool
) -> Mapping[str, torch.Tensor]:
    config: Any = model.config
    name = getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        side = image_size or getattr(config, "image_size", None) or _IMAGE_SIZE
        sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
        return {name: torch.zeros(batch, getattr(config, "num_channels", 3), *sides)}
    if name != "input_ids":
        raise NotImplementedError(f"its input is {name}")
    names = ["input_ids"]
    names += ["decoder_input_ids"] * config.is_encoder_decoder + ["attention_mask"] * masked
    return dict.fromkeys(names, torch.zeros(batch, length, dtype=torch.long))


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
        f"The coefficients of {options.rows} rows need {store:.1f} MiB of main memory ({half:.1f} "
        "MiB with store_dtype=float16) in each process and each checkpoint; store_dir keeps them "
        "in a file instead",
        f"The Gram matrix of one layer uses at most {FNGDConfig().gram_memory_mb} MiB of workspace "
        "(gram_memory_mb)",
    ]
    if alone:
        found.append(
            f"Training leaves the {alone} layers with 0 positions alone: a forward pass does not "
            "reach them, or their first dimension is not the batch"
        )
    if training:
        found.append(
            f"In the first epoch, the Gram matrices need {gram / training:.2f} times the "
            "operations of forward and backward of the chosen layers, for a batch of "
            f"{options.batch_size}; the column Gram cost is this ratio for each layer"
        )
    return found


def _store_bytes(rows: int, layers: int, dtype: str) -> int:
    return rows * layers * getattr(torch, dtype).itemsize


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."

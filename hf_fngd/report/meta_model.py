"""A model without weights, and what its layers see of a batch: shapes on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_fngd.errors import FNGDError
from hf_fngd.selection import Selection

_IMAGE_SIZE = 224
_LONGEST_REASON = 300


def load_model(name: str) -> nn.Module:
    """Builds a model without weights.

    Args:
        name: Hub id or local folder; its config.json is all that is read.

    Returns:
        The model, on the meta device.

    Raises:
        FNGDError: If there is no config, or no class of transformers for it.
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
    # The model's own code runs here.
    except Exception as error:
        raise FNGDError(
            f"cannot build {name!r} without weights ({_line(error)}): load it, attach an optimizer "
            "and print(optimizer.selection) instead"
        ) from None


def count_positions(
    model: nn.Module, selection: Selection, batch: int, length: int, image_size: int | None
) -> tuple[dict[str, int], str]:
    """Runs a forward pass on the meta device, which computes shapes and nothing else.

    Args:
        model: A model on the meta device.
        selection: Its layers.
        batch: Samples.
        length: Tokens of a sample.
        image_size: Pixels a side; default: as configured, else 224.

    Returns:
        Positions of a sample for each chosen layer, and why they are only assumed, or "". A layer
        has none if the pass does not reach it, or its first dimension is not that of the batch:
        training leaves it alone.
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
        # Whatever a model does with values that it does not have.
        except Exception as error:
            failure = _line(error)
        finally:
            for hook in hooks:
                hook.remove()
    return dict.fromkeys(selection.chosen, length), failure


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


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."

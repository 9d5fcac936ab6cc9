"""Launches and batches that FNGD cannot work with, refused with the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.methods import PreconditionedOptimizer


def refuse_unsupported(args: TrainingArguments, optimizer: type[LayerOptimizer]) -> None:
    """Refuses launches in which a layer's backward does not see whole weights and samples.

    Args:
        args: Training arguments.
        optimizer: The optimizer's class.

    Raises:
        FNGDError: For DataParallel, DeepSpeed, FSDP1, and any FSDP where the method changes whole
            gradients at the optimizer step.
    """
    title = optimizer.config_class.title
    whole_gradients = issubclass(optimizer, PreconditionedOptimizer)
    if args.n_gpu > 1:
        raise FNGDError(
            f"{title} does not work with torch.nn.DataParallel: start with torchrun or accelerate "
            "launch, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    shared = AcceleratorState._shared_state
    kind = shared.get("distributed_type")
    if getattr(args, "deepspeed", None) or kind == DistributedType.DEEPSPEED:
        sharded = "" if whole_gradients else " or FSDP2 (fsdp_version: 2)"
        raise FNGDError(
            f"{title} does not work with DeepSpeed, which hides gradients from the optimizer: use "
            f"DDP (torchrun){sharded}"
        )
    if kind == DistributedType.FSDP and whole_gradients:
        raise FNGDError(
            f"{title} does not work with FSDP, which divides the gradients that it needs as a "
            "whole: use DDP (torchrun)"
        )
    plugin = shared.get("fsdp_plugin")
    if kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 1:
        raise FNGDError(
            f"{title} does not work with FSDP1, which flattens the weights: set fsdp_version: 2, "
            "or use DDP (torchrun)"
        )


def packed_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Finds the samples of a batch of one row that holds several.

    Args:
        inputs: The model's inputs.

    Returns:
        Positions of each sample, by `cu_seq_lens_q`, `seq_idx` or `position_ids` that begin at 0
        again; None where each row is one sample.

    Raises:
        FNGDError: If `cu_seq_lens_q` do not end where the row does.
    """
    if batch_size(inputs) != 1:
        return None
    bounds, ids = inputs.get("cu_seq_lens_q"), inputs.get("seq_idx")
    if bounds is not None:
        lengths = torch.as_tensor(bounds).diff().tolist()
        main = inputs.get("input_ids", inputs.get("inputs_embeds"))
        total = sum(lengths) if main is None else main.shape[1]
        if sum(lengths) != total:
            raise FNGDError(
                f"cu_seq_lens_q end at {sum(lengths)} and the packed row at {total}: turn packing "
                "or padding_free off, so that each sample has a row of its own"
            )
    elif ids is not None:
        lengths = ids[0].unique_consecutive(return_counts=True)[1].tolist()
    else:
        positions: Any = inputs.get("position_ids")
        if not _is_row(positions) or int(positions[0, 0]) != 0:
            return None
        starts = (positions[0] == 0).nonzero().squeeze(1).tolist()
        ends = [*starts[1:], positions.shape[1]]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    return lengths if len(lengths) > 1 else None


def unpacked(inputs: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """Gives every sample of a packed row a row of its own, for its content to be hashed.

    Args:
        inputs: The model's inputs.
        lengths: Positions of each sample.

    Returns:
        `input_ids` with their `attention_mask`, and `labels`, where there are such.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    found = {}
    for key, fill in (("input_ids", 0), ("labels", -100)):
        if _is_row(inputs.get(key)):
            parts = inputs[key][0].split(list(lengths))
            found[key] = pad(parts, batch_first=True, padding_value=fill)
            if key == "input_ids":
                ones = [torch.ones_like(part) for part in parts]
                found["attention_mask"] = pad(ones, batch_first=True)
    return found


def _is_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == 1


def batch_size(inputs: Mapping[str, Any]) -> int | None:
    """Reads the number of rows from the first tensor that has them.

    Args:
        inputs: The model's inputs.

    Returns:
        The batch size, or None if there is no tensor.
    """
    first = ("input_ids", "pixel_values", "inputs_embeds", "input_features")
    for key in (*first, *inputs):
        value = inputs.get(key)
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return len(value)
    return None

"""Launches and batches that FNGD cannot work with, refused with the way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.methods import PreconditionedOptimizer

_PACKED_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


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
    if args.n_gpu > 1:
        raise FNGDError(
            f"{title} does not work with torch.nn.DataParallel: start with torchrun or accelerate "
            "launch, or show one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    shared = AcceleratorState._shared_state
    kind = shared.get("distributed_type")
    if getattr(args, "deepspeed", None) or kind == DistributedType.DEEPSPEED:
        raise FNGDError(
            f"{title} does not work with DeepSpeed, which hides gradients from the optimizer: use "
            "DDP (torchrun) or FSDP2 (fsdp_version: 2)"
        )
    if kind == DistributedType.FSDP and issubclass(optimizer, PreconditionedOptimizer):
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


def refuse_packed(inputs: Mapping[str, Any]) -> None:
    """Refuses a batch of one row that holds several samples.

    Args:
        inputs: The model's inputs.

    Raises:
        FNGDError: If the row is packed.
    """
    position_ids = inputs.get("position_ids")
    rows = batch_size(inputs)
    restarts = (
        isinstance(position_ids, torch.Tensor)
        and position_ids.dim() == 2
        and rows == 1
        and int((position_ids == 0).sum()) > 1
    )
    if restarts or (rows == 1 and any(inputs.get(key) is not None for key in _PACKED_KEYS)):
        raise FNGDError(
            "the batch is one packed row of several samples, which FNGD cannot tell apart: turn "
            "packing or padding_free off, so that each sample has a row of its own"
        )


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

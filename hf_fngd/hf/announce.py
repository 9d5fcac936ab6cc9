"""Telling the optimizer which samples the next forward pass holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.hf.samples import content_ids
from hf_fngd.hf.support import batch_size, packed_lengths, unpacked
from hf_fngd.methods import PlainOptimizer
from hf_fngd.optimizer import FNGD

# Layers of an encoder-decoder whose positions are source tokens although they sit in the decoder.
_CROSS_SOURCE = (
    r"(encoder_attn|cross_attn|crossattention|EncDecAttention)\.(k_proj|v_proj|key|value|k|v)$"
)


def announce(
    optimizer: LayerOptimizer,
    model: nn.Module,
    inputs: Mapping[str, Any],
    rows: Sequence[int] | None,
) -> None:
    """Tells the optimizer which samples the next forward pass holds.

    Args:
        optimizer: The optimizer.
        model: The unwrapped model.
        inputs: Its inputs.
        rows: Row numbers, or None to hash the content (as where packing made one of several).

    Raises:
        FNGDError: For a packed row, under the methods other than FNGD.
    """
    if isinstance(optimizer, PlainOptimizer):
        return
    lengths = packed_lengths(inputs)
    size = batch_size(inputs)
    if size is None:
        return
    labels = None
    if isinstance(optimizer, FNGD):
        config = optimizer.config
        if config.share == "label":
            labels = batch_labels(model, inputs)
        if config.fisher_unit == "token":
            # Each position is a sample, whatever row it is in.
            lengths = None
    elif lengths is not None:
        raise FNGDError(
            "the batch is one packed row of several samples, which "
            f"{optimizer.config_class.title} cannot tell apart: turn packing or padding_free off, "
            "so that each sample has a row of its own"
        )
    samples = size if lengths is None else len(lengths)
    ids: Sequence[int] = range(samples)
    if rows is not None and (lengths is None or len(rows) == samples):
        ids = rows
    elif getattr(optimizer.config, "share", None) == "sample":
        config = getattr(model, "config", None)
        eos = getattr(config, "eos_token_id", None)
        ids = content_ids(
            inputs if lengths is None else unpacked(inputs, lengths),
            getattr(config, "pad_token_id", None),
            eos if isinstance(eos, int) else -1,
        )
    if isinstance(optimizer, FNGD):
        optimizer.set_batch(ids, labels, lengths)
    else:
        optimizer.set_batch(ids)


def batch_labels(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | dict[str, Tensor] | None:
    """Gives the keys of share=label: classes, or the token of each position.

    Args:
        model: The unwrapped model.
        inputs: Its inputs.

    Returns:
        Class labels `[N]`; for sequence models a mapping from layer paths to tokens: source tokens
        for the encoder, target tokens for the decoder and for causal language models.
    """
    labels = inputs.get("labels")
    if labels is None or labels.dim() == 1:
        return labels
    source = inputs.get("input_ids")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        mapping = {_CROSS_SOURCE: source, r"(^|\.)decoder\.": labels, "": source}
        return {pattern: ids for pattern, ids in mapping.items() if ids is not None}
    if source is not None and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return labels


class SampleHook:
    """Forward pre-hook on the model of a stock Trainer: announces every batch by its content.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: LayerOptimizer | None) -> None:
        self.optimizer = optimizer

    # Which samples these are depends on their content: no work for a compiled graph.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: D102
        if self.optimizer is not None and torch.is_grad_enabled():
            names = inspect.signature(module.forward).parameters
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            announce(self.optimizer, module, inputs, None)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model must not speak to the original's optimizer.
        return SampleHook, (None,)

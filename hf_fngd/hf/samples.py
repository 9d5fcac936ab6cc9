"""Which samples are in a batch, and how the optimizer is told.

Batches of `FNGDTrainer` have row numbers (`row_numbers`). Those of a stock Trainer have none: there
a hash of the content identifies each sample (`content_ids`). Either way `announce` tells the
optimizer before the forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from hf_fngd.errors import FNGDError
from hf_fngd.hf.row_numbers import has_rows, named_tensors, rows_of
from hf_fngd.methods.fisher_labels import named_inputs
from hf_fngd.optimizer import LayerOptimizer

# Odd 64-bit constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers.
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
_CHOICE_SHIFT = 40
_MAIN_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_features")


# ---- telling the optimizer -------------------------------------------------------------------


def announce(optimizer: LayerOptimizer, model: nn.Module, inputs: Any) -> int | None:
    """Tell the optimizer which samples the next forward pass holds.

    Args:
        optimizer: The optimizer.
        model: The unwrapped model.
        inputs: The model's inputs by name, nested or in a list. Their content is hashed where they
            have no row numbers, and where a batch has several rows for each of its numbers, as the
            pairs of a preference loss, or holds several samples in one row. A sample is what has a
            row in the layers: each text of a pair, each choice of a question.

    Returns:
        Number of rows; None where the inputs hold no tensor, and nothing was announced.

    Raises:
        FNGDError: For a packed row, under a method that needs one row a sample.
    """
    rows = rows_of(inputs)
    inputs, choices = _row_by_row(model, _by_name(inputs))
    size = batch_size(inputs)
    if size is None:
        return None
    if rows is not None and choices > 1:
        # Numbers of choices lie far beyond those of rows.
        rows = [row + (choice << _CHOICE_SHIFT) for row in rows for choice in range(choices)]
    lengths = packed_lengths(inputs)
    samples = size if lengths is None else len(lengths)
    ids: Any = range(samples)
    if rows is not None and _one_each(rows, inputs, lengths):
        ids = rows
    elif optimizer.needs_rows:
        config = getattr(model, "config", None)
        eos = getattr(config, "eos_token_id", None)
        ids = content_ids(
            inputs if lengths is None else unpacked(inputs, lengths),
            getattr(config, "pad_token_id", None),
            eos if isinstance(eos, int) else -1,
        )
    optimizer.set_batch(ids, lengths)
    return size


class SampleHook:
    """Forward pre-hook on a model: announces what the model gets.

    In a stock Trainer that is every forward pass. `FNGDTrainer` announces the whole batch before
    its training step and says how many rows it has. Once the model gets another number of them
    (two columns of text in one forward pass, a part of the batch, texts that were generated from
    it), each further forward pass of the step is announced.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: LayerOptimizer | None) -> None:
        self.optimizer = optimizer
        # Rows of the batch that has been announced; None: to be announced at each forward pass.
        self.size: int | None = None

    # Which samples these are depends on their content: no work for a compiled graph.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: D102
        if self.optimizer is None or not self.optimizer.captured or not torch.is_grad_enabled():
            return
        inputs = named_inputs(module, args, kwargs)
        main = _main_input(_row_by_row(module, _by_name(inputs))[0])
        if main is not None and len(main) != self.size:
            self.size = None
        if self.size is None:
            announce(self.optimizer, module, inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model must not speak to the original's optimizer.
        return SampleHook, (None,)


def _by_name(inputs: Any) -> Mapping[str, Any]:
    """Bring a batch into a mapping with tensors."""
    while isinstance(inputs, Mapping) and len(inputs) == 1:
        (only,) = inputs.values()
        if not isinstance(only, Mapping):
            break
        inputs = only
    if isinstance(inputs, Mapping) and any(map(_has_rows, inputs.values())):
        return inputs
    return dict(named_tensors(inputs))


def _row_by_row(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """Give every choice of a question its own row, as transformers' models do inside.

    Returns:
        The inputs, and the number of choices: 1 for any other model.
    """
    main = inputs.get("input_ids")
    if not isinstance(main, Tensor) or main.dim() != 3 or not _has_choices(model):
        return inputs, 1
    questions, choices = main.shape[:2]
    found = {}
    for key, value in inputs.items():
        if _has_rows(value) and value.shape[:2] == main.shape[:2]:
            found[key] = value.flatten(0, 1)
        elif _has_rows(value) and len(value) == questions:
            found[key] = value.repeat_interleave(choices, 0)
    return found, choices


def _has_choices(model: nn.Module) -> bool:
    return any(type(one).__name__.endswith("ForMultipleChoice") for one in model.modules())


def _main_input(inputs: Mapping[str, Any]) -> Tensor | None:
    return next((inputs[key] for key in _MAIN_INPUTS if _has_rows(inputs.get(key))), None)


def _one_each(
    rows: Sequence[int], inputs: Mapping[str, Any], lengths: Sequence[int] | None
) -> bool:
    """Return whether each row number stands for one sample of the batch."""
    if lengths is not None:
        return len(rows) == len(lengths)
    main = _main_input(inputs)
    return main is None or len(main) == len(rows) or len(main) % len(rows) != 0


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def batch_size(inputs: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the first tensor that has them; None without a tensor."""
    main = _main_input(inputs)
    first = next(filter(_has_rows, inputs.values()), None) if main is None else main
    return None if first is None else len(first)


# ---- packed rows -----------------------------------------------------------------------------


def packed_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Find the samples of a batch of one row that holds several.

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
                "or padding_free off, so that each sample has its own row"
            )
    elif ids is not None:
        lengths = ids[0].unique_consecutive(return_counts=True)[1].tolist()
    else:
        positions: Any = inputs.get("position_ids")
        if not _is_row(positions) or int(positions[0, 0]) != 0:
            return None
        mask: Any = inputs.get("attention_mask")
        if _is_row(mask) and not bool(mask.all()):
            # Padding, whose positions are 0: one sample.
            return None
        starts = (positions[0] == 0).nonzero().squeeze(1).tolist()
        ends = [*starts[1:], positions.shape[1]]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    return lengths if len(lengths) > 1 else None


def unpacked(inputs: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Give every sample of a packed row its own row, for its content to be hashed.

    Args:
        inputs: The model's inputs.
        lengths: Positions of each sample.

    Returns:
        `input_ids` with their `attention_mask`, and `labels`, as far as the inputs have them.
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
    return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 1


def fingerprint(dataset: Any) -> str:
    """Identify a data set by its length and, for `datasets`, by columns and a few rows.

    Args:
        dataset: Any data set; one without a length has the length -1.

    Returns:
        Short text that changes with the data, and not with transforms or caches.
    """
    length = len(dataset) if has_rows(dataset) else -1
    text = f"{length} rows"
    if isinstance(dataset, datasets.Dataset) and length > 0:
        plain = dataset.with_format("arrow")
        columns = dataset.column_names
        chosen = sorted({round(i * (length - 1) / 7) for i in range(8)})
        rows = [plain[i].select(columns).to_pylist() for i in chosen]
        digest = hashlib.sha256(repr((columns, rows)).encode()).hexdigest()[:12]
        text += f", content {digest}"
    return text


# ---- content hash ----------------------------------------------------------------------------


def content_ids(
    inputs: Mapping[str, Any], pad_token_id: int | None = None, eos_token_id: int = -1
) -> list[int]:
    """Identify samples by all inputs that have a row for each, whatever the padding.

    Args:
        inputs: The model's inputs.
        pad_token_id: Padding of `decoder_input_ids`, which have no mask.
        eos_token_id: End token of the labels that these were shifted from.

    Returns:
        A 64-bit integer for each row. Anything random in the inputs (augmentation, masking) makes
        it a new one every epoch.

    Raises:
        FNGDError: If no input has a row for each sample.
    """
    total: Tensor | None = None
    for salt, key in enumerate(_hashed_keys(inputs)):
        values = inputs[key].detach()
        if values.is_floating_point():
            values = values.float().contiguous().view(torch.int32)
        mask = _content_mask(key, values, inputs, pad_token_id, eos_token_id)
        mask, values = mask.flatten(1), values.reshape(len(values), -1).long()
        rank = mask.cumsum(1)
        mixed = _mix(_mix(values + salt + 1) + rank * _MIX[0]) * mask
        total = mixed.sum(1) if total is None else _mix(total) + mixed.sum(1)
    if total is None:
        raise FNGDError(
            "share=sample finds no tensor with a row for each sample among the model's inputs: use "
            "FNGDTrainer (row numbers), or set share=layer or none"
        )
    return total.tolist()


def _hashed_keys(inputs: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that tell samples apart: all with a row a sample, no masks."""
    rows = batch_size(inputs)
    found = {
        key
        for key, value in inputs.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == rows
        and value.dtype != torch.bool
        # What a model has computed is no input: losses that call it twice give it its own output.
        and not value.requires_grad
        and not key.endswith("mask")
        and key != "position_ids"
    }
    # Labels that were shifted are the same labels.
    return sorted(found - {"decoder_input_ids"} if "labels" in found else found)


def _content_mask(
    key: str, values: Tensor, inputs: Mapping[str, Any], pad_token_id: int | None, eos_token_id: int
) -> Tensor:
    """Return which entries of an input are content, in its shape with at least two dimensions."""
    values = values.reshape(len(values), 1) if values.dim() == 1 else values
    given = inputs.get("attention_mask")
    if key == "labels":
        return values != -100
    if key == "decoder_input_ids" and pad_token_id is not None:
        # Shifted labels: the longest row of a batch has lost its last token, the end token.
        return (values != pad_token_id) & (values != eos_token_id)
    if isinstance(given, Tensor) and given.dim() == 2 and values.shape[:2] == given.shape:
        mask = given.bool()
    elif values.shape[1] > 1 and not inputs[key].is_floating_point():
        # Without a mask of its own a row ends where only zeros follow.
        filled = (values != 0).reshape(*values.shape[:2], -1).any(2)
        mask = filled.flip(1).cummax(1).values.flip(1)
    else:
        return torch.ones_like(values, dtype=torch.bool)
    return mask.reshape(*mask.shape, *[1] * (values.dim() - 2)).expand(values.shape)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))

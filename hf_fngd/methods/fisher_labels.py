"""Labels drawn from the model's own predictions, for the true instead of the empirical Fisher.

On update steps the model's forward is followed by a second backward: for one label drawn at every
position that has one, the gradients of the log-likelihood pass through the captured layers.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_fngd.errors import FNGDError

_WAY_OUT = "set fisher_labels=empirical"


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class from each row of logits.

    Args:
        logits: `[rows, classes]`.
        generator: On the CPU.

    Returns:
        Classes `[rows]`.
    """
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device="cpu")
    noise = noise.to(logits)
    # Gumbel's trick: the largest of log p + noise is a sample. Large noise comes from numbers near
    # 0: near 1 float32 would round some of them to 1, whose noise is infinite.
    noise = -(-(-noise.clamp(min=torch.finfo(logits.dtype).tiny)).log1p()).log()
    return (logits + noise).argmax(-1)


def sampled_loss(
    logits: Tensor, mask: Tensor | None, samples: int, generator: torch.Generator
) -> Tensor:
    """Compute the loss of drawn labels; its gradients are those of single samples.

    Args:
        logits: `[N, C]` or `[N, T, C]`.
        mask: Which positions have a label, of shape `[N, T]`; None: all of them.
        samples: N.
        generator: On the CPU.

    Returns:
        Scalar: N times the mean over labels, as if the loss were the mean.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1)]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    labels = draw(rows.detach(), generator)
    total = nn.functional.cross_entropy(rows, labels, reduction="sum")
    return total * (samples / max(1, len(rows)))


def labelled_positions(
    model: nn.Module, logits: Tensor, inputs: Mapping[str, Any]
) -> Tensor | None:
    """Find the positions whose logits enter the loss.

    Args:
        model: The model.
        logits: Its logits.
        inputs: Its inputs by name.

    Returns:
        Booleans of shape `logits.shape[:-1]`, or None for all positions.
    """
    if logits.dim() < 3:
        return None
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
        mask = labels != -100
        if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            mask = nn.functional.pad(mask[:, 1:], (0, 1), value=False)
        return mask
    config = getattr(model, "config", None)
    decoder = inputs.get("decoder_input_ids")
    if isinstance(decoder, Tensor) and decoder.shape == logits.shape[:-1]:
        pad = getattr(config, "pad_token_id", None)
        mask = torch.ones_like(decoder, dtype=torch.bool) if pad is None else decoder.ne(pad)
        # What follows the end of a sentence has no label; the first position always has one.
        end = getattr(config, "eos_token_id", None)
        for token in end if isinstance(end, (list, tuple)) else [end]:
            if token is not None:
                mask &= decoder.ne(token)
        mask[:, 0] = True
        return mask
    given = inputs.get("attention_mask")
    if isinstance(given, Tensor) and given.shape == logits.shape[:-1]:
        return given.bool()
    return None


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the inputs of a forward pass by name."""
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


class FisherLabels:
    """Forward hook on the model: on update steps, a second backward with drawn labels.

    Args:
        optimizer: A `PreconditionedOptimizer`, referred to weakly; None for a copy of the model.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else lambda: None

    @torch.compiler.disable
    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Run the second backward pass.

        Args:
            model: The model.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
            output: Its output.

        Raises:
            FNGDError: If the output holds no logits, or the graph allows no second backward.
        """
        optimizer = self._optimizer()
        if optimizer is None or not torch.is_grad_enabled():
            return
        begun = optimizer.begin_sampling()
        if begun is None:
            return
        logits = getattr(output, "logits", output)
        if isinstance(output, Mapping):
            logits = output.get("logits")
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        if (
            not isinstance(logits, Tensor)
            or logits.dim() not in (2, 3)
            or logits.shape[-1] < 2
            or problem not in (None, "single_label_classification")
        ):
            shape = f" with logits {[*logits.shape]}" if isinstance(logits, Tensor) else ""
            raise FNGDError(
                "fisher_labels=sampled needs a model whose output is the logits of one class a "
                "position ([N, C] or [N, T, C], a tensor or its logits), not "
                f"{type(output).__name__}{shape} and problem_type={problem}: {_WAY_OUT}"
            )
        mask = labelled_positions(model, logits, named_inputs(model, args, kwargs))
        context, generator = begun
        with context:
            loss = sampled_loss(logits, mask, len(logits), generator)
            try:
                weights = [weight for weight in optimizer.weights() if weight.requires_grad]
                torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise FNGDError(
                    f"fisher_labels=sampled: the second backward failed ({error}): set "
                    f"use_reentrant=False where blocks are checkpointed, or {_WAY_OUT}"
                ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model must not speak to the original's optimizer.
        return FisherLabels, (None,)

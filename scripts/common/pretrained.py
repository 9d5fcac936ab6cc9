"""A pretrained model with its tokenizer, whole or under LoRA adapters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import InputError


@dataclass
class PretrainedArguments:
    """A pretrained model, and whether it trains as a whole or by adapters."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local folder."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train only LoRA adapters of this rank, on all linear layers."},
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the adapters; default: twice their rank."}
    )
    lora_rank_pattern: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of ranks by layer, as `python -m hf_fngd rank` writes it; other "
            "layers have --lora_rank. The scale of each keeps its ratio to the rank."
        },
    )

    def __post_init__(self) -> None:
        if self.lora_rank is None and self.lora_rank_pattern is not None:
            raise ValueError("--lora_rank_pattern needs --lora_rank")


@contextlib.contextmanager
def load_errors(name: str | None, wanted: str | None = None) -> Iterator[None]:
    """Turn the errors of transformers' `from_pretrained` into errors of one line.

    Args:
        name: Name of the model.
        wanted: The head that the model must have, and which models have it; None: any.

    Raises:
        InputError: If there is no such model, or it lacks the head.
        ValueError: For any other reason that transformers has to refuse the head.
    """
    try:
        yield
    except OSError as error:
        raise InputError(_not_loaded(name, error)) from None
    except ValueError as error:
        if wanted is None:
            raise InputError(_not_loaded(name, error)) from None
        if "Unrecognized configuration class" not in str(error):
            raise
        raise InputError(f"{name!r} has no {wanted}") from None


def _not_loaded(name: str | None, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    return f"cannot load --model_name_or_path {name!r}: {reason}"


def load_pretrained(
    args: PretrainedArguments, kind: Any, wanted: str, max_length: int, options: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        args: Model arguments, with a name.
        kind: Auto class of the model, such as `AutoModelForCausalLM`.
        wanted: The head that the model must have, and which models have it, for the error.
        max_length: Longest sequence in tokens that it must take.
        options: Options to lower if it does not, for the error.

    Returns:
        Model and tokenizer.

    Raises:
        InputError: If there is no such model, or it lacks the head or the length.
        ValueError: For any other reason that transformers has.
    """
    name = args.model_name_or_path
    with load_errors(name, wanted):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise InputError(
            f"{name!r} takes {limit} tokens at most, not {max_length}: lower {options}"
        )
    return model, tokenizer


def with_adapters(model: PreTrainedModel, args: PretrainedArguments, task: str) -> Any:
    """Put LoRA adapters on a model, if `lora_rank` is given.

    Args:
        model: The model.
        args: Model arguments.
        task: PEFT's name of the task, such as `CAUSAL_LM`.

    Returns:
        The model, or a PeftModel around it.

    Raises:
        InputError: If peft is missing or refuses the model, or the file of ranks cannot be used.
    """
    if args.lora_rank is None:
        return model
    ranks = _ranks(args.lora_rank_pattern, model)
    try:
        import peft
    except ImportError:
        raise InputError("--lora_rank needs peft: pip install 'hf-fngd[peft]'") from None
    alpha = args.lora_alpha or 2 * args.lora_rank
    try:
        config = peft.LoraConfig(
            task_type=task,
            r=args.lora_rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            rank_pattern=ranks,
            alpha_pattern={name: rank * alpha / args.lora_rank for name, rank in ranks.items()},
        )
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora_rank {args.lora_rank}: {error}") from None


def _ranks(path: str | None, model: PreTrainedModel) -> dict[str, int]:
    """Read a file of ranks, and check that they belong to the model."""
    if path is None:
        return {}
    try:
        ranks = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read --lora_rank_pattern {path!r}: {error}") from None
    if not isinstance(ranks, dict) or not all(
        isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 for rank in ranks.values()
    ):
        raise InputError(f"--lora_rank_pattern {path!r} must hold a rank of at least 1 by layer")
    known = dict(model.named_modules())
    missing = [name for name in ranks if name not in known]
    if missing:
        raise InputError(
            f"--lora_rank_pattern {path!r} names {missing[0]}, which the model does not have: give "
            "the ranks of a model of the same architecture"
        )
    return ranks

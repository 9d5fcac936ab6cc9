"""A pretrained model with its tokenizer, whole or under LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot load --model_name_or_path {name!r}: {reason}") from None
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise InputError(f"{name!r} has no {wanted}") from None
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
        InputError: If peft is missing or refuses the model.
    """
    if args.lora_rank is None:
        return model
    try:
        import peft
    except ImportError:
        raise InputError("--lora_rank needs peft: pip install 'hf-fngd[peft]'") from None
    try:
        config = peft.LoraConfig(
            task_type=task,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or 2 * args.lora_rank,
            target_modules="all-linear",
        )
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--lora_rank {args.lora_rank}: {error}") from None

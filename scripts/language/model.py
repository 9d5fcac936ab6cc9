"""The model and its tokenizer: pretrained, or a small GPT-2 with a vocabulary of byte pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.arguments import InputError
from common.pretrained import PretrainedArguments, load_pretrained, with_adapters
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

END, PAD = "</s>", "<pad>"


@dataclass
class ModelArguments(PretrainedArguments):
    """A pretrained model, or the shape of a small GPT-2 trained from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder. Default: a new, small GPT-2."},
    )
    vocab_size: int = field(default=4000, metadata={"help": "New GPT-2: vocabulary."})
    d_model: int = field(default=128, metadata={"help": "New GPT-2: width."})
    layers: int = field(default=2, metadata={"help": "New GPT-2: layers."})
    attention_heads: int = field(default=4, metadata={"help": "New GPT-2: attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "New GPT-2: dropout."})


def load_model(
    args: ModelArguments, texts: Iterable[str], max_length: int
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load or create the model.

    Args:
        args: Model arguments.
        texts: Texts from which a new vocabulary is learned.
        max_length: Longest text in tokens that it must take.

    Returns:
        Model and tokenizer, which has an end and a padding token.

    Raises:
        InputError: If adapters are asked for without a model, or the model cannot be used.
    """
    if args.model_name_or_path is None:
        if args.lora_rank is not None:
            raise InputError("--lora_rank adapts a trained model: give --model_name_or_path")
        tokenizer = train_tokenizer(texts, args.vocab_size)
        return new_gpt2(args, tokenizer, max_length), tokenizer
    head = "causal head: choose a language model such as GPT-2, Llama or Qwen"
    model, tokenizer = load_pretrained(args, AutoModelForCausalLM, head, max_length, "--max_length")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{args.model_name_or_path!r} has no token that ends a text: choose another"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return with_adapters(model, args, "CAUSAL_LM"), tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a vocabulary of byte pairs.

    Args:
        texts: Texts.
        vocab_size: Largest number of tokens.

    Returns:
        A tokenizer that can be saved and loaded like a pretrained one.
    """
    pairs = ByteLevelBPETokenizer()
    pairs.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs._tokenizer, bos_token=END, eos_token=END, pad_token=PAD
    )


def new_gpt2(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> GPT2LMHeadModel:
    """Create a random GPT-2 for a tokenizer.

    Args:
        args: Its shape.
        tokenizer: Its tokenizer.
        max_length: Longest text in tokens.

    Returns:
        The model.
    """
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=max_length,
            n_embd=args.d_model,
            n_layer=args.layers,
            n_head=args.attention_heads,
            resid_pdrop=args.dropout,
            embd_pdrop=args.dropout,
            attn_pdrop=args.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

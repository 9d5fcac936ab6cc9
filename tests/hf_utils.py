"""A tiny Marian, a tiny data set of token ids, and a short Trainer run over them; tiny texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

EOS, PAD, VOCAB = 0, 59, 60


def tiny_marian(**changes: Any) -> MarianMTModel:
    """Return a random Marian of one layer a side, the same at every call."""
    set_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=0,
        decoder_start_token_id=PAD,
        forced_eos_token_id=0,
    )
    return MarianMTModel(MarianConfig(**settings | changes))


def token_pairs(rows: int, seed: int = 0) -> datasets.Dataset:
    """Return sequences of 3 to 8 tokens and their reversal."""
    generator = torch.Generator().manual_seed(seed)
    sources = [
        torch.randint(1, 58, (int(n),), generator=generator).tolist()
        for n in torch.randint(3, 9, (rows,), generator=generator)
    ]
    return datasets.Dataset.from_dict(
        {
            "input_ids": sources,
            "attention_mask": [[1] * len(s) for s in sources],
            "labels": [s[::-1] for s in sources],
        }
    )


def pad_collator(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(f[key]) for f in features], batch_first=True, padding_value=value
        )
        for key, value in fill.items()
    }


def arguments(folder: Path | str, **changes: Any) -> Seq2SeqTrainingArguments:
    """Return arguments of a short, silent run on the CPU."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        optim="fngd",
        optim_args="update_scale=rms",
        learning_rate=3e-3,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Seq2SeqTrainingArguments(**settings | changes)


def make_trainer(
    cls: type[Seq2SeqTrainer],
    args: Seq2SeqTrainingArguments,
    *,
    model: Any = None,
    rows: int = 30,
    **kwargs: Any,
) -> Any:
    """Return a Trainer of the given class over the tiny model and data."""
    options: dict[str, Any] = {"train_dataset": token_pairs(rows), "data_collator": pad_collator}
    return cls(model=model or tiny_marian(), args=args, **options | kwargs)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of weights agree in every bit."""
    return all(torch.equal(first[name], second[name]) for name in first)


LETTERS = "abcdefghijklmnopqrst"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are single letters, for models of 24 tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *LETTERS]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    letters = Tokenizer(model)
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )


def tiny_texts(rows: int, low: int, high: int, seed: int = 0) -> list[str]:
    """Return texts of so many letters, all different."""
    draw, texts = random.Random(seed), {}
    while len(texts) < rows:
        texts[" ".join(draw.choices(LETTERS, k=draw.randint(low, high)))] = True
    return list(texts)

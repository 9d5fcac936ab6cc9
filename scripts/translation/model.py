"""The model and its tokenizer: pretrained, or a small Marian with a SentencePiece vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
from common.arguments import InputError
from common.pretrained import PretrainedArguments, load_pretrained, with_adapters
from transformers import (
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass
class ModelArguments(PretrainedArguments):
    """A pretrained model, or the shape of a small Marian trained from scratch."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder. Default: a new, small Marian."},
    )
    vocab_size: int = field(default=4000, metadata={"help": "New Marian: joint vocabulary."})
    d_model: int = field(default=256, metadata={"help": "New Marian: width."})
    ffn_dim: int = field(default=1024, metadata={"help": "New Marian: feed-forward width."})
    layers: int = field(default=3, metadata={"help": "New Marian: layers on each side."})
    attention_heads: int = field(default=4, metadata={"help": "New Marian: attention heads."})
    dropout: float = field(default=0.1, metadata={"help": "New Marian: dropout."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the final translation."})


def load_model(
    args: ModelArguments, sentences: Iterable[str], max_length: int, languages: tuple[str, str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load or create the model.

    Args:
        args: Model arguments.
        sentences: Text in both languages from which a new vocabulary is learned.
        max_length: Longest sequence in tokens that a new model must take.
        languages: Source and target language.

    Returns:
        Model and tokenizer.

    Raises:
        InputError: If adapters are asked for without a model, or the model cannot be used.
    """
    if args.lora_rank is not None and args.model_name_or_path is None:
        raise InputError("--lora_rank adapts a trained model: give --model_name_or_path")
    if args.model_name_or_path is None:
        tokenizer = train_tokenizer(sentences, args.vocab_size, languages)
        return new_marian(args, tokenizer, max_length), tokenizer
    model, tokenizer = load_pretrained(
        args,
        AutoModelForSeq2SeqLM,
        "sequence-to-sequence head: choose a translation model such as Marian, T5, BART or mBART",
        max_length,
        "--max_source_length and --max_target_length",
    )
    for setting, language in zip(("src_lang", "tgt_lang"), languages, strict=True):
        if hasattr(tokenizer, "lang_code_to_id"):
            setattr(tokenizer, setting, language)
    return with_adapters(model, args, "SEQ_2_SEQ_LM"), tokenizer


def train_tokenizer(
    sentences: Iterable[str], vocab_size: int, languages: tuple[str, str]
) -> MarianTokenizer:
    """Learn a joint SentencePiece vocabulary, and create a Marian tokenizer with it.

    Args:
        sentences: Text in both languages.
        vocab_size: Largest number of pieces; small texts have fewer.
        languages: Source and target language.

    Returns:
        A tokenizer that can be saved and loaded like a pretrained one.
    """
    with TemporaryDirectory() as folder:
        prefix = Path(folder, "joint")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_prefix=str(prefix),
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            character_coverage=1.0,
            bos_id=-1,
            minloglevel=2,
        )
        model_file = f"{prefix}.model"
        pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
        learned = (pieces.id_to_piece(i) for i in range(pieces.get_piece_size()))
        order = ["</s>", "<unk>", *(p for p in learned if p not in ("</s>", "<unk>")), "<pad>"]
        vocabulary = Path(folder, "vocab.json")
        vocabulary.write_text(json.dumps({piece: i for i, piece in enumerate(order)}))
        return MarianTokenizer(
            source_spm=model_file,
            target_spm=model_file,
            vocab=str(vocabulary),
            source_lang=languages[0],
            target_lang=languages[1],
            model_max_length=512,
        )


def new_marian(args: ModelArguments, tokenizer: MarianTokenizer, max_length: int) -> MarianMTModel:
    """Create a random Marian for a tokenizer.

    Args:
        args: Its shape.
        tokenizer: Its tokenizer.
        max_length: Longest sequence in tokens.

    Returns:
        The model.
    """
    tokens: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer),
            d_model=args.d_model,
            encoder_layers=args.layers,
            decoder_layers=args.layers,
            encoder_attention_heads=args.attention_heads,
            decoder_attention_heads=args.attention_heads,
            encoder_ffn_dim=args.ffn_dim,
            decoder_ffn_dim=args.ffn_dim,
            dropout=args.dropout,
            max_position_embeddings=max_length,
            scale_embedding=True,
            **tokens,
        )
    )
    model.generation_config = GenerationConfig(
        **tokens, bad_words_ids=[[tokenizer.pad_token_id]], max_length=max_length
    )
    return model

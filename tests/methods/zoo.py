"""Tiny random models of many architectures, each with a few padded rows it can learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from tests.helpers import padded_tokens

VOCAB, PAD, EOS, CLASSES = 24, 0, 1, 3
LENGTHS = [5, 2, 7, 4]
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS}
ENCODER_DECODER = {
    **TOKENS,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "decoder_start_token_id": PAD,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


@dataclass(frozen=True)
class Architecture:
    """A model, its data, and which of its Linear and Conv2d layers must be left out.

    `odd`: layers without one row a sample, which only a training step can tell.
    """

    config: Callable[[], transformers.PretrainedConfig]
    model: str
    rows: Callable[[], dict[str, Tensor]]
    left_out: str = "none"
    odd: str = "none"

    def build(self) -> nn.Module:
        """Return a random model, the same at every call."""
        torch.manual_seed(0)
        return getattr(transformers, self.model)(self.config())


def translation() -> dict[str, Tensor]:
    source, mask = padded_tokens(LENGTHS, VOCAB)
    target, target_mask = padded_tokens([3, 6, 4, 2], VOCAB)
    labels = target.masked_fill(target_mask == 0, -100)
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def text() -> dict[str, Tensor]:
    tokens, mask = padded_tokens(LENGTHS, VOCAB)
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def sentences() -> dict[str, Tensor]:
    tokens, mask = padded_tokens(LENGTHS, VOCAB)
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(4) % CLASSES}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4) % CLASSES}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(4, 6, 20), "labels": translation()["labels"]}


ZOO = {
    "marian": Architecture(
        lambda: transformers.MarianConfig(**ENCODER_DECODER),
        "MarianMTModel",
        translation,
        "lm_head",
    ),
    "bart": Architecture(
        lambda: transformers.BartConfig(**ENCODER_DECODER, forced_eos_token_id=EOS),
        "BartForConditionalGeneration",
        translation,
        "lm_head",
    ),
    "mbart": Architecture(
        lambda: transformers.MBartConfig(**ENCODER_DECODER, forced_eos_token_id=EOS),
        "MBartForConditionalGeneration",
        translation,
        "lm_head",
    ),
    "m2m_100": Architecture(
        lambda: transformers.M2M100Config(
            **ENCODER_DECODER, encoder_layerdrop=0.0, decoder_layerdrop=0.0
        ),
        "M2M100ForConditionalGeneration",
        translation,
        "lm_head",
    ),
    "nllb_moe": Architecture(
        lambda: transformers.NllbMoeConfig(
            **ENCODER_DECODER,
            num_experts=2,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            expert_capacity=8,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            moe_token_dropout=0.0,
        ),
        "NllbMoeForConditionalGeneration",
        translation,
        r"lm_head|.*\.experts\..*",
        r".*\.router\.classifier",
    ),
    "t5": Architecture(
        lambda: transformers.T5Config(
            **TOKENS,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=PAD,
        ),
        "T5ForConditionalGeneration",
        translation,
        "lm_head",
    ),
    "gpt2": Architecture(
        lambda: transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=8,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=EOS,
            eos_token_id=EOS,
        ),
        "GPT2LMHeadModel",
        text,
        "lm_head",
    ),
    "llama": Architecture(
        lambda: transformers.LlamaConfig(
            **TOKENS,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        ),
        "LlamaForCausalLM",
        text,
        "lm_head",
    ),
    "bert": Architecture(
        lambda: transformers.BertConfig(
            vocab_size=VOCAB,
            pad_token_id=PAD,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "BertForSequenceClassification",
        sentences,
    ),
    "vit": Architecture(
        lambda: transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=16,
            patch_size=8,
            num_labels=CLASSES,
        ),
        "ViTForImageClassification",
        images,
    ),
    "convnext": Architecture(
        lambda: transformers.ConvNextConfig(
            num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], num_labels=CLASSES, patch_size=2
        ),
        "ConvNextForImageClassification",
        images,
    ),
    "resnet": Architecture(
        lambda: transformers.ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=CLASSES,
        ),
        "ResNetForImageClassification",
        images,
    ),
    # Windows of 4x4 patches: four an image in the first stage, one in the second.
    "swin": Architecture(
        lambda: transformers.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=4,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            num_labels=CLASSES,
            drop_path_rate=0.0,
        ),
        "SwinForImageClassification",
        images,
        odd=r".*\.layers\.0\.blocks\.0\.attention\..*",
    ),
    "whisper": Architecture(
        lambda: transformers.WhisperConfig(
            **{k: v for k, v in ENCODER_DECODER.items() if k != "max_position_embeddings"},
            num_mel_bins=6,
            max_source_positions=10,
            max_target_positions=16,
            bos_token_id=EOS,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        ),
        "WhisperForConditionalGeneration",
        speech,
        "proj_out",
    ),
}

"""Models with random weights, and batches of random inputs, for the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))
from images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification  # noqa: E402

if TYPE_CHECKING:
    from workload import Workload


def marian(workload: Workload) -> torch.nn.Module:
    """Builds a translation model with as many decoder as encoder layers.

    Args:
        workload: Shapes.

    Returns:
        The model.
    """
    return MarianMTModel(
        MarianConfig(
            vocab_size=workload.vocab_size,
            d_model=workload.d_model,
            encoder_layers=workload.layers,
            decoder_layers=workload.layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=workload.ffn_dim,
            decoder_ffn_dim=workload.ffn_dim,
            max_position_embeddings=max(64, workload.length),
            pad_token_id=workload.vocab_size - 1,
            eos_token_id=0,
            decoder_start_token_id=workload.vocab_size - 1,
        )
    )


def gpt2(workload: Workload) -> torch.nn.Module:
    """Builds a GPT-2.

    Args:
        workload: Shapes.

    Returns:
        The model.
    """
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=workload.vocab_size,
            n_embd=workload.d_model,
            n_layer=workload.layers,
            n_head=workload.d_model // 64,
            n_inner=workload.ffn_dim,
            n_positions=workload.length,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lora(workload: Workload) -> torch.nn.Module:
    """Builds a Llama with frozen weights and LoRA adapters at every linear layer.

    Args:
        workload: Shapes.

    Returns:
        The model.
    """
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=workload.vocab_size,
            hidden_size=workload.d_model,
            intermediate_size=workload.ffn_dim,
            num_hidden_layers=workload.layers,
            num_attention_heads=workload.d_model // 128,
            max_position_embeddings=workload.length,
        )
    )
    settings = LoraConfig(task_type="CAUSAL_LM", r=workload.lora_rank, target_modules="all-linear")
    return get_peft_model(base, settings)


def resnet18(workload: Workload) -> torch.nn.Module:
    """Builds ResNet-18 for 32x32 images.

    Args:
        workload: Shapes.

    Returns:
        The model.
    """
    return CifarResNetForImageClassification(
        CifarResNetConfig(
            embedding_size=workload.width,
            hidden_sizes=[workload.width * factor for factor in (1, 2, 4, 8)],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=workload.classes,
            problem_type="single_label_classification",
        )
    )


def pairs(workload: Workload) -> dict[str, torch.Tensor]:
    """Draws sentence pairs.

    Args:
        workload: Shapes.

    Returns:
        Inputs and labels.
    """
    shape = (workload.batch_size, workload.length)
    source, target = torch.randint(1, workload.vocab_size - 1, (2, *shape))
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}


def texts(workload: Workload) -> dict[str, torch.Tensor]:
    """Draws texts, to be predicted token by token.

    Args:
        workload: Shapes.

    Returns:
        Inputs and labels.
    """
    tokens = torch.randint(workload.vocab_size, (workload.batch_size, workload.length))
    return {"input_ids": tokens, "labels": tokens}


def pictures(workload: Workload) -> dict[str, torch.Tensor]:
    """Draws images.

    Args:
        workload: Shapes.

    Returns:
        Inputs and labels.
    """
    return {
        "pixel_values": torch.randn(workload.batch_size, 3, 32, 32),
        "labels": torch.randint(workload.classes, (workload.batch_size,)),
    }


Build = Callable[["Workload"], torch.nn.Module]
Draw = Callable[["Workload"], dict[str, torch.Tensor]]
MODELS: dict[str, tuple[Build, Draw]] = {
    "marian": (marian, pairs),
    "gpt2": (gpt2, texts),
    "lora": (lora, texts),
    "resnet18": (resnet18, pictures),
}

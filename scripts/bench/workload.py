"""The training steps that the benchmarks measure: random models, random batches, optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    set_seed,
)

from hf_fngd import FNGD, create_fngd_optimizer

MODES = ["none", "non-reentrant", "reentrant"]


def marian(shapes: Workload) -> nn.Module:
    """Build a translation model with as many decoder as encoder layers."""
    return MarianMTModel(
        MarianConfig(
            vocab_size=shapes.vocab_size,
            d_model=shapes.d_model,
            encoder_layers=shapes.layers,
            decoder_layers=shapes.layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=shapes.ffn_dim,
            decoder_ffn_dim=shapes.ffn_dim,
            max_position_embeddings=max(64, shapes.length),
            pad_token_id=shapes.vocab_size - 1,
            eos_token_id=0,
            decoder_start_token_id=shapes.vocab_size - 1,
        )
    )


def gpt2(shapes: Workload) -> nn.Module:
    """Build a GPT-2."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shapes.vocab_size,
            n_embd=shapes.d_model,
            n_layer=shapes.layers,
            n_head=shapes.d_model // 64,
            n_inner=shapes.ffn_dim,
            n_positions=shapes.length,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lora(shapes: Workload) -> nn.Module:
    """Build a Llama with frozen weights and LoRA adapters at every linear layer."""
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shapes.vocab_size,
            hidden_size=shapes.d_model,
            intermediate_size=shapes.ffn_dim,
            num_hidden_layers=shapes.layers,
            num_attention_heads=shapes.d_model // 128,
            max_position_embeddings=shapes.length,
        )
    )
    settings = LoraConfig(task_type="CAUSAL_LM", r=shapes.lora_rank, target_modules="all-linear")
    return get_peft_model(base, settings)


def resnet18(shapes: Workload) -> nn.Module:
    """Build ResNet-18 for 32x32 images, as scripts/images does: with a small stem."""
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=shapes.width,
            hidden_sizes=[shapes.width * factor for factor in (1, 2, 4, 8)],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=shapes.classes,
            problem_type="single_label_classification",
        )
    )
    stem = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, shapes.width, kernel_size=3, padding=1, bias=False)
    stem.pooler = nn.Identity()
    return model


def pairs(shapes: Workload) -> dict[str, Tensor]:
    """Draw sentence pairs."""
    source, target = torch.randint(1, shapes.vocab_size - 1, (2, shapes.batch_size, shapes.length))
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}


def texts(shapes: Workload) -> dict[str, Tensor]:
    """Draw texts, to be predicted token by token."""
    tokens = torch.randint(shapes.vocab_size, (shapes.batch_size, shapes.length))
    return {"input_ids": tokens, "labels": tokens}


def pictures(shapes: Workload) -> dict[str, Tensor]:
    """Draw images with their classes."""
    return {
        "pixel_values": torch.randn(shapes.batch_size, 3, 32, 32),
        "labels": torch.randint(shapes.classes, (shapes.batch_size,)),
    }


MODELS = {
    "marian": (marian, pairs),
    "gpt2": (gpt2, texts),
    "lora": (lora, texts),
    "resnet18": (resnet18, pictures),
}


@dataclass
class Workload:
    """Shapes of a model and its batch."""

    shapes: str = field(
        default="marian", metadata={"help": "Kind of the model.", "choices": list(MODELS)}
    )
    width: int = field(default=64, metadata={"help": "resnet18: channels of the first stage."})
    classes: int = field(default=100, metadata={"help": "resnet18: number of classes."})

    d_model: int = field(default=256, metadata={"help": "Width of a Transformer."})
    ffn_dim: int = field(default=1024, metadata={"help": "Width of its feed-forward blocks."})
    layers: int = field(default=3, metadata={"help": "Its layers (marian: twice as many)."})
    vocab_size: int = field(default=8000, metadata={"help": "Size of its vocabulary."})
    lora_rank: int = field(default=16, metadata={"help": "lora: rank of the adapters."})
    batch_size: int = field(default=64, metadata={"help": "Samples in a batch."})
    length: int = field(default=20, metadata={"help": "Tokens of each sample."})
    bf16: bool = field(default=False, metadata={"help": "Forward under autocast to bfloat16."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of all optimizers."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    checkpointing: str = field(
        default="none", metadata={"help": "Checkpointing of activations.", "choices": MODES}
    )

    def model(self) -> nn.Module:
        """Build the model in training mode, with the same random weights at every call."""
        set_seed(0)
        torch.set_num_threads(self.threads)
        model = MODELS[self.shapes][0](self).train()
        if self.checkpointing != "none":
            model.activation_checkpointing_enable(
                {"use_reentrant": self.checkpointing == "reentrant"}
            )
        return model

    def batch(self) -> dict[str, Tensor]:
        """Draw inputs and labels."""
        return MODELS[self.shapes][1](self)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Run the model forward and return its loss."""
        with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=self.bf16):
            return model(**batch).loss


_ADAMW = {"update_rule": "adamw"}
_RMS = {"update_rule": "sgd", "update_scale": "rms"}
# Name, epoch (0: the first, 1: a later one) and settings. None is torch's AdamW.
VARIANTS: dict[str, tuple[int, dict[str, str]] | None] = {
    "adamw": None,
    "fngd_adamw later epochs": (1, _ADAMW),
    "fngd_adamw first epoch": (0, _ADAMW),
    "fngd_adamw first epoch, gram_dtype=bfloat16": (0, {**_ADAMW, "gram_dtype": "bfloat16"}),
    "fngd later epochs": (1, {"update_rule": "sgd", "update_scale": "none"}),
    "fngd later epochs, update_scale=rms": (1, _RMS),
    "fngd first epoch, update_scale=rms": (0, _RMS),
}


def make_step(workload: Workload, variant: str, backend: str | None = None) -> Callable[[], None]:
    """Build a model with its optimizer, and return a function that trains one step.

    Args:
        workload: Shapes.
        variant: A name in `VARIANTS`.
        backend: Backend of torch.compile; None runs the model as it is.

    Returns:
        A function that runs one training step on the workload's batch.
    """
    model, batch = workload.model(), workload.batch()
    if backend is not None:
        model.compile(backend=backend)
    rate, choice = workload.learning_rate, VARIANTS[variant]
    if choice is None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)
    else:
        optimizer = create_fngd_optimizer(model, lr=rate, **choice[1])
        optimizer.bind_dataset(workload.batch_size)

    def step() -> None:
        if isinstance(optimizer, FNGD):
            optimizer.set_batch(range(workload.batch_size))
        workload.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    if isinstance(optimizer, FNGD) and choice is not None and choice[0]:
        step()
        optimizer.start_epoch(choice[0])
    return step

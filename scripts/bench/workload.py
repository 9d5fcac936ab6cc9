"""The model, the batch and the optimizers that the benchmarks compare."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import MarianConfig, MarianMTModel, PreTrainedModel, set_seed

from hf_fngd import FNGD, create_fngd_optimizer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification  # noqa: E402


def cifar_resnet18(width: int, classes: int) -> PreTrainedModel:
    """Builds ResNet-18 for 32x32 images.

    Args:
        width: Channels of the first stage.
        classes: Number of classes.

    Returns:
        The model.
    """
    return CifarResNetForImageClassification(
        CifarResNetConfig(
            embedding_size=width,
            hidden_sizes=[width * factor for factor in (1, 2, 4, 8)],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            num_labels=classes,
            problem_type="single_label_classification",
        )
    )


MODES = ["none", "non-reentrant", "reentrant"]


@dataclass
class Workload:
    """Shapes of a model and its batch: a translation model, or ResNet-18 for 32x32 images."""

    shapes: str = field(default="marian", metadata={"help": "marian or resnet18."})
    width: int = field(default=64, metadata={"help": "ResNet-18: channels of the first stage."})
    classes: int = field(default=100, metadata={"help": "ResNet-18: number of classes."})

    d_model: int = field(default=256, metadata={"help": "Width of the Marian model."})
    ffn_dim: int = field(default=1024, metadata={"help": "Width of its feed-forward blocks."})
    layers: int = field(default=3, metadata={"help": "Encoder layers, and as many decoder layers."})
    vocab_size: int = field(default=8000, metadata={"help": "Size of the joint vocabulary."})
    batch_size: int = field(default=64, metadata={"help": "Sentence pairs a batch."})
    length: int = field(default=20, metadata={"help": "Tokens of each sentence."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all optimizers."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    checkpointing: str = field(
        default="none",
        metadata={"help": "Of activations: none, non-reentrant or reentrant.", "choices": MODES},
    )

    def model(self) -> PreTrainedModel:
        """Builds the model, with the same random weights at every call.

        Returns:
            The model in training mode, its activations checkpointed or not.
        """
        model = self._build().train()
        if self.checkpointing != "none":
            model.activation_checkpointing_enable(
                {"use_reentrant": self.checkpointing == "reentrant"}
            )
        return model

    def _build(self) -> PreTrainedModel:
        """Builds the model.

        Returns:
            The model.

        Raises:
            SystemExit: For unknown shapes.
        """
        set_seed(0)
        torch.set_num_threads(self.threads)
        if self.shapes == "resnet18":
            return cifar_resnet18(self.width, self.classes)
        if self.shapes != "marian":
            raise SystemExit(f"--shapes {self.shapes}: choose marian or resnet18")
        config = MarianConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            encoder_layers=self.layers,
            decoder_layers=self.layers,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=self.ffn_dim,
            decoder_ffn_dim=self.ffn_dim,
            max_position_embeddings=max(64, self.length),
            pad_token_id=self.vocab_size - 1,
            eos_token_id=0,
            decoder_start_token_id=self.vocab_size - 1,
        )
        return MarianMTModel(config)

    def batch(self) -> dict[str, torch.Tensor]:
        """Draws a batch of random tokens, or images.

        Returns:
            Inputs and labels.
        """
        if self.shapes == "resnet18":
            return {
                "pixel_values": torch.randn(self.batch_size, 3, 32, 32),
                "labels": torch.randint(0, self.classes, (self.batch_size,)),
            }
        shape = (self.batch_size, self.length)
        source, target = torch.randint(1, self.vocab_size - 1, (2, *shape))
        return {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "labels": target,
        }


# Name, phase (collect: first epoch; reuse: later epochs) and settings. None is torch's AdamW.
VARIANTS: dict[str, tuple[str, dict[str, object]] | None] = {
    "adamw": None,
    "fngd_adamw later epochs": ("reuse", {"update_rule": "adamw"}),
    "fngd_adamw first epoch": ("collect", {"update_rule": "adamw"}),
    "fngd later epochs": ("reuse", {"update_rule": "sgd", "update_scale": "rms"}),
    "fngd first epoch": ("collect", {"update_rule": "sgd", "update_scale": "rms"}),
}


def make_step(workload: Workload, variant: str, backend: str | None = None) -> Callable[[], None]:
    """Builds a model with its optimizer and gives a function that trains one step.

    Args:
        workload: Shapes.
        variant: A name in `VARIANTS`.
        backend: Of torch.compile; None runs the model as it is.

    Returns:
        A function that runs one training step on the workload's batch.
    """
    model, batch = workload.model(), workload.batch()
    if backend is not None:
        model.compile(backend=backend)
    choice = VARIANTS[variant]
    if choice is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=workload.learning_rate)
    else:
        optimizer = create_fngd_optimizer(
            model, lr=workload.learning_rate, num_samples=workload.batch_size, **choice[1]
        )
        if choice[0] == "reuse":
            _train(model, optimizer, batch)
            optimizer.start_epoch(1)
    return lambda: _train(model, optimizer, batch)


def _train(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]
) -> None:
    if isinstance(optimizer, FNGD):
        optimizer.set_batch(range(len(batch["input_ids"])))
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def write_results(path: str | None, workload: Any, results: dict[str, Any]) -> None:
    """Writes the results of a benchmark with what they were measured on.

    Args:
        path: JSON file; nothing is written without one.
        workload: Dataclass of shapes, with `threads`.
        results: Builtins.
    """
    if path is None:
        return
    report = {
        "workload": asdict(workload),
        "machine": f"{platform.machine()} CPU, {workload.threads} threads",
        "torch": torch.__version__,
        "results": results,
    }
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {file}")

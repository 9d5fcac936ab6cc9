"""The model, the batch and the optimizers that the benchmarks compare."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import MODELS
from transformers import set_seed

from hf_fngd import FNGD, create_fngd_optimizer

MODES = ["none", "non-reentrant", "reentrant"]


@dataclass
class Workload:
    """Shapes of a model and its batch."""

    shapes: str = field(default="marian", metadata={"help": f"One of {', '.join(MODELS)}."})
    width: int = field(default=64, metadata={"help": "ResNet-18: channels of the first stage."})
    classes: int = field(default=100, metadata={"help": "ResNet-18: number of classes."})

    d_model: int = field(default=256, metadata={"help": "Width of a Transformer."})
    ffn_dim: int = field(default=1024, metadata={"help": "Width of its feed-forward blocks."})
    layers: int = field(default=3, metadata={"help": "Its layers (marian: twice as many)."})
    vocab_size: int = field(default=8000, metadata={"help": "Size of its vocabulary."})
    lora_rank: int = field(default=16, metadata={"help": "lora: rank of the adapters."})
    batch_size: int = field(default=64, metadata={"help": "Samples a batch."})
    length: int = field(default=20, metadata={"help": "Tokens of each sample."})
    bf16: bool = field(default=False, metadata={"help": "Forward under autocast to bfloat16."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of all optimizers."})
    threads: int = field(default=2, metadata={"help": "Threads of torch."})
    checkpointing: str = field(
        default="none",
        metadata={"help": "Of activations: none, non-reentrant or reentrant.", "choices": MODES},
    )

    def __post_init__(self) -> None:
        if self.shapes not in MODELS:
            raise ValueError(f"--shapes {self.shapes}: choose one of {', '.join(MODELS)}")

    def model(self) -> torch.nn.Module:
        """Builds the model, with the same random weights at every call.

        Returns:
            The model in training mode, its activations checkpointed or not.
        """
        set_seed(0)
        torch.set_num_threads(self.threads)
        model = MODELS[self.shapes][0](self).train()
        if self.checkpointing != "none":
            model.activation_checkpointing_enable(
                {"use_reentrant": self.checkpointing == "reentrant"}
            )
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        """Draws a batch.

        Returns:
            Inputs and labels.
        """
        return MODELS[self.shapes][1](self)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Runs the model forward.

        Args:
            model: The model.
            batch: Inputs and labels.

        Returns:
            Its loss.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return model(**batch).loss


_RMS = {"update_rule": "sgd", "update_scale": "rms"}
# Settings of a cheaper first epoch.
CHEAPER: list[dict[str, object]] = [
    {"gram_outputs": 64},
    {"gram_inputs": 16, "gram_outputs": 64},
    {"gram_dtype": "bfloat16"},
]
# Name, phase (collect: first epoch; reuse: later epochs) and settings. None is torch's AdamW.
VARIANTS: dict[str, tuple[str, dict[str, object]] | None] = {
    "adamw": None,
    "fngd_adamw later epochs": ("reuse", {"update_rule": "adamw"}),
    "fngd_adamw first epoch": ("collect", {"update_rule": "adamw"}),
    **{
        f"fngd_adamw first epoch, {','.join(f'{k}={v}' for k, v in cheaper.items())}": (
            "collect",
            {"update_rule": "adamw", **cheaper},
        )
        for cheaper in CHEAPER
    },
    "fngd later epochs": ("reuse", {"update_rule": "sgd", "update_scale": "none"}),
    "fngd later epochs, update_scale=rms": ("reuse", _RMS),
    "fngd first epoch, update_scale=rms": ("collect", _RMS),
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    if choice is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameters, lr=workload.learning_rate, fused=True
        )
    else:
        optimizer = create_fngd_optimizer(
            model, lr=workload.learning_rate, num_samples=workload.batch_size, **choice[1]
        )

    def step() -> None:
        if isinstance(optimizer, FNGD):
            optimizer.set_batch(range(workload.batch_size))
        workload.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    if choice is not None and choice[0] == "reuse":
        step()
        assert isinstance(optimizer, FNGD)
        optimizer.start_epoch(1)
    return step


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

"""Facts of a run: task, settings, environment and optimizer, and what its card says of them."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate
import datasets
import torch
import transformers
from transformers import Trainer, TrainingArguments

import hf_fngd
from common.averaging import AverageArguments, sentence
from common.baselines import baselines
from common.source import describe, test_name
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.hf.registry import split_words
from hf_fngd.layers.selection import layer_table
from hf_fngd.methods import METHODS
from hf_fngd.report.card import CardFacts
from hf_fngd.report.runs import overfitting, scores

ONE_RUN = "The scores are those of one run with one seed."
ADAPTERS = "These are LoRA adapters: loading them needs peft and the model they were trained on."


@dataclass(frozen=True)
class Task:
    """The task of a script: its own metrics, and what its models cannot do."""

    name: str
    metrics: tuple[str, ...]
    limits: tuple[str, ...]

    def scores(self, found: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
        """Read the scores of a run: those of the test set, or else of the validation set.

        Args:
            found: Content of metrics.json.

        Returns:
            `test` or `validation`, and the scores by metric: the task's own first, then others;
            those of further test sets end with `_` and the name of the set.
        """
        split = next((name for name in ("test", "validation") if found.get(name)), "test")
        read = scores(found.get(split, {}), "eval" if split == "validation" else "test")
        return split, {name: read[name] for name in self.metrics if name in read} | read


TASKS = {
    task.name: task
    for task in (
        Task(
            "translation",
            ("bleu", "chrf"),
            (ONE_RUN, "The model knows the kind of sentence it was trained on and little else."),
        ),
        Task(
            "image-classification",
            ("accuracy",),
            (ONE_RUN, "The model knows the kind of image it was trained on and little else."),
        ),
        Task(
            "summarization",
            ("rouge1", "rouge2", "rougeL"),
            (ONE_RUN, "ROUGE counts words in common; it does not see what is untrue."),
        ),
        Task(
            "text-generation",
            ("perplexity",),
            (ONE_RUN, "Perplexities compare only between models with the same tokenizer."),
        ),
    )
}
# A data argument that only this task's script has; without one, the task is image classification.
MARKS = {
    "source_lang": "translation",
    "summary_column": "summarization",
    "text_column": "text-generation",
}


def environment(*more: ModuleType) -> dict[str, Any]:
    """Describe where and how the run was made.

    Args:
        *more: Modules whose version matters as well.

    Returns:
        Command, versions and device.
    """
    modules = (hf_fngd, torch, transformers, accelerate, datasets, *more)
    threads = torch.get_num_threads()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in modules},
        },
        "device": device,
    }


def settings(
    model_args: Any, data_args: Any, average: AverageArguments, args: TrainingArguments
) -> dict[str, Any]:
    """Collect the settings of the run.

    Args:
        model_args: Dataclass of model arguments.
        data_args: Dataclass of data arguments.
        average: Average of the weights.
        args: Training arguments.

    Returns:
        Builtins, for metrics.json.
    """
    chosen = (
        "optim",
        "optim_args",
        "optim_target_modules",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "max_grad_norm",
        "label_smoothing_factor",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "bf16",
        "fp16",
        "seed",
    )
    training = {name: getattr(args, name) for name in chosen}
    plain = {name: getattr(value, "value", value) for name, value in training.items()}
    plain |= average.settings()
    return {"model": asdict(model_args), "data": asdict(data_args), "training": plain}


def local_base(model: Mapping[str, Any]) -> dict[str, str]:
    """Name the local model that a run started from; later its folder may be gone.

    Args:
        model: Model arguments.

    Returns:
        Name of the folder as `local_base`; nothing for a new model or one of the Hub.
    """
    name = model["model_name_or_path"]
    return {"local_base": Path(name).resolve().name} if name and Path(name).is_dir() else {}


def optimizer_facts(trainer: Trainer) -> dict[str, Any]:
    """Describe an optimizer of hf_fngd.

    Args:
        trainer: A Trainer.

    Returns:
        Method, settings and layers as `optimizer`; nothing for any other optimizer.
    """
    optimizer = unwrap_optimizer(trainer.optimizer)
    if optimizer is None:
        return {}
    facts = {"method": optimizer.method, "config": optimizer.config.to_dict()}
    return {"optimizer": {**facts, "layers": optimizer.selection.rows()}}


def _changed(training: Mapping[str, Any], optimizer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings that differ from the defaults of transformers and of the optimizer."""
    defaults = {one.name: one.default for one in fields(TrainingArguments)}
    changed = {
        name: value
        for name, value in training.items()
        # The card's text names the optimizer and the seed.
        if name not in ("optim", "seed") and value not in (None, defaults.get(name))
    }
    if optimizer is None:
        return changed
    config, kind = optimizer["config"], METHODS[optimizer["method"]].config_class
    defaults, given = kind().to_dict(), split_words(training["optim_args"] or "")
    # The optimizer used its own value of a setting that both have, such as AdamW's betas. A
    # setting that hf_fngd has no more differs if the run named it.
    text = ("optim_args", "optim_target_modules")
    return {n: value for n, value in changed.items() if n not in (*text, *config)} | {
        name: value
        for name, value in config.items()
        if value is not None and (value != defaults[name] if name in defaults else name in given)
    }


def card_facts(found: dict[str, Any], folder: Path) -> CardFacts:
    """Collect the facts of the model card, from the numbers of a run and of the runs beside it.

    Args:
        found: Content of metrics.json.
        folder: Folder of the model, which names it. The folders beside it are searched for runs of
            the same command with another optimizer.

    Returns:
        The facts.
    """
    data, training = found["settings"]["data"], found["settings"]["training"]
    named = (task for mark, task in MARKS.items() if mark in data)
    task = TASKS[next(named, "image-classification")]
    optimizer = found.get("optimizer")
    split, read = task.scores(found)
    further = tuple(f"_{test_name(path)}" for path in data.get("extra_test_file", ()))
    tested = found.get(split, {})
    places = SimpleNamespace(**data)
    model = found["settings"]["model"]
    limits = [*task.limits, overfitting(found["history"]), model.get("lora_rank") and ADAPTERS]
    return CardFacts(
        model_name=folder.resolve().name,
        task=task.name,
        languages=[data[key] for key in ("source_lang", "target_lang") if key in data],
        dataset=describe(places, "train"),
        train_rows=found.get("train_rows"),
        test_dataset=describe(places, split),
        split=split,
        dataset_id=data.get("dataset_id") or data["dataset_name"],
        dataset_config=data["dataset_config_name"],
        base_model=None if "local_base" in found else model["model_name_or_path"],
        local_base=found.get("local_base"),
        optimizer=str(training["optim"]),
        settings=_changed(training, optimizer),
        layers=layer_table(optimizer["layers"]) if optimizer else "",
        average=sentence(found),
        seed=training["seed"],
        curves="curves.png" if found["history"] else None,
        coefficients="coefficients.png" if optimizer and "coefficients" in optimizer else None,
        metrics={name: value for name, value in read.items() if not name.endswith(further)},
        further={name: value for name, value in read.items() if name.endswith(further)},
        baselines=baselines(found, folder, task.scores),
        signatures={n: tested[f"{n}_signature"] for n in read if f"{n}_signature" in tested},
        limits=[limit for limit in limits if limit],
        prefix=data.get("source_prefix") or "",
        custom_code=found.get("custom_code", False),
        **found["environment"],
    )

r"""Train several models at once on one GPU, within some minutes: a comparison without a search.

    python scripts/gpu_runs.py --tasks translation images --data data --minutes 4.5 --jobs 4 \
        --work runs/gpu --output scripts/bench/results/gpu/runs.json

translation: a Marian of the paper's size (d_model 512, 6 + 6 layers) on all 29,000 pairs of
Multi30K en-de. images: a ResNet-18 on CIFAR-100. Every run is run_translation.py or
run_image_classification.py in a process of its own, under autocast to bfloat16. `--jobs` of them
share the GPU, so that their seconds say little about the optimizers; gpu.py measures those.

Learning rates come from the searches of scripts/plans, on smaller models. Whatever has not ended in
time is ended, and its result says so. The result file is written after every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.results import thin
from tabulate import tabulate
from transformers import HfArgumentParser

from hf_fngd.report.runs import numbers

HERE = Path(__file__).resolve().parent
_COMMON: dict[str, Any] = {
    "bf16": True,
    "do_eval": True,
    "eval_strategy": "no",
    "logging_steps": 50,
    "max_grad_norm": 1.0,
    "dataloader_num_workers": 1,
    "lr_scheduler_type": "linear",
}
_ADAMW = {"optim": "plain", "optim_args": "update_rule=adamw"}
# Script, settings (over those of the JSON file beside the script), and optimizers.
TASKS: dict[str, tuple[str, str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "translation": (
        "run_translation.py",
        "multi30k.json",
        {
            "vocab_size": 8000,
            "d_model": 512,
            "ffn_dim": 2048,
            "layers": 6,
            "attention_heads": 8,
            "label_smoothing_factor": 0.1,
            "warmup_steps": 0.1,
            "per_device_train_batch_size": 128,
            "per_device_eval_batch_size": 500,
            "extra_test_file": [
                "data/multi30k/test_2017_flickr.en-de.jsonl.gz",
                "data/multi30k/test_2017_mscoco.en-de.jsonl.gz",
            ],
        },
        {
            "adamw": {**_ADAMW, "learning_rate": 5e-4},
            "muon": {"optim": "muon", "optim_args": "other_lr=1e-3", "learning_rate": 0.02},
            "muon_soap": {
                "optim": "muon_soap",
                "optim_args": "other_lr=2e-3",
                "learning_rate": 2e-3,
            },
            "fngd_adamw": {
                "optim": "fngd_adamw",
                "optim_args": "damping=1,share=sample",
                "learning_rate": 5e-4,
            },
            # As in the paper: SGD with momentum, no scaling of the update.
            "fngd": {
                "optim": "fngd",
                "optim_args": "damping=1,share=sample,update_scale=none,other_lr=5e-4",
                "learning_rate": 0.3,
            },
            "adamw_own_lr": {
                "optim": "plain",
                "optim_args": "update_rule=adamw,other_lr=2e-3",
                "learning_rate": 5e-4,
            },
        },
    ),
    "images": (
        "run_image_classification.py",
        "cifar100.json",
        {"warmup_steps": 0.05, "eval_strategy": "epoch"},
        {
            "sgd": {
                "optim": "plain",
                "optim_args": "update_rule=sgd,other_lr=3e-3",
                "learning_rate": 0.15,
            },
            "adamw": {**_ADAMW, "learning_rate": 1e-3},
            "muon": {"optim": "muon", "optim_args": "other_lr=3e-3", "learning_rate": 0.05},
            "fngd": {
                "optim": "fngd",
                "optim_args": "damping=1,share=sample,update_scale=none,other_lr=3e-3",
                "learning_rate": 0.2,
            },
        },
    ),
}
_TINY: dict[str, Any] = {
    "max_steps": 4,
    "logging_steps": 2,
    "max_train_samples": 600,
    "max_eval_samples": 20,
    "max_predict_samples": 20,
    "per_device_train_batch_size": 16,
    "dataloader_num_workers": 0,
    "use_cpu": True,
}
_TINY_MODELS: dict[str, dict[str, Any]] = {
    "translation": {
        "vocab_size": 300,
        "d_model": 16,
        "ffn_dim": 16,
        "layers": 1,
        "attention_heads": 2,
        "num_beams": 1,
        "generation_max_length": 10,
    },
    "images": {"width": 4},
}


@dataclass
class Options:
    """Tasks, how long, and where to."""

    output: str = field(metadata={"help": "JSON file for the results."})
    work: str = field(metadata={"help": "Folder for settings, messages and models."})
    data: str = field(default="data", metadata={"help": "Folder of the data sets."})
    tasks: list[str] = field(
        default_factory=lambda: list(TASKS),
        metadata={"help": "Tasks, in this order.", "choices": list(TASKS)},
    )
    optimizers: list[str] | None = field(default=None, metadata={"help": "Names; default: all."})
    seeds: list[int] = field(default_factory=lambda: [1], metadata={"help": "Seeds of each run."})
    jobs: int = field(default=4, metadata={"help": "Runs that share the GPU."})
    minutes: float = field(default=4.5, metadata={"help": "Limit for all runs together."})
    translation_epochs: float = field(default=10.0, metadata={"help": "Epochs of a translation."})
    images_epochs: float = field(default=10.0, metadata={"help": "Epochs on the images."})
    tiny: bool = field(
        default=False, metadata={"help": "Few steps of tiny models, to rehearse on a CPU."}
    )


class Run:
    """One training process.

    Args:
        task: Name of the task.
        optimizer: Name of the optimizer.
        seed: Its seed.
        options: Options.
    """

    def __init__(self, task: str, optimizer: str, seed: int, options: Options) -> None:
        script, base, changes, optimizers = TASKS[task]
        self.task, self.optimizer, self.seed = task, optimizer, seed
        self.folder = Path(options.work, f"{task}-{optimizer}-{seed}")
        self.command = [sys.executable, str(HERE / script), str(self.folder / "settings.json")]
        given = json.loads((HERE / base).read_text()) | _COMMON | changes | optimizers[optimizer]
        given |= {
            "num_train_epochs": getattr(options, f"{task}_epochs"),
            "seed": seed,
            "output_dir": str(self.folder / "out"),
        }
        if options.tiny:
            given |= {**_TINY, **_TINY_MODELS[task]}
        self.settings = {name: _moved(value, options.data) for name, value in given.items()}
        self.begun = 0.0
        self.seconds = 0.0
        self.process: Any = None
        self.state = "not begun"

    def begin(self, threads: int) -> None:
        """Start the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.joinpath("settings.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        more = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with self.folder.joinpath("said.txt").open("w") as said:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **more, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self.begun, self.state = time.perf_counter(), "running"

    def ended(self, now: bool = False) -> bool:
        """Return whether the process has ended, after ending it if it must be `now`."""
        if self.state != "running":
            return True
        if now and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
            self.state = "ended: no time was left"
        elif self.process.poll() is None:
            return False
        else:
            self.state = "ok" if self.process.returncode == 0 else "failed"
        self.seconds = time.perf_counter() - self.begun
        return True

    def result(self) -> dict[str, Any]:
        """Return scores, seconds and losses, or the last words of a run without them."""
        found: dict[str, Any] = {
            "task": self.task,
            "optimizer": self.optimizer,
            "seed": self.seed,
            "state": self.state,
            "total_seconds": self.seconds,
            "settings": self.settings,
        }
        file = self.folder / "out" / "metrics.json"
        if self.state == "ok":
            metrics = json.loads(file.read_text(encoding="utf-8"))
            history = thin(metrics.get("history", []))
            return {**found, **numbers(metrics), "history": history}
        if self.process is not None:
            said = self.folder.joinpath("said.txt").read_text(encoding="utf-8", errors="replace")
            found["said"] = said[-3000:]
        return found


def _moved(value: Any, data: str) -> Any:
    if isinstance(value, list):
        return [_moved(one, data) for one in value]
    if isinstance(value, str) and value.startswith("data/"):
        return str(Path(data, value.removeprefix("data/")))
    return value


def write(file: Path, options: Options, runs: list[Run]) -> list[dict[str, Any]]:
    """Write the results so far, and return them."""
    results = [run.result() for run in runs]
    file.parent.mkdir(parents=True, exist_ok=True)
    text = {"jobs": options.jobs, "minutes": options.minutes, "runs": results}
    file.write_text(json.dumps(text, indent=2) + "\n")
    return results


def main() -> None:
    """Run all trainings from the command line."""
    (options,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()
    end = time.perf_counter() + 60 * options.minutes
    runs = [
        Run(task, name, seed, options)
        for task in options.tasks
        for seed in options.seeds
        for name in TASKS[task][3]
        if options.optimizers is None or name in options.optimizers
    ]
    waiting, running = list(runs), []
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    while waiting or running:
        late = time.perf_counter() > end
        for run in [one for one in running if one.ended(now=late)]:
            running.remove(run)
            print(f"{run.folder.name}: {run.state}, {run.seconds:.0f} s", flush=True)
            write(Path(options.output), options, runs)
        if late:
            break
        while waiting and len(running) < options.jobs:
            running.append(waiting.pop(0))
            running[-1].begin(threads)
        time.sleep(0.2)
    results = write(Path(options.output), options, runs)
    rows = [
        {
            **{key: one[key] for key in ("task", "optimizer", "seed", "state")},
            "loss": one.get("train_loss"),
            **{n: v for n, v in one.get("test", {}).items() if "bleu" in n or "accuracy" in n},
            "s": one.get("train_seconds"),
            "s/step": one.get("seconds_per_step"),
        }
        for one in results
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g"))
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()

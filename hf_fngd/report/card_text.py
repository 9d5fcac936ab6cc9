"""Text of a model card: results, curves, training, use, limits and citation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fngd.hf.registry import OPTIMIZERS

# The class of a task's model: by default that of translation.
_MODELS = {"text-generation": "AutoModelForCausalLM"}
_TEXTS = """\
from transformers import {model}, AutoTokenizer

folder = "..."  # this repository or folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder{trust})
inputs = tokenizer({text}, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))
"""
_IMAGES = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "..."  # this repository or folder
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder{trust})
inputs = processor(Image.open("picture.png"), return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax().item()])
"""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Method, title, where it appeared, year.
_PAPERS = {
    "fngd": (
        "Inverse-Free Fast Natural Gradient Descent Method for Deep Learning",
        "arXiv:2403.03473",
        2024,
    ),
    "kfac": (
        "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
        "ICML",
        2015,
    ),
    "eva": (
        "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation",
        "ICLR",
        2023,
    ),
    "tengrad": (
        "TENGraD: Time-Efficient Natural Gradient Descent with Exact Fisher-Block Inversion",
        "arXiv:2106.03947",
        2021,
    ),
    "seng": (
        "Sketch-Based Empirical Natural Gradient Methods for Deep Learning",
        "arXiv:2006.05924",
        2020,
    ),
}


@dataclass
class CardFacts:
    """What the card says; nothing else is put in.

    Attributes:
        model_name: Name of the model.
        task: Hub task, as `translation`.
        dataset: Name of the training data.
        train_rows: How many rows of it were used.
        languages: Language codes.
        base_model: Hub id of what was fine-tuned, if anything; a local path is not named.
        local_base: What to call it where it is not on the Hub.
        optimizer: Name given to `--optim`.
        settings: Settings of the training and of the optimizer.
        layers: Table of selected layers, if there is one.
        command: The exact command.
        seed: Seed of the run.
        device: Machine.
        versions: Versions of the packages.
        metrics: Scores by metric name, of the test set; none were measured if empty.
        further: Scores on further test sets, which the table alone has.
        test_dataset: Name of the test data, by default that of `dataset`.
        dataset_id: Hub id of the data, if they are there.
        dataset_config: Configuration of that data set.
        baselines: Scores of other runs, by a description of them.
        signatures: sacrebleu signatures by metric name.
        curves: File name of the plot, beside the card.
        coefficients: File name of the picture of FNGD's coefficients, beside the card.
        split: Part of the data that the scores are from: test or validation.
        limits: Sentences on what the model cannot do.
        prefix: What every text was preceded by in training.
        custom_code: Whether the model's class lies beside the model instead of in transformers.
    """

    model_name: str
    task: str
    dataset: str
    optimizer: str
    command: str
    seed: int
    device: str
    languages: list[str] = field(default_factory=list)
    base_model: str | None = None
    local_base: str | None = None
    train_rows: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    layers: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    further: dict[str, float] = field(default_factory=dict)
    test_dataset: str | None = None
    dataset_id: str | None = None
    dataset_config: str | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    curves: str | None = None
    coefficients: str | None = None
    split: str = "test"
    limits: list[str] = field(default_factory=list)
    prefix: str = ""
    custom_code: bool = False

    @property
    def method(self) -> str | None:
        """The package's method that the run used, if it did."""
        kind, _ = OPTIMIZERS.get(self.optimizer, (None, None))
        return kind.method if kind is not None else None

    @property
    def tags(self) -> list[str]:
        """Tags that name the method."""
        if self.method is None:
            return []
        natural = [self.method, "natural-gradient"] if self.method in _PAPERS else []
        return [*natural, "hf_fngd"]


def is_hub_id(name: str | None) -> bool:
    """Tells an id of the Hub from a local path.

    Args:
        name: Either, or None.

    Returns:
        Whether it may be an id.
    """
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def section(facts: CardFacts) -> str:
    """Writes what a card says of a run.

    Args:
        facts: What is known of the run.

    Returns:
        Markdown.
    """
    parts = [_results(facts)] if facts.metrics else []
    if facts.curves:
        parts.append(f"## Training curves\n\n![loss and scores]({facts.curves})")
    if facts.coefficients:
        parts.append(
            "## Coefficients of FNGD\n\nKept at the end of the training, by group of layers, and "
            "the share of samples that found theirs again.\n\n"
            f"![coefficients]({facts.coefficients})"
        )
    parts.append(_training(facts))
    parts.append(_usage(facts))
    if facts.limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in facts.limits))
    if facts.method in _PAPERS:
        parts.append(_citation(facts.method))
    return "\n\n".join(parts)


def _citation(method: str) -> str:
    title, place, year = _PAPERS[method]
    fields = f"  title = {{{title}}},\n  note  = {{{place}}},\n  year  = {{{year}}}\n"
    entry = f"@misc{{{method}{year},\n{fields}}}"
    return f"## Citation\n\n```bibtex\n{entry}\n```"


def _results(facts: CardFacts) -> str:
    own = facts.metrics | facts.further
    names = list(own)
    lines = [
        "## Results",
        "",
        f"On the {facts.split} set: {facts.test_dataset or facts.dataset}.",
        "",
    ]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    rows = {"this model": own, **facts.baselines}
    for label, scores in rows.items():
        cells = (_number(name, scores[name]) if name in scores else "" for name in names)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: `{text}`" for name, text in facts.signatures.items())]
    return "\n".join(lines).rstrip()


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "accuracy" else f"{value:.2f}"


def _training(facts: CardFacts) -> str:
    origin = f"fine-tuned from `{facts.base_model}`" if is_hub_id(facts.base_model) else "trained"
    if facts.local_base:
        origin = f"fine-tuned from a local model, `{facts.local_base}`,"
    elif facts.base_model and not is_hub_id(facts.base_model):
        origin = "fine-tuned from a local checkpoint"
    rows = f" ({facts.train_rows:,} rows)" if facts.train_rows else ""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    text = [
        "## How it was trained",
        "",
        f"The model was {origin} on {facts.dataset}{rows} with `--optim {facts.optimizer}`, seed "
        f"{facts.seed}, on: {facts.device}.",
        "",
        f"```bash\n{facts.command}\n```",
        "",
        f"Versions: {versions}.",
    ]
    if facts.settings:
        text += ["", "Settings:", "", "| setting | value |", "|---|---|"]
        text += [f"| {name} | {value} |" for name, value in facts.settings.items()]
    if facts.layers:
        table = f"```\n{facts.layers}\n```"
        text += ["", f"<details><summary>Layers</summary>\n\n{table}\n\n</details>"]
    return "\n".join(text)


def _usage(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.custom_code else ""
    if facts.task == "image-classification":
        code = _IMAGES.format(trust=trust)
    else:
        model = _MODELS.get(facts.task, "AutoModelForSeq2SeqLM")
        code = _TEXTS.format(model=model, trust=trust, text=json.dumps(f"{facts.prefix}A text."))
    note = (
        "\n\n`training_args.bin` names an optimizer that transformers does not know by itself: "
        "`import hf_fngd` before opening it."
        if facts.method is not None
        else ""
    )
    return f"## How to use it\n\n```python\n{code}```{note}"

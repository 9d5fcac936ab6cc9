"""Model card of a run: metadata, numbers and settings, from what the run itself reports.

The card is written offline. A card that a person wrote is completed, not replaced: metadata that it
has is kept, and only the text between our two marks is ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from hf_fngd.hf.eval_results import write_eval_results
from hf_fngd.hf.registry import OPTIMIZERS

_BEGIN, _END = "<!-- hf_fngd: begin -->", "<!-- hf_fngd: end -->"
_METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF", "accuracy": "Accuracy"}
# What loads a model of a task, beside the model: by default what translation needs.
_LOADERS = {"image-classification": ("AutoImageProcessor", "AutoModelForImageClassification")}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Method, title, where it appeared, year.
_PAPERS = {
    "fngd": ("Fast Natural Gradient Descent", "arXiv:2403.03473", 2024),
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
        languages: Language codes.
        base_model: What was fine-tuned, if anything; a local path is not named.
        optimizer: Name given to `--optim`.
        settings: The optimizer's settings.
        layers: Table of selected layers, if there is one.
        command: The exact command.
        seed: Seed of the run.
        device: Machine.
        versions: Versions of the packages.
        metrics: Scores by metric name, of the test set; none were measured if empty.
        test_dataset: Name of the test data, by default that of `dataset`.
        dataset_id: Hub id of the data, if they are there.
        dataset_config: Configuration of that data set.
        baselines: Scores of other runs, by a description of them.
        signatures: sacrebleu signatures by metric name.
        curves: File name of the plot, beside the card.
        limits: Sentences on what the model cannot do.
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
    settings: dict[str, Any] = field(default_factory=dict)
    layers: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    test_dataset: str | None = None
    dataset_id: str | None = None
    dataset_config: str | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    curves: str | None = None
    limits: list[str] = field(default_factory=list)
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


def card_data(facts: CardFacts) -> ModelCardData:
    """Makes the card's metadata.

    Args:
        facts: What is known of the run.

    Returns:
        Metadata with a model-index entry for each metric.
    """
    tested = facts.test_dataset or facts.dataset
    known = facts.dataset_id if _is_hub_id(facts.dataset_id) else None
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=known or tested,
            dataset_name=tested,
            metric_type=name,
            metric_value=round(value, 4),
            metric_name=_METRIC_NAMES.get(name, name),
        )
        for name, value in facts.metrics.items()
    ]
    return ModelCardData(
        language=facts.languages or None,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=[*facts.tags, facts.task],
        base_model=facts.base_model if _is_hub_id(facts.base_model) else None,
        datasets=[known] if known else None,
        model_name=facts.model_name,
        eval_results=results or None,
    )


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes README.md, or completes the one that is there, and the scores as `.eval_results`.

    Scores of data that are not on the Hub are in the card alone.

    Args:
        folder: Folder of the model.
        facts: What is known of the run.

    Returns:
        Path of the card.
    """
    path = folder / "README.md"
    data = card_data(facts)
    section = f"{_BEGIN}\n{_section(facts)}\n{_END}"
    text = f"# {facts.model_name}\n\n{section}\n"
    if path.exists():
        old = ModelCard.load(path, ignore_metadata_errors=True)
        data = _complete(old.data, data)
        text = _insert(old.text, section)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}").save(path)
    if facts.dataset_id and _is_hub_id(facts.dataset_id):
        notes = "; ".join(f"{name}: {text}" for name, text in facts.signatures.items())
        write_eval_results(folder, facts.dataset_id, facts.dataset_config, facts.metrics, notes)
    return path


def _complete(old: ModelCardData, new: ModelCardData) -> ModelCardData:
    """Adds our metadata to a card's: results are ours, tags are joined, the rest stays.

    Returns:
        The card's metadata, changed.
    """
    for key, value in vars(new).items():
        if key == "tags":
            old.tags = list(dict.fromkeys([*(old.tags or []), *value]))
        elif value is not None and (key in ("eval_results", "model_name") or not old.get(key)):
            setattr(old, key, value)
    return old


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def _insert(text: str, section: str) -> str:
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        return before + section + rest.partition(_END)[2]
    return f"{text.rstrip()}\n\n{section}\n"


def _section(facts: CardFacts) -> str:
    parts = [_results(facts)] if facts.metrics else []
    if facts.curves:
        parts.append(f"## Training curves\n\n![loss and scores]({facts.curves})")
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
    names = list(facts.metrics)
    lines = ["## Results", "", f"On the test set: {facts.test_dataset or facts.dataset}.", ""]
    lines += ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    rows = {"this model": facts.metrics, **facts.baselines}
    for label, scores in rows.items():
        cells = (_number(name, scores[name]) if name in scores else "" for name in names)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: `{text}`" for name, text in facts.signatures.items())]
    return "\n".join(lines).rstrip()


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "accuracy" else f"{value:.2f}"


def _training(facts: CardFacts) -> str:
    origin = f"fine-tuned from `{facts.base_model}`" if _is_hub_id(facts.base_model) else "trained"
    if facts.base_model and not _is_hub_id(facts.base_model):
        origin = "fine-tuned from a local checkpoint"
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    text = [
        "## How it was trained",
        "",
        f"The model was {origin} on {facts.dataset} with `--optim {facts.optimizer}`, seed "
        f"{facts.seed}, on: {facts.device}.",
        "",
        f"```bash\n{facts.command}\n```",
        "",
        f"Versions: {versions}.",
    ]
    if facts.settings:
        text += ["", "Settings of the optimizer:", "", "| setting | value |", "|---|---|"]
        text += [f"| {name} | {value} |" for name, value in facts.settings.items()]
    if facts.layers:
        table = f"```\n{facts.layers}\n```"
        text += ["", f"<details><summary>Layers</summary>\n\n{table}\n\n</details>"]
    return "\n".join(text)


def _usage(facts: CardFacts) -> str:
    loader, model = _LOADERS.get(facts.task, ("AutoTokenizer", "AutoModelForSeq2SeqLM"))
    variable = "processor" if "Processor" in loader else "tokenizer"
    trust = ", trust_remote_code=True" if facts.custom_code else ""
    code = (
        f"from transformers import {', '.join(sorted((loader, model)))}\n\n"
        'folder = "..."  # this repository or folder\n'
        f"{variable} = {loader}.from_pretrained(folder)\n"
        f"model = {model}.from_pretrained(folder{trust})\n"
    )
    note = (
        "\n\n`training_args.bin` names an optimizer that transformers does not know by itself: "
        "`import hf_fngd` before opening it."
        if facts.method is not None
        else ""
    )
    return f"## How to use it\n\n```python\n{code}```{note}"


class CardMixin(Trainer):
    """Trainer mixin: `create_model_card`, and so `push_to_hub`, writes the card of `card_facts`."""

    card_facts: CardFacts | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card; before `card_facts` are known, the Trainer's own one.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.
        """
        if self.card_facts is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(Path(self.args.output_dir), self.card_facts)

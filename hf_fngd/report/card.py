"""Model card of a run: metadata, scores and settings, from what the run itself recorded.

The card is written offline, from the template `card.md.jinja`. A card that a person wrote is
completed, not replaced: its metadata stay, and only the text between two marks is rewritten.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import Trainer

from hf_fngd.methods import OPTIMIZERS
from hf_fngd.report.runs import METRIC_NAMES, format_score

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # an older version, which has no such files
    EvalResultEntry = None

_BEGIN, _END = "<!-- hf_fngd: begin -->", "<!-- hf_fngd: end -->"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Paper(NamedTuple):
    """The paper of a method."""

    title: str
    place: str
    year: int


_PAPERS = {
    "fngd": Paper(
        "Inverse-Free Fast Natural Gradient Descent Method for Deep Learning",
        "arXiv:2403.03473",
        2024,
    ),
    "kfac": Paper(
        "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", "ICML", 2015
    ),
    "ekfac": Paper(
        "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
        "NeurIPS",
        2018,
    ),
    "eva": Paper(
        "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation",
        "ICLR",
        2023,
    ),
    "tengrad": Paper(
        "TENGraD: Time-Efficient Natural Gradient Descent with Exact Fisher-Block Inversion",
        "arXiv:2106.03947",
        2021,
    ),
    "seng": Paper(
        "Sketch-Based Empirical Natural Gradient Methods for Deep Learning",
        "arXiv:2006.05924",
        2020,
    ),
}


@dataclass
class CardFacts:
    """The facts that a card reports; it reports nothing else.

    Attributes:
        model_name: Name of the model.
        task: Task of the Hub, such as `translation`.
        dataset: Name of the training data.
        optimizer: Name given to `--optim`.
        command: The exact command.
        seed: Seed of the run.
        device: Machine.
        languages: Language codes.
        base_model: Hub id of the model that was fine-tuned. The card does not name a local path.
        local_base: Name of a fine-tuned model that is not on the Hub.
        train_rows: Number of training rows.
        settings: Settings of the training and the optimizer that differ from their defaults.
        layers: Table of the layers, chosen and left out.
        versions: Versions of the packages.
        metrics: Scores by metric name.
        further: Scores on further test sets; the card's table has them, its metadata do not.
        test_dataset: Name of the test data; default: `dataset`.
        dataset_id: Hub id of the data, if they are on the Hub.
        dataset_config: Configuration of that data set.
        baselines: Scores of other runs, by a description of each run.
        signatures: sacrebleu signatures by metric name.
        curves: File name of the picture of the training, in the folder of the card.
        coefficients: File name of the picture of FNGD's coefficients, in the folder of the card.
        split: The data that were scored: `test` or `validation`.
        limits: Sentences on what the model cannot do.
        prefix: Text that preceded every source text in training.
        custom_code: Whether the repository holds the class of the model, and transformers does not.
        average: Sentences on the average that the weights are.
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
    average: str = ""

    @property
    def method(self) -> str | None:
        """The method of hf_fngd that the run used, if any."""
        kind, _ = OPTIMIZERS.get(self.optimizer, (None, None))
        return kind.method if kind is not None else None

    @property
    def tags(self) -> list[str]:
        """Tags that name the method."""
        if self.method is None:
            return []
        natural = [self.method, "natural-gradient"] if self.method in _PAPERS else []
        return [*natural, "hf_fngd"]


class CardMixin(Trainer):
    """Trainer mixin: `create_model_card`, and so `push_to_hub`, writes the card of `card_facts`."""

    card_facts: CardFacts | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card, or the Trainer's own card while `card_facts` is None.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.
        """
        if self.card_facts is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            write_card(Path(self.args.output_dir), self.card_facts)


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write or complete README.md, and write the scores as `.eval_results`.

    Only scores of a test set on the Hub go into `.eval_results`.

    Args:
        folder: Folder of the model.
        facts: The facts of the run.

    Returns:
        Path of the card.
    """
    path = folder / "README.md"
    data = card_data(facts)
    ours = f"{_BEGIN}\n{card_text(facts)}\n{_END}"
    text = f"# {facts.model_name}\n\n{ours}\n"
    if path.exists():
        old = ModelCard.load(path, ignore_metadata_errors=True)
        data = _complete(old.data, data)
        text = _insert(old.text, ours)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}").save(path)
    if facts.dataset_id and is_hub_id(facts.dataset_id) and facts.split == "test":
        _write_eval_results(folder, facts, facts.dataset_id)
    return path


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the metadata of the card, with a model-index entry for each metric.

    Args:
        facts: The facts of the run.

    Returns:
        The metadata.
    """
    tested = facts.test_dataset or facts.dataset
    known = facts.dataset_id if is_hub_id(facts.dataset_id) else None
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=known or tested,
            dataset_name=tested,
            dataset_split=facts.split,
            metric_type=name,
            metric_value=round(value, 4),
            metric_name=METRIC_NAMES.get(name, name),
        )
        for name, value in facts.metrics.items()
    ]
    return ModelCardData(
        language=_languages(facts.languages) or None,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=[*facts.tags, facts.task],
        base_model=facts.base_model if is_hub_id(facts.base_model) else None,
        datasets=[known] if known else None,
        model_name=facts.model_name,
        eval_results=results or None,
    )


def card_text(facts: CardFacts) -> str:
    """Return the text of the card, without its title.

    Args:
        facts: The facts of the run.

    Returns:
        Markdown.
    """
    # The template is Markdown, so nothing is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = facts.metrics | facts.further if facts.metrics else {}
    origin = "trained on"
    if facts.local_base:
        origin = f"fine-tuned from a local model, `{facts.local_base}`, on"
    elif facts.base_model:
        known = is_hub_id(facts.base_model)
        origin = f"fine-tuned from {f'`{facts.base_model}`' if known else 'a local checkpoint'} on"
    text = environment.get_template("card.md.jinja").render(
        facts=facts,
        scores=list(own),
        rows={"this model": own, **facts.baselines},
        number=format_score,
        origin=origin,
        text_model=_text_model(facts.task),
        prompt=json.dumps(f"{facts.prefix}A text."),
        trust=", trust_remote_code=True" if facts.custom_code else "",
        paper=_PAPERS.get(facts.method or ""),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_hub_id(name: str | None) -> bool:
    """Tell an id of the Hub from a local path.

    Args:
        name: An id, a path, or None.

    Returns:
        Whether it can be an id.
    """
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def _text_model(task: str) -> str:
    return "AutoModelForCausalLM" if task == "text-generation" else "AutoModelForSeq2SeqLM"


def _languages(codes: list[str]) -> list[str]:
    """The Hub takes codes of two or three letters: `en` of mBART's `en_XX`, `eng` of NLLB's."""
    first = dict.fromkeys(re.split("[-_]", code)[0].lower() for code in codes)
    return [code for code in first if re.fullmatch("[a-z]{2,3}", code)]


def _complete(old: ModelCardData, new: ModelCardData) -> ModelCardData:
    """The results become ours, tags are joined, and the rest of the old metadata stays."""
    for key, value in vars(new).items():
        if key == "tags":
            old.tags = list(dict.fromkeys([*(old.tags or []), *value]))
        elif value is not None and (key in ("eval_results", "model_name") or not old.get(key)):
            setattr(old, key, value)
    return old


def _insert(text: str, ours: str) -> str:
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        return before + ours + rest.partition(_END)[2]
    return f"{text.rstrip()}\n\n{ours}\n"


def _write_eval_results(folder: Path, facts: CardFacts, dataset: str) -> None:
    """Write the file from which the Hub fills a benchmark's page; it has room for one metric."""
    if not facts.metrics or EvalResultEntry is None:
        return
    (name, value), *others = facts.metrics.items()
    notes = [name, *(f"{other} {number:.4g}" for other, number in others)]
    notes += ["; ".join(f"{metric}: {text}" for metric, text in facts.signatures.items())]
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=facts.dataset_config or "default",
        value=round(value, 4),
        notes="; ".join(filter(None, notes)),
    )
    path = folder / ".eval_results" / f"{dataset.rpartition('/')[2]}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml_dump(eval_result_entries_to_yaml([entry])), encoding="utf-8")

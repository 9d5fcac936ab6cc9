"""Model card of a run: metadata, numbers and settings, from what the run itself reports.

The card is written offline. A card that a person wrote is completed, not replaced: metadata that it
has is kept, and only the text between our two marks is ours.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from hf_fngd.report.card_text import CardFacts, is_hub_id, section
from hf_fngd.report.eval_results import write_eval_results

_BEGIN, _END = "<!-- hf_fngd: begin -->", "<!-- hf_fngd: end -->"
_METRIC_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "Accuracy",
    "perplexity": "Perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def card_data(facts: CardFacts) -> ModelCardData:
    """Makes the card's metadata.

    Args:
        facts: What is known of the run.

    Returns:
        Metadata with a model-index entry for each metric.
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
            metric_name=_METRIC_NAMES.get(name, name),
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


def _languages(codes: list[str]) -> list[str]:
    """Codes of two or three letters, which the Hub takes: `en` of mBART's `en_XX`, `eng` of NLLB's.

    Returns:
        Each once, without what is no such code.
    """
    first = dict.fromkeys(re.split("[-_]", code)[0].lower() for code in codes)
    return [code for code in first if re.fullmatch("[a-z]{2,3}", code)]


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes README.md, or completes the one that is there, and the scores as `.eval_results`.

    Scores of data that are not on the Hub, or not of a test set, are in the card alone.

    Args:
        folder: Folder of the model.
        facts: What is known of the run.

    Returns:
        Path of the card.
    """
    path = folder / "README.md"
    data = card_data(facts)
    ours = f"{_BEGIN}\n{section(facts)}\n{_END}"
    text = f"# {facts.model_name}\n\n{ours}\n"
    if path.exists():
        old = ModelCard.load(path, ignore_metadata_errors=True)
        data = _complete(old.data, data)
        text = _insert(old.text, ours)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.lstrip()}").save(path)
    if facts.dataset_id and is_hub_id(facts.dataset_id) and facts.split == "test":
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


def _insert(text: str, ours: str) -> str:
    if _BEGIN in text and _END in text:
        before, _, rest = text.partition(_BEGIN)
        return before + ours + rest.partition(_END)[2]
    return f"{text.rstrip()}\n\n{ours}\n"


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

"""Scores as `.eval_results/*.yaml`, the files from which the Hub fills a benchmark's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub.utils import yaml_dump

try:
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
except ImportError:  # an older version, which has no such files
    EvalResultEntry = None


def write_eval_results(
    folder: Path, dataset: str, config: str | None, metrics: Mapping[str, float], notes: str
) -> Path | None:
    """Writes the first metric of a test set; an entry has room for one number.

    Args:
        folder: Folder of the model.
        dataset: Hub id of the test data.
        config: Configuration of the data set.
        metrics: Scores by metric name, the main one first.
        notes: How they were measured.

    Returns:
        The file, or None if there is nothing to say or no way to say it.
    """
    if not metrics or EvalResultEntry is None:
        return None
    name, value = next(iter(metrics.items()))
    others = [f"{other} {number:.4g}" for other, number in list(metrics.items())[1:]]
    text = "; ".join(filter(None, [name, *others, notes]))
    entry = EvalResultEntry(
        dataset_id=dataset, task_id=config or "default", value=round(value, 4), notes=text
    )
    path = folder / ".eval_results" / f"{dataset.rpartition('/')[2]}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml_dump(eval_result_entries_to_yaml([entry])), encoding="utf-8")
    return path

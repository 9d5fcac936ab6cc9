"""One text for all runs of a study: what the runs share once, then one line per run.

The first line holds the shared settings, script and objective, and a list of environments. A run's
line holds the rest: `settings` has only the values that differ between runs, and `environment` is
the position in that list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

SHARED = ("script", "objective_name")


def fold(runs: Iterable[Mapping[str, Any]]) -> str:
    """Write runs as JSON lines, sorted by label and name.

    Args:
        runs: Results with at least `label`, `run`, `script`, `settings` and `environment`.

    Returns:
        The text; `unfold` reads the same runs from it.
    """
    runs = sorted(runs, key=lambda run: (run["label"], run["run"]))
    settings = _common([run["settings"] for run in runs])
    shared = _common([{name: run[name] for name in SHARED if name in run} for run in runs])
    environments: list[str] = []
    lines = []
    for run in runs:
        environment = json.dumps(run["environment"])
        if environment not in environments:
            environments.append(environment)
        own = {name: value for name, value in run["settings"].items() if name not in settings}
        rest = {name: value for name, value in run.items() if name not in shared}
        lines.append({**rest, "settings": own, "environment": environments.index(environment)})
    first = {**shared, "settings": settings, "environments": list(map(json.loads, environments))}
    return "".join(
        json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in (first, *lines)
    )


def unfold(text: str) -> list[dict[str, Any]]:
    """Read the runs that `fold` wrote.

    Args:
        text: JSON lines.

    Returns:
        The runs, each with its complete settings and environment.

    Raises:
        ValueError: If the text is something else.
    """
    try:
        first, *lines = map(json.loads, text.splitlines())
        shared = {name: first[name] for name in SHARED if name in first}
        settings, environments = first["settings"], first["environments"]
        return [
            {
                **line,
                **shared,
                "settings": {**settings, **line["settings"]},
                "environment": environments[line["environment"]],
            }
            for line in lines
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"these lines are not the runs of a study: {error!r}") from None


def _common(mappings: list[Mapping[str, Any]]) -> dict[str, Any]:
    # By their JSON text, as Python takes 1, 1.0 and true for equal.
    texts = [{name: json.dumps(value) for name, value in one.items()} for one in mappings]
    return {
        name: json.loads(text)
        for name, text in texts[0].items()
        if all(one.get(name) == text for one in texts)
    }

"""Rules of the Hub for the metadata of a card, as its server checks them at a push."""

import re


def faults_of(data: object) -> list[str]:
    """Which of a card's metadata break the Hub's rules for languages, base models and results."""
    if not isinstance(data, dict):
        return ["metadata"]
    languages, bases = data.get("language") or [], data.get("base_model") or []
    results = [one for model in data.get("model-index", []) for one in model["results"]]
    good = {
        "language": all(
            re.fullmatch("[a-z]{2,3}|multilingual", code)
            for code in (languages if isinstance(languages, list) else [languages])
        ),
        "base_model": all(
            re.fullmatch(r"([\w.-]+/)?[\w.-]+", base)
            for base in (bases if isinstance(bases, list) else [bases])
        ),
        "tags": all(isinstance(tag, str) for tag in data.get("tags", [])),
        "model-index": all(
            {"name", "type"} <= one["dataset"].keys()
            and "type" in one["task"]
            and all(isinstance(metric["value"], int | float) for metric in one["metrics"])
            for one in results
        ),
    }
    return [part for part, holds in good.items() if not holds]

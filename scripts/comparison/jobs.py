"""The runs of a plan, each with the exact settings of its training script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comparison.plan import Optimizer, Plan
from comparison.search import draw

# Names that are settings of the Trainer; all other searched names go into optim_args.
TRAINER_SETTINGS = ("learning_rate", "warmup_steps", "max_grad_norm", "weight_decay")


@dataclass(frozen=True)
class Job:
    """One run; `settings` are those of the training script except for the output folder."""

    label: str
    name: str
    final: bool
    searched: dict[str, float]
    settings: dict[str, Any]


def search_jobs(plan: Plan) -> dict[str, list[Job]]:
    """Return the search trials of each label, in order."""
    # A search run must not see the test set.
    common = {**plan.search_overrides, "do_predict": False}
    return {
        label: [
            Job(label, f"search-{n:02d}", False, values, _settings(plan, optimizer, values, common))
            for n, values in enumerate(draw(optimizer, plan.trials, plan.seed), start=1)
        ]
        for label, optimizer in plan.optimizers.items()
    }


def final_jobs(
    plan: Plan, label: str, values: Mapping[str, float], steps: int | None = None
) -> list[Job]:
    """Return the final runs of one optimizer.

    Args:
        plan: The plan.
        label: The optimizer.
        values: Values that the search chose.
        steps: Number of steps of a run of equal time; default: the length in the plan.

    Returns:
        A run for each seed.
    """
    jobs = []
    for seed in plan.final_seeds:
        common = {"seed": seed, "do_predict": bool(plan.final_metrics)}
        if steps is not None:
            common["max_steps"] = steps
        settings = _settings(plan, plan.optimizers[label], values, common)
        name = f"final-seed{seed}" if steps is None else f"timed-seed{seed}"
        jobs.append(Job(label, name, True, dict(values), settings))
    return jobs


def optim_args(optimizer: Optimizer, values: Mapping[str, float]) -> str | None:
    """Format an optimizer's settings for `--optim_args`.

    Args:
        optimizer: The optimizer, with its fixed settings.
        values: Searched values; those in `TRAINER_SETTINGS` are left out.

    Returns:
        `name=value,name=value`, or None if there are none.
    """
    own = {name: value for name, value in values.items() if name not in TRAINER_SETTINGS}
    return ",".join(f"{n}={_text(v)}" for n, v in {**optimizer.optim_args, **own}.items()) or None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _settings(
    plan: Plan, optimizer: Optimizer, values: Mapping[str, float], common: Mapping[str, Any]
) -> dict[str, Any]:
    settings = {
        # The Trainer would log an average of past losses instead of NaN.
        "logging_nan_inf_filter": False,
        **plan.base,
        **optimizer.settings,
        "do_train": True,
        "do_eval": True,
        **common,
        **{name: value for name, value in values.items() if name in TRAINER_SETTINGS},
        "optim": optimizer.optim,
    }
    own = optim_args(optimizer, values)
    if own:
        settings["optim_args"] = own
    return settings

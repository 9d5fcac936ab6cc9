"""Checks of values that users give."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_fngd.errors import FNGDError

_ELSEWHERE: dict[object, str] = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
}


def check_number(name: str, value: Any, whole: bool, bounds: Mapping[str, float]) -> None:
    """Refuses what is no number, or out of range.

    Args:
        name: What the user calls it.
        value: What the user gave.
        whole: Whether it must be an int.
        bounds: Limits by `above`, `at least`, `at most` and `below`.

    Raises:
        FNGDError: If it is not within the bounds.
    """
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    passed = {
        "above": lambda bound: value > bound,
        "at least": lambda bound: value >= bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    if not (
        number
        and -math.inf < value < math.inf
        and all(passed[side](bound) for side, bound in bounds.items())
    ):
        kind = "a whole number" if whole else "a finite number"
        wanted = " and ".join(f"{side} {bound:g}" for side, bound in bounds.items())
        raise FNGDError(f"{name} must be {' '.join(filter(None, (kind, wanted)))}, not {value!r}")


def nearest(name: object, known: Iterable[str]) -> str:
    """Guesses what was meant by a name that is not known.

    Args:
        name: What the user gave.
        known: What there is.

    Returns:
        An addition to a message, empty where nothing is near.
    """
    if name in _ELSEWHERE:
        return f" (it has a place of its own: --{_ELSEWHERE[name]} of the Trainer)"
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def whole_numbers(ids: Any) -> list[int]:
    """Reads sample ids.

    Args:
        ids: What the user gave.

    Returns:
        The ids.

    Raises:
        FNGDError: If they are no whole numbers of 64 bits.
    """
    advice = "sample_ids must be whole numbers of 64 bits, one for each sample ({}): give the data "
    advice += "set rows of the batch"
    try:
        given = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids))
        found = given.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FNGDError(advice.format(error)) from None
    other = given[given != found]
    if len(other):
        raise FNGDError(advice.format(f"not {other[0]:g}"))
    return found.tolist()

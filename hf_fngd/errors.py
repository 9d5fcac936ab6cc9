"""The package's error, and the checks of values that users give."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# What people look for under --optim_args although the Trainer has an option for it.
_TRAINER_OPTIONS = {
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
}


class FNGDError(ValueError):
    """A setting, model or batch cannot work; the message says what to do instead."""


def check_number(name: str, value: Any, whole: bool, bounds: Mapping[str, float]) -> None:
    """Refuse a value that is not a number or is out of range.

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


def suggestion(name: object, known: Iterable[str]) -> str:
    """Say what to write instead of an unknown name.

    Args:
        name: What the user gave.
        known: The valid names.

    Returns:
        The nearest valid name as a question, the Trainer's option of that name, or else all valid
        names.
    """
    if name in _TRAINER_OPTIONS:
        return f"use the Trainer's --{_TRAINER_OPTIONS[name]}"
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"


def whole_numbers(ids: Any) -> list[int]:
    """Read sample ids.

    Args:
        ids: What the user gave.

    Returns:
        The ids.

    Raises:
        FNGDError: If they are not whole numbers of 64 bits.
    """
    advice = (
        "sample_ids must be whole numbers of 64 bits, one for each sample ({}): give the data set "
        "rows of the batch"
    )
    try:
        # One read from the device, not one for each check.
        given = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), device="cpu")
        found = given.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise FNGDError(advice.format(error)) from None
    if found.dim() != 1:
        raise FNGDError(advice.format(f"not a table of shape {[*found.shape]}"))
    other = given[given != found]
    if len(other):
        raise FNGDError(advice.format(f"not {other[0]:g}"))
    return found.tolist()

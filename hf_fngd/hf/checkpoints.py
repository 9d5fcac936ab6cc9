"""Checkpoints that can be resumed from: a run may die while it writes one."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fngd.errors import FNGDError

logger = logging.getLogger(__name__)


def is_complete(checkpoint: str | Path) -> bool:
    """Return whether `trainer_state.json`, which the Trainer writes last, is there as a whole."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_complete(folder: str | Path) -> str:
    """Find the checkpoint from which a run can be resumed.

    Args:
        folder: Output folder of the run.

    Returns:
        Path of the last complete checkpoint.

    Raises:
        FNGDError: If there is none.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = sorted((int(m[1]) for name in names if (m := pattern.fullmatch(name))), reverse=True)
    for number in numbers:
        path = Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{number}")
        if is_complete(path):
            return str(path)
        logger.warning("%s was not written to its end; skipping it", path)
    unfinished = " but unfinished ones" if numbers else ""
    raise FNGDError(
        f"there is no checkpoint in {str(folder)!r}{unfinished}: start without "
        "resume_from_checkpoint"
    )


def check_complete(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that was not written to its end.

    Args:
        checkpoint: Folder.

    Raises:
        FNGDError: If it does not exist or is not complete.
    """
    if not os.path.isdir(checkpoint):
        raise FNGDError(f"there is no checkpoint {str(checkpoint)!r}: check the path")
    if not is_complete(checkpoint):
        raise FNGDError(
            f"the checkpoint {str(checkpoint)!r} was not written to its end (no whole "
            f"{TRAINER_STATE_NAME}): resume from an earlier one, or give "
            "resume_from_checkpoint=True to find it"
        )


@contextmanager
def reading(checkpoint: str | Path) -> Iterator[None]:
    """Turn errors about damaged files into one that says what to do.

    Args:
        checkpoint: Folder that the enclosed code reads.

    Yields:
        Nothing.

    Raises:
        FNGDError: If a file cannot be read.
    """
    try:
        yield
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FNGDError(
            f"the checkpoint {str(checkpoint)!r} cannot be read ({reason}): a file in it is "
            "damaged or belongs to another model; resume from another checkpoint"
        ) from error

"""What the ranks of a `torch.distributed` job tell each other."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T) -> list[T] | None:
    """Collects an object of every rank; all ranks must call it together.

    Args:
        mine: This rank's object, on the CPU.

    Returns:
        The objects in rank order, or None where there is one process only.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    parts: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts  # type: ignore[return-value]

"""What the ranks of a `torch.distributed` job tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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


def average(tensors: Sequence[Tensor]) -> None:
    """Averages tensors over ranks, in place; all ranks must call it together.

    Args:
        tensors: The same shapes on every rank.
    """
    if not tensors or not (dist.is_available() and dist.is_initialized()):
        return
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    # Few large messages instead of many small ones.
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        for tensor, mean in zip(
            members, (flat / ranks).split([t.numel() for t in members]), strict=True
        ):
            tensor.copy_(mean.view(tensor.shape))

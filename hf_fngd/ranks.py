"""What the ranks of a `torch.distributed` job tell each other, and their random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_MIX = 1_000_003


def count() -> int:
    """Return the number of ranks, 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Return this rank's number, 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(mine: T) -> list[T] | None:
    """Collect an object of every rank; all ranks must call it together.

    Args:
        mine: This rank's object, on the CPU.

    Returns:
        The objects in rank order, or None where there is only one process.
    """
    if count() == 1:
        return None
    parts: list[T | None] = [None] * count()
    dist.all_gather_object(parts, mine)
    return parts  # type: ignore[return-value]


def average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over ranks, in place; all ranks must call it together.

    Args:
        tensors: The same shapes on every rank.
    """
    ranks = count()
    if not tensors or ranks == 1:
        return
    # A few large messages instead of many small ones.
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        means = (flat / ranks).split([t.numel() for t in members])
        for tensor, mean in zip(members, means, strict=True):
            tensor.copy_(mean.view(tensor.shape))


def generator(seed: int, *keys: int) -> torch.Generator:
    """Return random numbers that a resumed run draws again.

    Args:
        seed: The user's seed.
        *keys: What the draw belongs to: rank, layer, step and so on.

    Returns:
        A generator on the CPU; another key makes another stream.
    """
    mixed = seed
    for key in keys:
        mixed = mixed * _MIX + key
    return torch.Generator().manual_seed(mixed % 2**63)

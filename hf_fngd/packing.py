"""One row that holds several samples one after the other: `[1, T, d]` with known lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fngd.errors import FNGDError


def check_row(name: str, positions: int, lengths: Sequence[int] | None) -> None:
    """Refuses a layer that does not see every position of a packed row.

    Args:
        name: Path of the layer.
        positions: What it sees.
        lengths: Positions of each sample, None where rows are not packed.

    Raises:
        FNGDError: If the numbers differ.
    """
    if lengths is not None and positions != sum(lengths):
        raise FNGDError(
            f"{name} sees {positions} positions of a packed row of {sum(lengths)}: exclude the "
            "layer, or turn packing off"
        )


def unpack(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gives every sample of a packed row a row of its own, filled up with zeros.

    Zeros add nothing to a sample's gradient.

    Args:
        values: Inputs or output gradients in the canonical layout, `[G, 1, T, d]`.
        lengths: Positions of each sample, T together.

    Returns:
        Tensor `[G, N, max(lengths), d]`.
    """
    longest = max(lengths)
    parts = values.squeeze(1).split(list(lengths), dim=1)
    return torch.stack([F.pad(p, (0, 0, 0, longest - p.shape[1])) for p in parts], 1)


def spread(gamma: Tensor, lengths: Sequence[int]) -> Tensor:
    """Gives every position of a packed row its sample's coefficient.

    Args:
        gamma: γ `[N]`.
        lengths: Positions of each sample, T together.

    Returns:
        γ `[1, T]`.
    """
    repeats = torch.tensor(lengths, device=gamma.device)
    return gamma.repeat_interleave(repeats, output_size=sum(lengths)).unsqueeze(0)

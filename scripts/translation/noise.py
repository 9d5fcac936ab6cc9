"""Misaligned training pairs, and how well FNGD's coefficients detect them."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from common.arguments import InputError

from hf_fngd import FNGD


def misalign(rows: datasets.Dataset, fraction: float, seed: int) -> datasets.Dataset:
    """Exchange the targets of some pairs, so that each of them has the target of another.

    Args:
        rows: Columns `source` and `target`.
        fraction: Share of the pairs, in [0, 1].
        seed: Seed that chooses the pairs.

    Returns:
        The rows in the same order, with a column `misaligned`.

    Raises:
        InputError: If the fraction is not in [0, 1], or chooses a single pair.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"--misaligned_fraction must be in [0, 1], not {fraction}")
    count = round(fraction * len(rows))
    if count == 1:
        raise InputError(
            f"--misaligned_fraction {fraction} of {len(rows)} pairs is one pair, which has no "
            "other to exchange with: raise it"
        )
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    order = np.arange(len(rows))
    order[chosen] = np.roll(chosen, 1)
    mask = np.zeros(len(rows), dtype=bool)
    mask[chosen] = True
    targets = np.array(rows["target"], dtype=object)[order].tolist()
    return datasets.Dataset.from_dict(
        {"source": rows["source"], "target": targets, "misaligned": mask.tolist()}
    )


def separation(optimizer: Any, rows: datasets.Dataset) -> dict[str, Any] | None:
    """Compare the stored coefficients of misaligned pairs with those of the others.

    Args:
        optimizer: Any optimizer.
        rows: Training pairs with a column `misaligned`, in the order of the sample ids.

    Returns:
        Mean γ of both kinds, and the AUC for the mean γ over the layers and for each layer: the
        probability that a random aligned pair has a larger γ than a random misaligned one (0.5: γ
        detects nothing). None without FNGD's share=sample or without both kinds of pairs.
    """
    if not (isinstance(optimizer, FNGD) and optimizer.needs_rows):
        return None
    table, noisy = optimizer.coefficients(), torch.tensor(rows["misaligned"])
    # With ids that are hashes, or nothing stored yet, table rows are not data set rows.
    if optimizer.store.rows is not None or len(table) != len(rows):
        return None
    known = ~table.isnan().any(1)
    aligned, other = table[known & ~noisy], table[known & noisy]
    if not (len(aligned) and len(other)):
        return None
    names = optimizer.layer_names
    return {
        "pairs": int(noisy.sum()),
        "gamma_aligned": float(aligned.mean()),
        "gamma_misaligned": float(other.mean()),
        "auc": auc(aligned.mean(1), other.mean(1)),
        "auc_by_layer": {name: auc(aligned[:, i], other[:, i]) for i, name in enumerate(names)},
    }


def auc(larger: torch.Tensor, smaller: torch.Tensor) -> float:
    """Compute the area under the ROC curve.

    Args:
        larger: Scores of the rows that should have larger scores.
        smaller: Scores of the others.

    Returns:
        Probability that a random score of the first kind is above one of the second; ties count
        half.
    """
    ordered = smaller.sort().values
    below, up_to = (
        torch.searchsorted(ordered, larger.contiguous(), right=right) for right in (False, True)
    )
    return float((below + up_to).double().mean() / (2 * len(ordered)))

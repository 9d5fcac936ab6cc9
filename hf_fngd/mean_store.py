"""Mean coefficients kept under keys (labels, tokens, places in the batch), from the same epochs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.ranks import gather


class MeanStore:
    """The mean of all coefficients collected under one key, for each layer.

    Keys are labels or token ids, places in the batch, or 0 for one number a layer.

    Args:
        num_layers: Number of selected layers.
    """

    def __init__(self, num_layers: int) -> None:
        # Sum and count; `local` is what this rank collected since the last merge.
        self.total = torch.zeros(2, num_layers, 0, dtype=torch.float64)
        self.local = self.total.clone()
        self._means: Tensor | None = None

    def reset(self) -> None:
        """Forgets everything, before coefficients are collected anew."""
        self.total = torch.zeros_like(self.total)
        self.local = torch.zeros_like(self.local)
        self._means = None

    def _grow(self, keys: int) -> None:
        missing = keys - self.total.shape[2]
        if missing > 0:
            self.total = torch.nn.functional.pad(self.total, (0, missing))
            self.local = torch.nn.functional.pad(self.local, (0, missing))

    def write(self, layer: int, keys: Tensor, gamma: Tensor) -> None:
        """Adds coefficients to their keys' means.

        Args:
            layer: Layer number.
            keys: Keys of any shape; negative ones (padding) are skipped.
            gamma: Coefficients of the same shape.
        """
        keys, gamma = keys.flatten().cpu(), gamma.flatten().double().cpu()
        keys, gamma = keys[keys >= 0], gamma[keys >= 0]
        if len(keys):
            self._grow(int(keys.max()) + 1)
            self.local[0, layer].index_add_(0, keys, gamma)
            self.local[1, layer].index_add_(0, keys, torch.ones_like(gamma))
            self._means = None

    def read(self, layer: int, keys: Tensor) -> Tensor:
        """Looks up the means of keys.

        Args:
            layer: Layer number.
            keys: Keys of any shape.

        Returns:
            float32 coefficients in the shape of `keys`; a key never seen has the layer's mean.
        """
        means = self._all_means()[layer]
        unseen = len(means) - 1
        keys = keys.cpu()
        return means[keys.masked_fill((keys < 0) | (keys > unseen), unseen)]

    @property
    def num_keys(self) -> int:
        """Highest key seen, plus one."""
        return self.total.shape[2]

    def _all_means(self) -> Tensor:
        """Computes the means by layer and key.

        Returns:
            Matrix `[layers, keys + 1]`, the last column for keys never seen.
        """
        if self._means is None:
            sums, counts = self.total + self.local
            mean = (sums.sum(1) / counts.sum(1)).nan_to_num(1.0).unsqueeze(1)
            means = torch.where(counts > 0, sums / counts.clamp(min=1), mean)
            self._means = torch.cat([means, mean], 1).float()
        return self._means

    def values(self) -> Tensor:
        """Gives all means.

        Returns:
            float32 matrix `[keys, layers]`, NaN where nothing was collected.
        """
        seen = (self.total + self.local)[1] > 0
        return self._all_means()[:, :-1].masked_fill(~seen, torch.nan).t()

    def count_known(self) -> int:
        """Counts the keys for which something was collected.

        Returns:
            How many are known in any layer.
        """
        return int(((self.total + self.local)[1] > 0).any(0).sum())

    def merge(self) -> None:
        """Makes the store equal on all ranks: sums and counts are added."""
        parts = gather(self.local)
        if parts is None:
            return
        self._grow(max(part.shape[2] for part in parts))
        for part in parts:
            self.total[:, :, : part.shape[2]] += part
        self.local = torch.zeros_like(self.total)
        self._means = None

    def state_dict(self) -> dict[str, Any]:
        """Gives the content as tensors.

        Returns:
            State for `load_state_dict`.
        """
        return {"total": self.total.clone(), "local": self.local.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Args:
            state: The saved state.
        """
        self.total = state["total"].cpu().clone()
        self.local = state["local"].cpu().clone()
        self._means = None

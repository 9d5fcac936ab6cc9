"""Statistics of one layer that are averaged over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.methods.base import LayerCurvature, Observed


class AveragedCurvature(LayerCurvature):
    """Curvature from statistics that are averaged over micro-batches and ranks."""

    def __init__(self, config: Any, shape: torch.Size, seed: int) -> None:
        super().__init__(config, shape, seed)
        # Sums over micro-batches, and at the end their number.
        self._pending: list[Tensor] | None = None
        self._lost = False

    def _describe(self, seen: Observed) -> list[Tensor]:
        """Makes the statistics of one micro-batch.

        Returns:
            Tensors of the shapes of `_shapes`.
        """
        raise NotImplementedError

    def _shapes(self) -> list[tuple[int, ...]]:
        """Gives the shapes of the statistics.

        Returns:
            The same on every rank.
        """
        raise NotImplementedError

    def discard(self) -> None:  # noqa: D102
        self._pending = None

    def observe(self, seen: Observed) -> None:  # noqa: D102
        found = self._describe(seen)
        found.append(found[0].new_ones(()))
        if self._pending is not None:
            found = [old + new for old, new in zip(self._pending, found, strict=True)]
        self._pending = found

    def statistics(self, like: Tensor) -> list[Tensor]:  # noqa: D102
        pending = self._pending
        self._lost = pending is not None and not all(bool(t.isfinite().all()) for t in pending)
        if pending is None or self._lost:
            pending = [like.new_zeros(shape) for shape in [*self._shapes(), ()]]
        self._pending = pending
        return pending

    def _means(self) -> list[Tensor] | None:
        """Ends the collection.

        Returns:
            The averages, or None where no rank has seen anything.
        """
        assert self._pending is not None
        (*sums, count), self._pending = self._pending, None
        return [one / count for one in sums] if float(count) > 0 else None

"""When curvature is due, and each layer's side of the capture on those steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fngd.batches import BatchTracker, SizedPass, TrackedLayer
from hf_fngd.calls import Call, sum_gradients
from hf_fngd.layers import LinearAdapter
from hf_fngd.methods.base import LayerCurvature, Observed, PreconditionerConfig
from hf_fngd.statistics import Stopwatch


class ObservedPass(SizedPass):
    """One micro-batch of a step on which curvature is due.

    Args:
        size: Number of samples; None until the first layer shows it.
    """

    def __init__(self, size: int | None) -> None:
        super().__init__(size, fresh=True)
        # Whether the backward that is running has drawn labels.
        self.sampling = False
        self.observed: set[tuple[int, bool]] = set()


class CurvatureState(BatchTracker[ObservedPass]):
    """The step, whether curvature is due in it, and what was observed.

    Args:
        config: Settings.
        names: Paths of the selected layers.
    """

    def __init__(self, config: PreconditionerConfig, names: Sequence[str]) -> None:
        super().__init__(names, config.title)
        self.config = config
        self.steps = 0
        self.clock = Stopwatch()
        self.updates = 0
        self.nonfinite = 0
        # Largest batch observed in this step, and at the last update of the curvature.
        self.seen = 0
        self.last_size = 0
        # Backward passes with drawn labels in this step.
        self.drawn = 0
        self.next_update = 0
        self.postponed = False

    @property
    def due(self) -> bool:
        """Whether this step updates the curvature."""
        return self.steps >= self.next_update

    def set_batch(self, size: int | None) -> None:
        """Announces the next forward pass.

        Args:
            size: Its number of samples, if known.
        """
        self._close()
        self.batch = ObservedPass(size)

    def _open(self) -> ObservedPass:
        return ObservedPass(None)

    def current(self, rows: int, name: str) -> ObservedPass | None:
        """Gives the batch that a layer's forward pass belongs to, on steps that observe.

        Args:
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch; None on other steps, or if the layer is left out.
        """
        return super().current(rows, name) if self.due else None

    def sample_labels(self) -> tuple[Any, torch.Generator] | None:
        """Begins a second backward with drawn labels, where one is due.

        Returns:
            A context that the backward runs in, and its random numbers; or None.
        """
        batch = self.batch
        if not self.due or batch is None or batch.size is None or not batch.gates:
            return None
        seed = (rank_seed(self.config.seed) * 1_000_003 + self.steps) * 10_007 + self.drawn
        self.drawn += 1
        return self._sampling(batch), torch.Generator().manual_seed(seed % 2**63)

    @contextlib.contextmanager
    def _sampling(self, batch: ObservedPass) -> Iterator[None]:
        batch.sampling = True
        try:
            yield
        finally:
            batch.sampling = False

    def close_update(self, updated: bool) -> None:
        """Plans the next update.

        Args:
            updated: Whether the curvature was updated in this step.
        """
        if updated:
            self.updates += 1
            self.last_size = self.seen
            self.next_update = self.steps + self.config.update_period
        self.postponed = not updated

    def end_step(self) -> None:
        """Closes an optimizer step."""
        super().end_step()
        self.steps += 1
        self.seen = self.drawn = 0


class LayerObserver(TrackedLayer[CurvatureState]):
    """Collects one layer's statistics; its gradients stay those of plain backward.

    Args:
        state: The run's state.
        number: Number of the layer.
        adapter: Adapter of the layer's type.
        curvature: The method's side.
    """

    def __init__(
        self,
        state: CurvatureState,
        number: int,
        adapter: LinearAdapter,
        curvature: LayerCurvature,
    ) -> None:
        super().__init__(state, number, adapter)
        self.curvature = curvature

    def weights(self, batch: ObservedPass, x: Tensor, g: Tensor) -> Tensor:
        """Is never asked, since every pass is fresh.

        Args:
            batch: The pass.
            x: Layer input.
            g: Output gradient.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def compute(
        self, batch: ObservedPass, calls: list[Call], bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Observes all calls of one forward, and gives the plain gradients.

        Args:
            batch: The pass.
            calls: Input, output gradient and weight of every call.
            bias: Whether the bias takes part.

        Returns:
            Weight gradient, and bias gradient or None; no gradients in a backward of drawn labels.
        """
        state = self.state
        sampled = state.config.fisher_labels == "sampled"
        if batch.sampling == sampled:
            key = (self.number, batch.sampling)
            if key in batch.observed:
                state.warn_once(
                    self.name,
                    "had two backward passes for one batch, each observed by itself; where "
                    "checkpointed blocks share it, set use_reentrant=False",
                )
            batch.observed.add(key)
            samples = calls[0][0].shape[0]
            state.seen = max(state.seen, samples)
            kappa = 1.0 if sampled else samples * state.accumulation
            with state.clock.timer(calls[0][0].device):
                self.curvature.observe(Observed(self.adapter, calls, kappa, bias, state.steps))
        if batch.sampling:
            return None, None
        batch.used = True
        return sum_gradients(self.adapter, calls, bias)


def rank_seed(seed: int) -> int:
    """Makes a seed differ by rank.

    Args:
        seed: The user's seed.

    Returns:
        A seed of this rank.
    """
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return seed * 100_003 + rank

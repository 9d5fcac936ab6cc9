"""FNGD's state: the epoch, the samples of the batch, and every layer's coefficients."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fngd import coefficients, gram
from hf_fngd.capture import Call, Pass, in_backward
from hf_fngd.config import FNGDConfig
from hf_fngd.errors import FNGDError
from hf_fngd.layers import LinearAdapter
from hf_fngd.statistics import Statistics
from hf_fngd.store import MeanStore, SampleStore

logger = logging.getLogger(__name__)

Labels = Tensor | Mapping[str, Tensor]


class Batch(Pass):
    """One micro-batch: its size, ids and labels, and what is known of its coefficients.

    Args:
        size: Number of samples; None until the first layer shows it.
        labels: Labels as given to `set_batch`.
        fresh: Whether coefficients are computed in this batch, or looked up.
    """

    def __init__(self, size: int | None, labels: Labels | None, fresh: bool) -> None:
        super().__init__(fresh)
        self.size, self.labels = size, labels
        self.announced = size is not None
        self.used = False
        self.rows: Tensor | None = None
        self.known: Tensor | None = None
        self.found: Tensor | None = None
        self.first_layer = ""
        self.computed: set[int] = set()


class FNGDState:
    """Coefficients of all selected layers through a training run.

    Args:
        config: Settings.
        names: Paths of the selected layers.
    """

    def __init__(self, config: FNGDConfig, names: Sequence[str]) -> None:
        self.config, self.names = config, list(names)
        self.statistics = Statistics()
        self.epoch = 0
        self.steps = 0
        self.accumulation = 1.0
        self.batch: Batch | None = None
        self._unwritten: list[Batch] = []
        self.left_out: set[str] = set()
        self._warned: set[str] = set()
        self.store: SampleStore | MeanStore | None = self._new_store()

    def _new_store(self) -> SampleStore | MeanStore | None:
        config = self.config
        if config.share == "none":
            return None
        if config.share == "sample":
            dtype = getattr(torch, config.store_dtype)
            return SampleStore(len(self.names), dtype, config.num_samples)
        return MeanStore(len(self.names))

    @property
    def collecting(self) -> bool:
        """Whether this epoch computes coefficients for all of its batches."""
        if self.store is None or self.epoch == 0:
            return True
        every = self.config.refresh_every
        return every > 0 and self.epoch % every == 0

    def start_epoch(self, epoch: int) -> None:
        """Enters an epoch; entering the present one again (resume) changes nothing.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.flush()
        if epoch == self.epoch:
            return
        self.synchronize()
        self.forget_batch()
        self.epoch = epoch
        self.statistics.start_epoch()
        if isinstance(self.store, SampleStore):
            self.store.trim()
        elif self.store is not None and self.collecting:
            self.store.reset()

    def synchronize(self) -> None:
        """Makes the store equal on all ranks; all of them must call it together."""
        self.flush()
        if self.store is not None:
            self.store.merge()

    def set_batch(self, sample_ids: Sequence[int] | Tensor | None, labels: Labels | None) -> None:
        """Announces the samples of the next forward pass.

        Args:
            sample_ids: Data set rows of the batch, or any 64-bit integers that identify them.
            labels: Class labels `[N]`, token labels `[N, T]`, or a mapping from regular
                expressions on layer paths to token labels, of which the first match counts.

        Raises:
            FNGDError: If `share` needs what is missing.
        """
        self.flush()
        share = self.config.share
        if share == "sample" and sample_ids is None:
            raise FNGDError(
                "share=sample needs set_batch(sample_ids=...) before every forward pass; "
                "give the data set rows of the batch, or set share=none, layer or position"
            )
        if share == "label" and labels is None:
            raise FNGDError(
                "share=label needs set_batch(labels=...) before every forward pass; "
                "give the labels of the batch, or set share=none"
            )
        size = None if sample_ids is None else len(sample_ids)
        if size is None and isinstance(labels, Tensor):
            size = len(labels)
        self.batch = batch = Batch(size, labels, self.collecting)
        if isinstance(self.store, SampleStore):
            assert sample_ids is not None
            ids = sample_ids.tolist() if isinstance(sample_ids, Tensor) else list(sample_ids)
            batch.rows = self.store.locate(ids, create=False)
            known = self.store.count_known(batch.rows)
            if not self.collecting:
                self.statistics.count_rows(known, len(ids))
            # A row that nothing is known of makes its batch one of the first epoch.
            if batch.fresh or known < len(ids):
                batch.fresh = True
                batch.rows = self.store.locate(ids, create=True)
                batch.found = torch.full((len(ids), len(self.names)), torch.nan)
                self._unwritten.append(batch)
            else:
                batch.known = self.store.read(batch.rows)

    def current(self, rows: int, name: str) -> Batch | None:
        """Gives the batch that a layer's forward pass belongs to.

        Args:
            rows: First dimension of the layer's input.
            name: Path of the layer.

        Returns:
            The batch, or None if the layer does not have one row per sample and is left out.

        Raises:
            FNGDError: If the batch was not announced though it must be, or layers disagree about
                its size.
        """
        batch = self.batch
        if batch is None or (not batch.announced and batch.used and not in_backward()):
            if self.config.share in ("sample", "label"):
                self.set_batch(None, None)
            self.batch = batch = Batch(None, None, self.collecting)
        if batch.size is None:
            batch.size, batch.first_layer = rows, name
        if rows == batch.size:
            return batch
        if not batch.announced:
            raise FNGDError(
                f"layers disagree about the batch size ({batch.first_layer}: {batch.size}, "
                f"{name}: {rows}): call set_batch(sample_ids=...), or exclude the layer whose "
                "first dimension is not the batch"
            )
        self.left_out.add(name)
        self.warn_once(
            name, f"is left out: its first dimension {rows} is not the batch {batch.size}"
        )
        return None

    def warn_once(self, name: str, what: str) -> None:
        """Logs a warning about a layer, the first time it is due.

        Args:
            name: Path of the layer.
            what: What is to be said of it.
        """
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("FNGD: %s %s", name, what)

    def end_step(self) -> None:
        """Closes an optimizer step: the next forward pass must announce its batch."""
        self.forget_batch()
        self.steps += 1

    def forget_batch(self) -> None:
        """Writes what was found, and forgets the batches announced so far."""
        self.flush()
        self.batch = None
        self._unwritten.clear()

    def flush(self) -> None:
        """Writes the coefficients that backward passes have found so far to the store."""
        for batch in self._unwritten:
            assert isinstance(self.store, SampleStore)
            if batch.used and batch.rows is not None and batch.found is not None:
                self.store.write(batch.rows, batch.found.cpu())
        # A batch that was announced may still be waiting for its backward pass.
        self._unwritten = [b for b in self._unwritten if not b.used or b is self.batch]

    def state_dict(self) -> dict[str, Any]:
        """Gives everything that a resumed run needs, as tensors and builtins.

        Returns:
            State for `load_state_dict`.
        """
        self.flush()
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "layers": list(self.names),
            "config": self.config.to_dict(),
            "store": None if self.store is None else self.store.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Args:
            saved: The saved state.

        Raises:
            FNGDError: If it belongs to other layers or other data.
        """
        if saved["layers"] != self.names:
            different = sorted(set(saved["layers"]) ^ set(self.names))
            raise FNGDError(
                f"the checkpoint was written with other selected layers (differing: "
                f"{', '.join(different[:5]) or 'their order'}): resume with the same "
                "target_modules and exclude_modules, or start without the checkpoint"
            )
        if self.store is not None:
            self.store.load_state_dict(saved["store"])
        self.epoch, self.steps, self.batch = saved["epoch"], saved["steps"], None


class LayerState:
    """FNGD's side of the capture of one layer: looks coefficients up, or computes them.

    Args:
        state: The run's state.
        number: Number of the layer.
        adapter: Adapter of the layer's type.
    """

    def __init__(self, state: FNGDState, number: int, adapter: LinearAdapter) -> None:
        self.state, self.number, self.adapter = state, number, adapter
        self.name = state.names[number]

    def begin(self, rows: int) -> Batch | None:
        """Gives the pass that a call belongs to; see `FNGDState.current`.

        Args:
            rows: First dimension of the input.

        Returns:
            The batch, or None to leave the call alone.
        """
        return self.state.current(rows, self.name)

    def weights(self, batch: Batch, x: Tensor, g: Tensor) -> Tensor:
        """Looks up γ for one call.

        Args:
            batch: The pass.
            x: Layer input.
            g: Output gradient.

        Returns:
            γ as `[N]`, or `[N, T]` for fisher_unit=token.
        """
        batch.used = True
        if batch.known is not None:
            if batch.known.device != g.device:
                batch.known = batch.known.to(g.device, non_blocking=True)
            return batch.known[:, self.number]
        store = self.state.store
        assert isinstance(store, MeanStore)
        gamma = store.read(self.number, self._keys(batch, x, g)).to(g.device)
        if self.state.config.share == "position" and len(gamma) < store.num_keys:
            # A short last batch gets the mean step of a full one, within bounds.
            full = store.read(self.number, torch.arange(store.num_keys)).mean().to(gamma.device)
            short = gamma.mean()
            gamma = gamma * torch.where(short > 0, full / short, 1.0).clamp(0.5, 2.0)
        return gamma

    def _keys(self, batch: Batch, x: Tensor, g: Tensor) -> Tensor:
        n = x.shape[0]
        share = self.state.config.share
        if share == "layer":
            return torch.zeros(n, dtype=torch.long)
        if share == "position":
            return torch.arange(n)
        labels = batch.labels
        if isinstance(labels, Mapping):
            matches = (v for pattern, v in labels.items() if re.search(pattern, self.name))
            labels = next(matches, None)
        per_token = self.state.config.fisher_unit == "token"
        positions = self.adapter.positions(g)
        wanted = (n, positions) if per_token and positions > 1 else (n,)
        if labels is None or (*labels.shape,) not in (wanted, (n,)):
            shape = None if labels is None else (*labels.shape,)
            raise FNGDError(
                f"share=label: {self.name} needs labels of shape {wanted} and got {shape}: "
                "give set_batch(labels={regular expression: labels}), one for each kind of layer"
            )
        if per_token and labels.dim() == 1:
            labels = labels.unsqueeze(1).expand(n, positions)
        return labels

    def compute(self, batch: Batch, calls: list[Call], bias: bool) -> tuple[Tensor, Tensor | None]:
        """Computes γ from all calls of one forward, stores it, and gives the weighted gradients.

        Args:
            batch: The pass.
            calls: Input, output gradient and weight of every call.
            bias: Whether the bias takes part.

        Returns:
            Weight gradient, and bias gradient or None.
        """
        batch.used = True
        adapter = self.adapter
        if self.number in batch.computed:
            self.state.warn_once(
                self.name,
                "had two backward passes for one batch, each with coefficients of its own; where "
                "checkpointed blocks share it, set use_reentrant=False",
            )
        batch.computed.add(self.number)
        with self.state.statistics.timer(calls[0][0].device):
            gamma, per_sample = self._solve(batch, calls, bias)
        parts = self._split(gamma, calls)
        scaled = [adapter.scale_rows(g, part) for (_, g, _), part in zip(calls, parts, strict=True)]
        if per_sample is not None:
            matrix = torch.einsum("n,gnoi->goi", gamma.to(per_sample.dtype), per_sample)
            grad_weight = adapter.from_canonical(matrix, calls[0][2])
            return grad_weight, _total(map(adapter.bias_gradient, scaled)) if bias else None
        weights, biases = zip(
            *(
                adapter.parameter_gradients(g, x, weight, bias)
                for (x, _, weight), g in zip(calls, scaled, strict=True)
            ),
            strict=True,
        )
        return _total(weights), _total(biases) if bias else None

    def _split(self, gamma: Tensor, calls: list[Call]) -> Sequence[Tensor]:
        """Gives every call its part of γ.

        Returns:
            γ of each call.
        """
        if gamma.dim() < 2:
            return [gamma] * len(calls)
        return gamma.split([self.adapter.positions(g) for _, g, _ in calls], dim=1)

    def _solve(self, batch: Batch, calls: list[Call], bias: bool) -> tuple[Tensor, Tensor | None]:
        config, state = self.state.config, self.state
        parts = [self.adapter.canonical(x, g) for x, g, _ in calls]
        a, g = (torch.cat(p, 2) if len(p) > 1 else p[0] for p in zip(*parts, strict=True))
        if a.dtype in (torch.float16, torch.bfloat16):
            a, g = a.float(), g.float()
        _, n, t, _ = a.shape
        memory = config.gram_memory_mb * 2**20
        kappa = n * state.accumulation
        per_sample = None
        if config.fisher_unit == "sample":
            route = config.gram_route
            matrix, per_sample = gram.sample_gram(a, g, bias=bias, route=route, memory_bytes=memory)
            solution = coefficients.solve(
                matrix, damping=config.damping, mode=config.damping_mode, kappa=kappa
            )
            gamma = solution.gamma
            alive = None
        else:
            norms = gram.token_norms(a, g, bias=bias)
            # Padding has no gradient: it is no sample and no landmark.
            alive = norms > 0
            solution = self._solve_tokens(a, g, bias, norms, kappa * t)
            gamma, alive = solution.gamma.view(n, t), alive.view(n, t)
        state.statistics.count_solution(gamma, solution)
        if solution.finite:
            self._remember(batch, gamma, alive, calls)
        return gamma, per_sample

    def _solve_tokens(
        self, a: Tensor, g: Tensor, bias: bool, norms: Tensor, kappa: float
    ) -> coefficients.Solution:
        config, state = self.state.config, self.state
        alive = norms.nonzero().squeeze(1)
        count = max(1, len(alive))
        options: dict[str, Any] = {
            "damping": config.damping,
            "mode": config.damping_mode,
            "kappa": kappa * count / len(norms),
        }
        exact = config.gram_route == "exact" or (
            config.gram_route == "auto" and len(alive) <= 2 * config.num_landmarks
        )
        groups = len(a)
        a, g = a.reshape(groups, -1, 1, a.shape[-1]), g.reshape(groups, -1, 1, g.shape[-1])
        a, g = a[:, alive], g[:, alive]
        if exact or len(alive) == 0:
            solution = coefficients.solve(gram.token_gram(a, g, a, g, bias=bias), **options)
        else:
            seed = (config.seed * 1_000_003 + state.steps) * 1_000_003 + self.number
            generator = torch.Generator().manual_seed(seed % 2**63)
            chosen = torch.randperm(len(alive), generator=generator)[: config.num_landmarks]
            chosen = chosen.to(a.device)
            columns = gram.token_gram(a, g, a[:, chosen], g[:, chosen], bias=bias)
            solution = coefficients.solve_nystrom(columns, chosen, norms.sum(), count, **options)
        gamma = torch.ones_like(norms)
        gamma[alive] = solution.gamma
        return solution._replace(gamma=gamma)

    def _remember(
        self, batch: Batch, gamma: Tensor, alive: Tensor | None, calls: list[Call]
    ) -> None:
        store = self.state.store
        if batch.found is not None:
            if batch.found.device != gamma.device:
                batch.found = batch.found.to(gamma.device)
            batch.found[:, self.number] = gamma.float()
        elif isinstance(store, MeanStore) and alive is None:
            # Per-sample keys are the same for all calls.
            store.write(self.number, self._keys(batch, *calls[0][:2]), gamma)
        elif isinstance(store, MeanStore) and alive is not None:
            parts = zip(calls, self._split(gamma, calls), self._split(alive, calls), strict=True)
            for (x, g, _), part, living in parts:
                keys = self._keys(batch, x, g).to(living.device)
                store.write(self.number, keys.masked_fill(~living, -1), part)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)

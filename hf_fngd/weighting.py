"""FNGD's side of the capture of one layer: coefficients looked up, or computed and stored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_fngd import compiled
from hf_fngd.batches import TrackedLayer
from hf_fngd.calls import Call, gather_calls, sum_gradients
from hf_fngd.capture import backward_pass
from hf_fngd.errors import FNGDError
from hf_fngd.fngd import Batch, FNGDState
from hf_fngd.layer_solver import Draws, solve_samples, solve_tokens
from hf_fngd.layers import LinearAdapter
from hf_fngd.mean_store import MeanStore
from hf_fngd.packing import check_row, spread


class LayerState(TrackedLayer[FNGDState]):
    """FNGD's side of the capture of one layer: looks coefficients up, or computes them.

    Args:
        state: The run's state.
        number: Number of the layer.
        adapter: Adapter of the layer's type.
    """

    def __init__(self, state: FNGDState, number: int, adapter: LinearAdapter) -> None:
        super().__init__(state, number, adapter)
        self._registered = compiled.register(self)
        # Backward pass and batch of the last call of a compiled graph.
        self._last = (-1, -1)

    @property
    def idle(self) -> bool:
        """Whether this is an epoch before `collect_from`."""
        return self.state.waiting

    def numbers(self) -> tuple[Tensor, Tensor] | None:
        """Gives what a compiled graph takes along.

        Returns:
            Numbers of layer and batch; None for a module whose calls meet in a gate.
        """
        return None if self.gated else (self._registered, self.state.ticket)

    def deliver(self, ticket: int, call: Call, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Gives the weighted gradients of one call, in the backward of a compiled graph.

        Args:
            ticket: Number of the batch, 0 if it was not announced.
            call: Input, output gradient and weight.
            bias: Whether the bias takes part.

        Returns:
            Weight gradient, and bias gradient or None.
        """
        x, g, weight = call
        batch = self.state.redeem(ticket, x.shape[0], self.name)
        if batch is not None and batch.fresh:
            self._look_for_calls((backward_pass(), ticket))
            with torch.autocast(x.device.type, enabled=False):
                return self.compute(batch, [call], bias)
        if batch is None:
            return self.adapter.parameter_gradients(g, x, weight, bias)
        gamma = self.weights(batch, x, g)
        return self.adapter.weighted_gradients(g, x, weight, gamma, False, bias)[1:]

    def _look_for_calls(self, present: tuple[int, int]) -> None:
        if present == self._last:
            self.state.to_gate.add(self)
            self.state.warn_once(
                self.name,
                "is called several times by a compiled model: in this batch each call has "
                "coefficients of its own; from the next step on the graph breaks there, and they "
                "are taken together",
            )
        self._last = present

    def weights(self, batch: Batch, x: Tensor, g: Tensor) -> Tensor:
        """Looks up γ for one call.

        Args:
            batch: The pass.
            x: Layer input.
            g: Output gradient.

        Returns:
            γ as `[N]`, or `[N, T]` for fisher_unit=token and for packed rows.
        """
        batch.used = True
        return self._over_row(batch, self._look_up(batch, x, g), g)

    def _over_row(self, batch: Batch, gamma: Tensor, g: Tensor) -> Tensor:
        check_row(self.name, self.adapter.positions(g), batch.lengths)
        return gamma if batch.lengths is None else spread(gamma, batch.lengths)

    def _look_up(self, batch: Batch, x: Tensor, g: Tensor) -> Tensor:
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
            gamma = gamma * torch.where(short > 0, full / short, 1.0).clamp(0.1, 10.0)
        return gamma

    def _keys(self, batch: Batch, x: Tensor, g: Tensor) -> Tensor:
        n = x.shape[0] if batch.lengths is None else len(batch.lengths)
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
        with self.state.statistics.clock.timer(calls[0][0].device):
            gamma, per_sample = self._solve(batch, calls, bias)
        parts = [
            self._over_row(batch, part, g)
            for (_, g, _), part in zip(calls, self._split(gamma, calls), strict=True)
        ]
        scaled = [
            (x, adapter.scale_rows(g, part), weight)
            for (x, g, weight), part in zip(calls, parts, strict=True)
        ]
        if per_sample is None:
            return sum_gradients(adapter, scaled, bias)
        matrix = torch.einsum("n,gnoi->goi", gamma.to(per_sample.dtype), per_sample)
        grad_weight = adapter.from_canonical(matrix, calls[0][2])
        if not bias:
            return grad_weight, None
        return grad_weight, torch.stack([adapter.bias_gradient(g) for _, g, _ in scaled]).sum(0)

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
        for _, given, _ in calls:
            check_row(self.name, self.adapter.positions(given), batch.lengths)
        draws = Draws(config.seed, state.steps, self.number)
        x = calls[0][0]
        features = self.adapter.input_features(x)
        inputs = draws.features(features, config.gram_inputs, x.device, stream=1)
        low = x.dtype if config.gram_dtype == "auto" else getattr(torch, config.gram_dtype)
        dtype = torch.bfloat16 if low == torch.bfloat16 else None
        a, g = gather_calls(self.adapter, calls, batch.lengths, inputs, dtype)
        _, n, t, _ = a.shape
        kappa = n * state.accumulation
        per_sample = alive = None
        if config.fisher_unit == "sample":
            solution, per_sample = solve_samples(config, a, g, bias=bias, kappa=kappa, draws=draws)
        else:
            solution, alive = solve_tokens(config, a, g, bias=bias, kappa=kappa * t, draws=draws)
        state.statistics.count_solution(solution)
        if solution.finite:
            self._remember(batch, solution.gamma, alive, calls)
        exact = inputs is None and dtype is None
        return solution.gamma, per_sample if exact else None

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

"""FNGD in the backward pass of one layer: solve for γ in a fresh batch, look it up in others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fngd.capture import Batch, LayerMethod
from hf_fngd.layers.calls import Call, check_row, gather_calls, spread, sum_gradients
from hf_fngd.solve import coefficients, gram


class FNGDLayer(LayerMethod):
    """The layer half of FNGD; `optimizer` is the `FNGD` that it belongs to."""

    in_graph = True
    optimizer: Any

    def weights(self, batch: Batch, call: Call) -> Tensor:
        self.optimizer.use(batch)
        gamma = self.optimizer.columns(batch, call.g)[self.number]
        if gamma.shape[0] == 1:
            # share=layer
            gamma = gamma.expand(call.x.shape[0] if batch.lengths is None else len(batch.lengths))
        return self._over_row(batch, gamma, call.g)

    def gradients(
        self, batch: Batch, calls: list[Call], bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        fngd = self.optimizer
        fngd.use(batch)
        first = self.count_delivery(batch, "with its own coefficients")
        grads = self._natural(batch, calls, bias)
        if fngd.needs_loss_scale:
            fngd.scale.note(self, first, grads[0])
        return grads

    def _natural(self, batch: Batch, calls: list[Call], bias: bool) -> tuple[Tensor, Tensor | None]:
        fngd, kind = self.optimizer, self.kind
        with fngd.counters.clock.timer(calls[0].x.device):
            gamma, per_sample = self._solve(batch, calls, bias)
        weights = [self._over_row(batch, gamma, g) for _, g, _ in calls]
        if per_sample is None:
            scaled = [
                Call(x, kind.scale(g, one), weight)
                for (x, g, weight), one in zip(calls, weights, strict=True)
            ]
            return sum_gradients(kind, scaled, bias)
        matrix = torch.einsum("n,gnoi->goi", gamma.to(per_sample.dtype), per_sample)
        grad_weight = kind.from_canonical(matrix, calls[0].weight)
        if not bias:
            return grad_weight, None
        biases = [
            kind.bias_gradient(kind.scale(g, one))
            for (_, g, _), one in zip(calls, weights, strict=True)
        ]
        return grad_weight, torch.stack(biases).sum(0) if len(biases) > 1 else biases[0]

    def forget(self) -> None:
        self.optimizer.forget(self.number)

    def _over_row(self, batch: Batch, gamma: Tensor, g: Tensor) -> Tensor:
        if batch.lengths is None:
            return gamma
        check_row(self.name, self.kind.positions(g), batch.lengths)
        return spread(gamma, batch.lengths)

    def _solve(self, batch: Batch, calls: list[Call], bias: bool) -> tuple[Tensor, Tensor | None]:
        """Compute and store γ `[N]`; per-sample gradients come along where they were formed."""
        fngd = self.optimizer
        config = fngd.config
        if batch.lengths is not None:
            for call in calls:
                check_row(self.name, self.kind.positions(call.g), batch.lengths)
        low = calls[0].x.dtype
        if config.gram_dtype != "auto":
            low = getattr(torch, config.gram_dtype)
        dtype = torch.bfloat16 if low == torch.bfloat16 else None
        a, g = gather_calls(self.kind, calls, batch.lengths, dtype)
        matrix, per_sample = gram.sample_gram(
            a, g, bias=bias, memory_bytes=config.gram_memory_mb * 2**20
        )
        solution = coefficients.solve(
            matrix,
            damping=config.damping,
            mode=config.damping_mode,
            kappa=a.shape[1] * fngd.scale.divisor,
            leave_one_out=config.leave_one_out,
        )
        fngd.counters.count_solution(solution)
        if solution.finite:
            fngd.keep(batch, self.number, solution.gamma)
        return solution.gamma, None if dtype is torch.bfloat16 else per_sample

"""`PreconditionedOptimizer`: KFAC, Eva, TENGraD and SENG before the common update rules."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_fngd.base_optimizer import LayerOptimizer
from hf_fngd.errors import FNGDError
from hf_fngd.layers import LinearAdapter
from hf_fngd.methods.base import LayerCurvature, PreconditionerConfig
from hf_fngd.methods.fisher_labels import FisherLabels
from hf_fngd.methods.observer import CurvatureState, LayerObserver, rank_seed
from hf_fngd.methods.step_length import kl_scale, with_norms_of
from hf_fngd.ranks import average
from hf_fngd.selection import Selection, select_layers

logger = logging.getLogger(__name__)
# What a checkpoint holds of the tracker.
_SAVED = ("steps", "updates", "next_update", "last_size", "postponed")


class PreconditionedOptimizer(LayerOptimizer):
    """Turns the gradients of the selected layers into V = λ(F + λI)⁻¹M at the optimizer step.

    Gradients are complete then: accumulated, averaged over ranks, unscaled and clipped. What F is
    depends on the subclass. Momentum and weight decay come afterwards, as in `FNGD`.

    Args:
        params: Parameters or parameter groups, as for any optimizer.
        lr: Learning rate of the selected weights.
        module: The model whose layers are selected and attached.
        config: Settings; or give them as keyword arguments.
        weight_decay: Decoupled weight decay of groups that do not name their own.
        **settings: Fields of the method's config.

    Raises:
        FNGDError: For bad settings, or if no layer can be selected.
    """

    config_class: ClassVar[type[PreconditionerConfig]]
    layer_class: ClassVar[type[LayerCurvature]]
    config: Any
    tracker: CurvatureState

    def _set_up(self, module: nn.Module) -> None:
        chosen = self.selection.chosen
        self.tracker = CurvatureState(self.config, list(chosen))
        self._module = module
        self._hook: Any = None
        self._kl_scale: Tensor | None = None
        self.layers: list[LayerCurvature] = []
        for number, (layer, adapter) in enumerate(chosen.values()):
            shape = self._join(layer, adapter, torch.Tensor.detach).shape
            seed = rank_seed(self.config.seed) * 1_000_003 + number
            self.layers.append(self.layer_class(self.config, shape, seed))
        said = Counter(filter(None, (layer.clamped() for layer in self.layers)))
        for what, times in said.items():
            logger.warning(
                "%s: in %d of %d layers %s", self.config.title, times, len(self.layers), what
            )

    def _select(self, module: nn.Module) -> Selection:
        return select_layers(
            module,
            self.config.target_modules,
            self.config.exclude_modules,
            batch_norm=getattr(self.config, "batch_norm", False),
        )

    def _handler(self, number: int, adapter: LinearAdapter) -> LayerObserver:
        return LayerObserver(self.tracker, number, adapter, self.layers[number])

    def attach(self) -> None:  # noqa: D102
        super().attach()
        if self.config.fisher_labels == "sampled" and self._hook is None:
            hook = FisherLabels(self.tracker.sample_labels, self._weights)
            self._hook = self._module.register_forward_hook(hook, with_kwargs=True)

    def detach(self) -> None:  # noqa: D102
        super().detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _weights(self) -> list[Tensor]:
        return [module.get_parameter("weight") for module, _ in self.selection.chosen.values()]

    def set_batch(  # noqa: D102
        self, sample_ids: Sequence[int] | Tensor | None = None, labels: Any = None
    ) -> None:
        self.tracker.set_batch(None if sample_ids is None else len(sample_ids))

    # ---- the step ----------------------------------------------------------------------------

    def _precondition(self) -> None:
        state = self.tracker
        if state.due:
            self._update()
        active = [
            (layer, module, adapter)
            for layer, (module, adapter) in zip(
                self.layers, self.selection.chosen.values(), strict=True
            )
            if module.get_parameter("weight").grad is not None
        ]
        if not active:
            return
        means = [self._join(module, adapter, _gradient) for _, module, adapter in active]
        parts = [layer.local_parts(m) for (layer, *_), m in zip(active, means, strict=True)]
        average([part for one in parts for part in one])
        directions, weights = [], []
        for (layer, *_), m, part in zip(active, means, parts, strict=True):
            v, damping = layer.combine(m, part)
            # What went wrong in one layer must not reach its weights.
            directions.append(torch.where(v.isfinite().all(), v, m))
            weights.append(damping)
        self._control(active, means, directions, weights)
        for (_, module, adapter), v in zip(active, directions, strict=True):
            self._write(module, adapter, v)

    def _update(self) -> None:
        state = self.tracker
        if self.config.fisher_labels == "sampled" and state.batch is not None and not state.seen:
            raise FNGDError(
                "fisher_labels=sampled saw no forward of the whole model in this step: call the "
                "model itself and not its parts, set use_reentrant=False where blocks are "
                "checkpointed, or set fisher_labels=empirical"
            )
        local = self.layer_class.by_rank
        smaller = local and 0 < state.seen < state.last_size and not state.postponed
        if smaller or (local and state.seen == 0):
            if smaller:
                state.warn_once(
                    f"a batch of {state.seen}",
                    f"is smaller than that of the last curvature update ({state.last_size}): the "
                    "update waits for the next step",
                )
            for layer in self.layers:
                layer.discard()
            state.close_update(False)
            return
        weight = self._weights()[0]
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        with state.clock.timer(like.device):
            average([tensor for layer in self.layers for tensor in layer.statistics(like)])
            failed = sum(not layer.update(state.steps) for layer in self.layers)
        state.nonfinite += failed
        state.close_update(True)
        if local and failed:
            # Curvature that is kept for long is worth another try at once.
            state.next_update = state.steps + 1

    def _control(
        self,
        active: Sequence[tuple[LayerCurvature, nn.Module, LinearAdapter]],
        means: Sequence[Tensor],
        directions: list[Tensor],
        dampings: Sequence[Tensor],
    ) -> None:
        """Sets the length of the directions, by `step_control`; changes the list."""
        if self.config.step_control == "norm":
            directions[:] = with_norms_of(means, directions)
        elif self.config.step_control == "kl_clip":
            known = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
            # A weight that is in no group does not move.
            rates = [known.get(id(m.get_parameter("weight")), 0.0) for _, m, _ in active]
            self._kl_scale = kl_scale(self.config.kl_clip, rates, dampings, means, directions)
            directions[:] = [v * self._kl_scale.to(v.dtype) for v in directions]

    @staticmethod
    def _join(
        module: nn.Module, adapter: LinearAdapter, read: Callable[[nn.Parameter], Tensor]
    ) -> Tensor:
        """Brings weight and trained bias (or their gradients) into one block.

        Returns:
            `[G, d_out, d_in]`, with the bias as the last feature.
        """
        matrix = adapter.to_canonical(read(module.get_parameter("weight")))
        bias = module._parameters["bias"]
        if bias is None or not bias.requires_grad:
            return matrix
        return torch.cat([matrix, read(bias).reshape(*matrix.shape[:2], 1)], 2)

    @staticmethod
    def _write(module: nn.Module, adapter: LinearAdapter, v: Tensor) -> None:
        weight, bias = module.get_parameter("weight"), module._parameters["bias"]
        assert weight.grad is not None
        if bias is not None and bias.requires_grad:
            if bias.grad is not None:
                bias.grad.copy_(v[..., -1].reshape(-1))
            v = v[..., :-1]
        weight.grad.copy_(adapter.from_canonical(v, weight))

    def statistics(self) -> dict[str, Any]:
        """Reports on the curvature.

        Returns:
            `damping`, `layers`, `layers_left_out`, number of `updates` of the curvature and their
            `curvature_seconds`, counts of `nonfinite` statistics and of `fallbacks` (factors that
            were not positive definite); with kl_clip, `kl_scale` of the last step.
        """
        state = self.tracker
        numbers = {
            **super().statistics(),
            "updates": float(state.updates),
            "curvature_seconds": state.clock.seconds(),
            "nonfinite": float(state.nonfinite),
            "fallbacks": float(sum(layer.fallbacks for layer in self.layers)),
        }
        if self._kl_scale is not None:
            numbers["kl_scale"] = float(self._kl_scale)
        return numbers

    # ---- state -------------------------------------------------------------------------------

    def _method_state(self) -> dict[str, Any]:
        state = self.tracker
        return {
            **super()._method_state(),
            **{name: getattr(state, name) for name in _SAVED},
            "curvature": [dict(layer.state) for layer in self.layers],
        }

    def _load_method_state(self, saved: dict[str, Any]) -> None:
        state = self.tracker
        for name in _SAVED:
            setattr(state, name, saved[name])
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1 and self.layer_class.by_rank:
            # A checkpoint holds the samples of the rank that wrote it.
            logger.warning(
                "%s: each rank had curvature of its own, which one checkpoint cannot hold; it is "
                "computed anew in the first step",
                self.config.title,
            )
            state.next_update, state.last_size = state.steps, 0
            return
        modules = [module for module, _ in self.selection.chosen.values()]
        for layer, module, tensors in zip(self.layers, modules, saved["curvature"], strict=True):
            device = module.get_parameter("weight").device
            # Counts stay on the CPU.
            layer.state = {
                name: value.clone() if value.dim() == 0 else value.clone().to(device)
                for name, value in tensors.items()
            }


def _gradient(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    if grad is None:
        grad = torch.zeros_like(parameter)
    return grad.to(torch.promote_types(grad.dtype, torch.float32))

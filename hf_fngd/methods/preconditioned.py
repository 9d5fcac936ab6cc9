"""`PreconditionedOptimizer`: the optimizer half of KFAC, EKFAC, Eva, TENGraD and SENG.

It decides at which steps curvature is due, hands each layer's mean gradient M to the layer's
curvature at the optimizer step, bounds the length of the result, and puts it back into `.grad`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd import ranks
from hf_fngd.capture import Batch
from hf_fngd.config import DampedConfig, setting
from hf_fngd.errors import FNGDError
from hf_fngd.layers.calls import Call
from hf_fngd.methods.counters import Stopwatch
from hf_fngd.methods.curvature import LayerCurvature, largest
from hf_fngd.methods.fisher_labels import FisherLabels
from hf_fngd.optimizer import LayerOptimizer
from hf_fngd.rules import working_dtype

logger = logging.getLogger(__name__)
# The part of a checkpoint, beside the curvature.
_SAVED = ("updates", "next_update", "last_size", "postponed")


def kl_clip(default: float | None) -> Any:
    """Declare the bound on a step's length; each method has its own default."""
    return setting(
        default,
        "Bound on lr²·⟨V, F V⟩, summed over layers: all directions are shortened by one factor "
        "where the predicted change exceeds it. none: no bound.",
        above=0.0,
        resumed=True,
    )


@dataclass
class PreconditionerConfig(DampedConfig):
    """Settings that KFAC, EKFAC, Eva, TENGraD and SENG share.

    Raises:
        FNGDError: For a value out of range, or two settings that exclude each other.
    """

    fisher_labels: str = setting(
        "empirical",
        "Labels behind the curvature: empirical (those of the data, from the training backward) or "
        "sampled (drawn from the model's own predictions, by a second backward on update steps).",
        choices=("empirical", "sampled"),
        resumed=True,
    )
    update_period: int = setting(
        1, "Optimizer steps from one update of the curvature to the next.", at_least=1, resumed=True
    )
    kl_clip: float | None = kl_clip(None)
    seed: int = setting(0, "Seed of all random draws of the method.", resumed=True)


class PreconditionedOptimizer(LayerOptimizer):
    """Turns the gradients of the selected layers into V = λ(F + λI)⁻¹M at the optimizer step.

    Gradients are complete then: accumulated, averaged over ranks, unscaled and clipped. The
    subclass's `layer_class` says what F is. Momentum and weight decay follow, as in `FNGD`.

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
    accepts_packed_rows = False
    needs_whole_gradients = True

    def set_up(self, module: nn.Module) -> None:
        self.clock = Stopwatch()
        self.updates = 0
        self.nonfinite = 0
        # Largest batch observed in this step, and at the last update of the curvature.
        self.seen = 0
        self.last_size = 0
        self.next_update = 0
        self.postponed = False
        # Second backward passes of this step, and whether one is running.
        self._drawn = 0
        self._sampling = False
        self._kl_scale: Tensor | None = None
        self._module = module
        self._hook: Any = None

    def attach(self) -> None:
        super().attach()
        if self.config.fisher_labels == "sampled" and self._hook is None:
            self._hook = self._module.register_forward_hook(FisherLabels(self), with_kwargs=True)
            weakref.finalize(self, self._hook.remove).atexit = False
        self._tell_clamped()

    def _tell_clamped(self) -> None:
        told = Counter(filter(None, (layer.clamped() for layer in self.layers)))
        for text, times in told.items():
            where = f"in {times} of {len(self.layers)} layers"
            self.batches.warn_once(where, text)

    def detach(self) -> None:
        super().detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def needs_loss_scale(self) -> bool:
        return True

    # ---- what layers ask in backward -------------------------------------------------------------

    def observed(
        self, layer: LayerCurvature, batch: Batch, call: Call
    ) -> tuple[float | None, bool]:
        """Say what a layer does in the backward pass that is running.

        Args:
            layer: The layer.
            batch: The batch.
            call: One of its calls.

        Returns:
            κ of the gradients if the layer observes them, else None; and whether the layer returns
            its plain gradients, which it does not for drawn labels.
        """
        if not self._sampling:
            batch.used = True
        sampled = self.config.fisher_labels == "sampled"
        if self._sampling != sampled:
            return None, not self._sampling
        samples = call.x.shape[0]
        self.seen = max(self.seen, samples)
        return (1.0 if sampled else samples * self.scale.divisor), not self._sampling

    def begin_sampling(self) -> tuple[Any, torch.Generator] | None:
        """Begin a second backward pass with drawn labels, where one is due.

        Returns:
            A context in which the backward pass runs, and its random numbers; or None.
        """
        batch = self.batches.current
        if not self.batches.active or batch is None or not batch.gates:
            return None
        keys = (ranks.number(), self.steps, self._drawn)
        self._drawn += 1
        return self._sampled(), ranks.generator(self.config.seed, *keys)

    @contextlib.contextmanager
    def _sampled(self) -> Iterator[None]:
        self._sampling = True
        try:
            yield
        finally:
            self._sampling = False

    def weights(self) -> list[Tensor]:
        """Return the weights of the captured layers, but those that have been replaced."""
        found = (layer.parameters()[0] for layer in self.layers)
        return [weight for weight in found if isinstance(weight, nn.Parameter)]

    # ---- the step --------------------------------------------------------------------------------

    def precondition(self) -> None:
        if self.batches.active:
            self._update()
        active = [
            (module, layer)
            for module, layer in self.captured
            if getattr(module._parameters.get("weight"), "grad", None) is not None
        ]
        if not active:
            return
        means = [layer.join(module, _gradient) for module, layer in active]
        parts = [layer.local_parts(m) for (_, layer), m in zip(active, means, strict=True)]
        ranks.average([part for one in parts for part in one])
        directions, dampings = [], []
        for (_, layer), m, part in zip(active, means, parts, strict=True):
            v, damping = layer.combine(m, part)
            directions.append(v)
            dampings.append(damping)
        # A failure in one layer must not reach its weights.
        sizes = torch._foreach_norm(directions, torch.inf)
        directions = [
            torch.where(size < torch.inf, v, m)
            for size, v, m in zip(sizes, directions, means, strict=True)
        ]
        if self.config.kl_clip is not None:
            rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
            # A weight that is in no group does not move.
            known = [rates.get(id(m.get_parameter("weight")), 0.0) for m, _ in active]
            self._kl_scale = kl_scale(self.config.kl_clip, known, dampings, means, directions)
            directions = [v * self._kl_scale.to(v) for v in directions]
        for (module, layer), v in zip(active, directions, strict=True):
            _write(module, layer, v)

    def _discard(self) -> None:
        for layer in self.layers:
            layer.discard()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        # Drawn labels are observed in the forward pass, after which many loops call this.
        if self.config.fisher_labels == "empirical":
            self._discard()
            self.seen = 0

    def end_step(self) -> None:
        super().end_step()
        self.seen = self._drawn = 0
        self.batches.active = self.steps >= self.next_update

    def _update(self) -> None:
        current = self.batches.current
        # A batch of no rows has no layer to see it.
        called = current is not None and current.size != 0
        seen = self.seen or self.batches.unfit
        if self.config.fisher_labels == "sampled" and called and not seen:
            raise FNGDError(
                "fisher_labels=sampled saw no forward of the whole model in this step: call the "
                "model itself and not its parts, set use_reentrant=False where blocks are "
                "checkpointed, or set fisher_labels=empirical"
            )
        local = self.layer_class.by_rank
        smaller = local and 0 < self.seen < self.last_size and not self.postponed
        self.postponed = smaller or (local and self.seen == 0)
        if self.postponed:
            if smaller:
                self.batches.warn_once(
                    f"a batch of {self.seen}",
                    f"is smaller than that of the last curvature update ({self.last_size}): the "
                    "update waits for the next step",
                )
            self._discard()
            return
        weight = self.weights()[0]
        factor = self.scale.find(weight.device)
        if factor != 1.0:
            for layer in self.layers:
                layer.rescale(factor)
        like = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
        with self.clock.timer(like.device):
            self._check()
            statistics = [tensor for layer in self.layers for tensor in layer.statistics(like)]
            self._average(statistics, like)
            found = any(layer.found() for layer in self.layers)
            failed = sum(not layer.update(self.steps) for layer in self.layers)
        self.nonfinite += failed
        if not found:
            # A step without a batch, as torch.distributed.checkpoint makes with a new optimizer.
            return
        self.updates += 1
        self.last_size = self.seen
        # Curvature that is kept for long is worth another try at once.
        wait = 1 if local and failed else self.config.update_period
        self.next_update = self.steps + wait

    def _check(self) -> None:
        """Tell each layer whether its observations are finite; the host waits once for all."""
        observed = [layer.observations() for layer in self.layers]
        sizes = iter(largest([one for some in observed for one in some]))
        for layer, some in zip(self.layers, observed, strict=True):
            layer.lost = not all([math.isfinite(next(sizes)) for _ in some])

    def _average(self, statistics: list[Tensor], like: Tensor) -> None:
        """Average statistics over ranks, and tell each layer how many observations there are."""
        if ranks.count() > 1:
            left_out = like.new_tensor([float(layer.left_out) for layer in self.layers])
            ranks.average([left_out, *statistics])
            for layer, share in zip(self.layers, left_out.tolist(), strict=True):
                if share > 0:
                    layer.leave_out("another process has left it out")
        counted = [(layer, one) for layer in self.layers if (one := layer.counter()) is not None]
        for (layer, _), count in zip(counted, largest([one for _, one in counted]), strict=True):
            layer.count = count

    # ---- logs and checkpoints --------------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """Report on the curvature.

        Returns:
            `damping`, `layers`, `layers_dropped`, number of `updates` of the curvature and their
            `curvature_seconds`, counts of `nonfinite` statistics and of `fallbacks` (factors that
            were not positive definite); with kl_clip, `kl_scale` of the last step.
        """
        numbers = {
            "damping": float(self.config.damping),
            **super().statistics(),
            "updates": float(self.updates),
            "curvature_seconds": self.clock.seconds(),
            "nonfinite": float(self.nonfinite),
            "fallbacks": float(sum(layer.fallbacks for layer in self.layers)),
        }
        if self._kl_scale is not None:
            numbers["kl_scale"] = float(self._kl_scale)
        return numbers

    def method_state(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _SAVED},
            "curvature": [dict(layer.state) for layer in self.layers],
        }

    def load_method_state(self, saved: dict[str, Any]) -> None:
        for name in _SAVED:
            setattr(self, name, saved[name])
        if ranks.count() > 1 and self.layer_class.by_rank:
            # A checkpoint holds the samples of the rank that wrote it.
            logger.warning(
                "%s: each rank has its own curvature, which one checkpoint cannot hold; it is "
                "computed anew in the first step",
                self.config.title,
            )
            self.next_update, self.last_size = saved["steps"], 0
        else:
            for (module, layer), tensors in zip(self.captured, saved["curvature"], strict=True):
                weight = module.get_parameter("weight")
                # Counts are read at every step, and stay on the CPU.
                layer.state = {
                    name: _moved(value.clone(), weight)
                    if value.dim() or name == "damping"
                    else value.clone().cpu()
                    for name, value in tensors.items()
                }
        self.batches.active = saved["steps"] >= self.next_update


def kl_scale(
    bound: float,
    rates: Sequence[float],
    dampings: Sequence[Tensor],
    means: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> Tensor:
    """Find the factor that keeps the predicted change of the model within a bound.

    lr²⟨V, FV⟩, summed over layers, is about lr²λ⟨V, M⟩, since (F + λI)V = λM.

    Args:
        bound: The bound.
        rates: Learning rate of each layer.
        dampings: Absolute damping λ of each layer; 0 where there is no curvature.
        means: Mean gradient M of each layer.
        directions: V of each layer.

    Returns:
        Scalar in [0, 1]; 0 where the change overflows.
    """
    changes = [
        # Without curvature nothing is predicted, however large the gradient.
        torch.where(damping > 0, rate**2 * damping * (v * m).sum().abs(), 0.0)
        for rate, damping, m, v in zip(rates, dampings, means, directions, strict=True)
    ]
    # Not stacked: layers may differ in precision, and in device.
    total = sum((change.to(changes[0].device) for change in changes[1:]), changes[0])
    scale = (bound / total).sqrt().clamp(max=1.0)
    return torch.where(scale.isnan(), 0.0, scale)


def _moved(value: Tensor, weight: Tensor) -> Tensor:
    """Bring a loaded tensor to a weight's device, and numbers to the precision of its curvature."""
    dtype = working_dtype(weight) if value.is_floating_point() else value.dtype
    return value.to(weight.device, dtype)


def _gradient(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    if grad is None:
        grad = torch.zeros_like(parameter)
    return grad.to(torch.promote_types(grad.dtype, torch.float32))


def _write(module: nn.Module, layer: LayerCurvature, v: Tensor) -> None:
    """Write a direction `[G, d_out, d_in]` (with the bias as last feature) into `.grad`."""
    weight = module.get_parameter("weight")
    assert weight.grad is not None
    if layer.joint:
        bias = module.get_parameter("bias")
        if bias.grad is not None:
            bias.grad.copy_(v[..., -1].reshape(-1))
        v = v[..., :-1]
    weight.grad.copy_(layer.kind.from_canonical(v, weight))

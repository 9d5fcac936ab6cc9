"""One layer's curvature F, and the direction V = λ(F + λI)⁻¹M that it makes of a mean gradient M.

KFAC, EKFAC, Eva, TENGraD and SENG derive from the classes here. A layer's curvature observes inputs
`a` and per-sample output gradients `g` in the backward pass of some steps and leaves the gradients
as they are; at the optimizer step `preconditioned` asks it for a direction. The factor λ makes
λ → ∞ the plain gradient for every method, as γ = λc does for FNGD.

One scale holds for all: g is κ times autograd's gradient, with κ the samples of the update on this
rank, so that M = (1/N) Σ_n Σ_t g_nt a_ntᵀ whatever the loss reduction. Damping is λ itself, or
relative: in units of tr(F)/N, the mean eigenvalue of UᵀU/N (1 in place of N for Eva, whose F has
rank one).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_fngd import ranks
from hf_fngd.capture import Batch, LayerMethod
from hf_fngd.layers import LayerType
from hf_fngd.layers.calls import Call, gather_calls, sum_gradients


class LayerCurvature(LayerMethod, ABC):
    """One layer's curvature; each method derives its own.

    Each rank collects statistics in backward (`observe`). At the optimizer step they are averaged
    over ranks where that makes sense (`statistics`), and become curvature (`update`). Directions
    are made in two parts, so that ranks can average what differs between them: `local_parts` on
    each rank, then `combine`.

    Args:
        optimizer: The optimizer, with `config`, `batches`, `steps` and `observed`.
        number: Number of the layer among the captured ones.
        module: The layer.
        kind: The layer's type.
    """

    # Whether each rank keeps its own curvature, from one batch, for many steps.
    by_rank: ClassVar[bool] = False
    # What the optimizer has read of the observations of all layers at once: whether one is not
    # finite, and the value of `counter`.
    lost = False
    count = 0.0

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        super().__init__(optimizer, number, module, kind)
        self.config = optimizer.config
        # Whether the bias is part of the block `[G, d_out, d_in]`, as its last feature.
        bias = module._parameters["bias"]
        self.joint = bias is not None and bias.requires_grad
        self.shape = self.join(module, torch.Tensor.detach).shape
        # The part of a checkpoint.
        self.state: dict[str, Tensor] = {}
        self.fallbacks = 0

    def gradients(
        self, batch: Batch, calls: list[Call], bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        observed, plain = self.optimizer.observed(self, batch, calls[0])
        if observed is not None:
            first = self.count_delivery(batch, "observed by itself")
            with self.optimizer.clock.timer(calls[0].x.device):
                self.observe(calls, observed, self.joint)
        if not plain:
            return None, None
        grads = sum_gradients(self.kind, calls, bias)
        if observed is not None:
            self.optimizer.scale.note(self, first, grads[0])
        return grads

    def canonical(self, calls: Sequence[Call], kappa: float, joint: bool) -> tuple[Tensor, Tensor]:
        """Bring calls into the canonical layout.

        Args:
            calls: The layer's calls in one micro-batch.
            kappa: Factor from autograd's gradients to those of single samples.
            joint: Whether the bias is part of the block, as a feature that is 1.

        Returns:
            `a` as `[G, N, T, d_in]` (d_in + 1 with a bias) and κg as `[G, N, T, d_out]`.
        """
        a, g = gather_calls(self.kind, calls)
        if joint:
            a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
        return a, g * kappa

    def join(self, module: nn.Module, read: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Bring weight and bias, or something of them, into one block.

        Args:
            module: The layer.
            read: Function of a parameter, as its gradient.

        Returns:
            `[G, d_out, d_in]`, with the bias as the last feature.
        """
        matrix = self.kind.to_canonical(read(module.get_parameter("weight")))
        if not self.joint:
            return matrix
        bias = read(module.get_parameter("bias"))
        return torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], 2)

    def forget(self) -> None:
        self.discard()
        self.state = {}

    def clamped(self) -> str | None:
        """Say which setting is larger than the layer and what is done instead; None if none is."""
        return None

    @abstractmethod
    def observe(self, calls: Sequence[Call], kappa: float, joint: bool) -> None:
        """Take in one micro-batch; the arguments are those of `canonical`."""

    @abstractmethod
    def rescale(self, factor: float) -> None:
        """Multiply the output gradients behind the observations, as if κ had been larger."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the observations and keep the old curvature."""

    @abstractmethod
    def observations(self) -> list[Tensor]:
        """Return what must be finite for an update."""

    def counter(self) -> Tensor | None:
        """Return a number of observations, averaged over ranks; None where none is needed."""
        return None

    def statistics(self, like: Tensor) -> list[Tensor]:
        """Return what is averaged over ranks before `update`, in the same shapes on every rank.

        Args:
            like: A tensor of the right device and dtype.

        Returns:
            Tensors, averaged in place.
        """
        return []

    def found(self) -> bool:
        """Return whether any rank has observed what can be used; the same on every rank."""
        return True

    @abstractmethod
    def update(self, step: int) -> bool:
        """Turn the observations into curvature, or keep the old one.

        Args:
            step: Optimizer steps so far.

        Returns:
            False if the statistics were not finite.
        """

    def local_parts(self, m: Tensor) -> list[Tensor]:
        """Compute this rank's part of a direction.

        Args:
            m: Mean gradient `[G, d_out, d_in]`.

        Returns:
            Tensors to be averaged over ranks, in the same shapes on every rank.
        """
        return []

    @abstractmethod
    def combine(self, m: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Complete a direction.

        Args:
            m: Mean gradient `[G, d_out, d_in]`.
            parts: The result of `local_parts`, averaged.

        Returns:
            V = λ(F + λI)⁻¹M and λ (0 where there is no curvature yet, and V is M).
        """

    def generator(self, *keys: int) -> torch.Generator:
        """Return random numbers of this rank and layer, for a step or other keys."""
        return ranks.generator(self.config.seed, ranks.number(), self.number, *keys)

    def damping(self, trace: Tensor, count: Tensor | float) -> Tensor:
        """Return λ.

        Args:
            trace: tr(F).
            count: Number of samples behind F, or its rank if that is lower.

        Returns:
            Scalar tensor; 0 only where F is 0.
        """
        if self.config.damping_mode == "absolute":
            return torch.full_like(trace, self.config.damping)
        return self.config.damping * trace / count


def alive(kind: LayerType, g: Tensor) -> Tensor | None:
    """Find the positions that are not padding: those with a gradient.

    Args:
        kind: The layer's type.
        g: Output gradients `[G, N, T, d_out]`.

    Returns:
        1 or 0 as `[G, N, T, 1]`, or None where there is no padding.
    """
    if not kind.may_pad or g.shape[2] == 1:
        return None
    return (g.abs().amax(-1, keepdim=True) > 0).to(g.dtype)


def inverse_or_zero(damping: Tensor) -> Tensor:
    """Return 1/λ, and 0 (no curvature) where λ is 0 or 1/λ is not a finite number."""
    inverse = damping.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


def largest(tensors: Sequence[Tensor]) -> list[float]:
    """Read the largest absolute value of each tensor, NaN where it has one.

    Args:
        tensors: Real numbers, of any device and precision.

    Returns:
        The values; the host waits once for each device and precision.
    """
    groups: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    found = [0.0] * len(tensors)
    for members in groups.values():
        sizes = torch._foreach_norm([tensors[i] for i in members], torch.inf)
        for i, size in zip(members, torch.stack(sizes).tolist(), strict=True):
            found[i] = size
    return found


class AveragedCurvature(LayerCurvature):
    """Curvature from statistics that are averaged over micro-batches and ranks."""

    # How often the output gradient is a factor of each statistic.
    powers: tuple[int, ...]

    def __init__(self, optimizer: Any, number: int, module: nn.Module, kind: LayerType) -> None:
        super().__init__(optimizer, number, module, kind)
        # Sums of statistics over micro-batches, and at the end their number.
        self._pending: list[Tensor] | None = None

    @abstractmethod
    def describe(self, calls: Sequence[Call], kappa: float, joint: bool) -> list[Tensor]:
        """Return the statistics of one micro-batch, in the shapes of `shapes`."""

    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the statistics, the same on every rank."""

    def rescale(self, factor: float) -> None:
        for total, power in zip(self._pending or (), self.powers, strict=False):
            total *= factor**power

    def discard(self) -> None:
        self._pending = None

    def observe(self, calls: Sequence[Call], kappa: float, joint: bool) -> None:
        found = self.describe(calls, kappa, joint)
        found.append(found[0].new_ones(()))
        if self._pending is not None:
            found = [old + new for old, new in zip(self._pending, found, strict=True)]
        self._pending = found

    def statistics(self, like: Tensor) -> list[Tensor]:
        if self._pending is None or self.lost:
            self._pending = [like.new_zeros(shape) for shape in [*self.shapes(), ()]]
        return self._pending

    def observations(self) -> list[Tensor]:
        return self._pending or []

    def counter(self) -> Tensor | None:
        return None if self._pending is None else self._pending[-1]

    def found(self) -> bool:
        return self._pending is not None and self.count > 0

    def means(self) -> list[Tensor] | None:
        """End the collection and return the averages, or None where no rank has seen anything."""
        pending, found, self._pending = self._pending, self.found(), None
        if pending is None or not found:
            return None
        *sums, count = pending
        return list(torch._foreach_div(sums, count))

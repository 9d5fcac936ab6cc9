"""Taking hold of a layer's input and output gradient, and replacing its weight gradient.

A selected module's class is swapped for a subclass whose forward goes through an autograd
Function. Its backward computes the input gradient as always and a *weighted* weight gradient in
place of the plain one, so `.grad` is the preconditioned gradient before anything else (clipping,
GradScaler, DDP, accumulation) sees it. Nothing is kept on the module between steps, inputs are
saved through `save_for_backward` only, and forward passes without gradients are left alone.

Where coefficients are looked up, a call is weighted by itself. Where they are computed, the calls
of one forward meet in a gate: a node between the parameter and its calls, which autograd runs once
all of them have delivered. A module called several times is thereby one layer with the positions
of all calls, as its per-sample gradient demands.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_fngd.layers import Call, LinearAdapter

# A call and the backward pass that it belongs to.
Delivery = tuple[int, Call]

_ATTRIBUTE = "_fngd_capture"
_SWAPPED: dict[type, type] = {}


class Pass:
    """One forward pass as a preconditioner sees it; preconditioners derive their own.

    Args:
        fresh: Whether coefficients are computed in this pass, or looked up.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        # Parameters behind their gate, and the calls that have delivered, by layer.
        self.gates: dict[int, tuple[Tensor, Tensor | None, list[Delivery]]] = {}


class LayerHandler(Protocol):
    """What a preconditioner does for one layer; implemented once per method."""

    def begin(self, rows: int) -> Pass | None:
        """Gives the pass that a call belongs to, or None to leave the call alone."""

    def weights(self, batch: Any, x: Tensor, g: Tensor) -> Tensor:
        """Looks up γ `[N]` or `[N, T]` for one call."""

    def compute(
        self, batch: Any, calls: list[Call], bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gives the weight and bias gradients of all calls of one forward."""


class Capture:
    """The link between one module and its handler.

    Args:
        number: Number of the layer among the selected ones.
        adapter: Adapter of the module's type.
        handler: Preconditioner's side.
    """

    def __init__(self, number: int, adapter: LinearAdapter, handler: LayerHandler) -> None:
        self.number, self.adapter, self.handler = number, adapter, handler

    def run(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Runs the layer under capture.

        Args:
            module: The selected module.
            x: Its input.

        Returns:
            The output, or None where the plain forward must be used.
        """
        weight: Tensor = module.get_parameter("weight")
        bias: Tensor | None = module._parameters["bias"]
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return None
        batch = self.handler.begin(x.shape[0]) if x.dim() > 1 else None
        if batch is None:
            return None
        calls: list[Delivery] | None = None
        if batch.fresh:
            calls, weight, bias = self._gate(batch, weight, bias)
        x = self.adapter.prepare(x)
        if (
            self.adapter.autocast
            and torch.is_autocast_enabled(x.device.type)
            and x.dtype != torch.float64
        ):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return _WeightedLayer.apply(x, weight, bias, self, batch, calls)

    def _gate(
        self, batch: Pass, weight: Tensor, bias: Tensor | None
    ) -> tuple[list[Delivery], Tensor, Tensor | None]:
        known = batch.gates.get(self.number)
        if known is None:
            calls: list[Delivery] = []
            known = (*_Gate.apply(weight, bias, self, batch, calls), calls)
            batch.gates[self.number] = known
        return known[2], known[0], known[1]


class _Gate(torch.autograd.Function):
    """Identity on the parameters; its backward turns the collected calls into gradients."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, capture: Capture, batch: Pass, calls: list
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # No saved tensor here: recomputation by checkpointing must save as many as the original.
        ctx.capture, ctx.batch, ctx.calls = capture, batch, calls
        ctx.dtype = weight.dtype
        ctx.bias_needed = bias is not None and bias.requires_grad
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        capture, task = ctx.capture, _backward_pass()
        calls = [call for its_task, call in ctx.calls if its_task == task]
        ctx.calls.clear()
        ctx.batch.gates.pop(capture.number, None)
        if not calls:
            return None, None, None, None, None
        with torch.autocast(calls[0][0].device.type, enabled=False):
            grads = capture.handler.compute(ctx.batch, calls, ctx.bias_needed)
        return *(None if g is None else g.to(ctx.dtype) for g in grads), None, None, None


class _WeightedLayer(torch.autograd.Function):
    """The layer; the weight gradient of its backward is the weighted one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        capture: Capture,
        batch: Pass,
        calls: list[Delivery] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.capture, ctx.batch, ctx.calls = capture, batch, calls
        out = capture.adapter.forward(x, weight, bias)
        # Autograd forbids in-place activations on a Function's output that is a view.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        adapter = ctx.capture.adapter
        grad_x = adapter.input_gradient(g, x, weight) if ctx.needs_input_grad[0] else None
        if ctx.calls is not None:
            # What another backward pass left behind (it failed, or was for the input's gradient
            # only) is not part of this one.
            task = _backward_pass()
            ctx.calls[:] = [one for one in ctx.calls if one[0] == task]
            ctx.calls.append((task, (x, g, weight)))
            return grad_x, None, None, None, None, None
        g = adapter.scale_rows(g, ctx.capture.handler.weights(ctx.batch, x, g))
        grads = adapter.parameter_gradients(g, x, weight, ctx.needs_input_grad[2])
        return grad_x, *grads, None, None, None


class _Captured:
    """Mixed into the class of a selected module."""

    _original: type

    # A compiled model breaks its graph here: what follows changes with every batch.
    @torch.compiler.disable
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        inputs = (*args, *kwargs.values())
        out = getattr(self, _ATTRIBUTE).run(self, inputs[0]) if len(inputs) == 1 else None
        return super().forward(*args, **kwargs) if out is None else out  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles are plain modules of the original class, without our attribute.
        plain: Any = object.__new__(self._original)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != _ATTRIBUTE})
        # Pickle insists on the object's own class in the newer protocols.
        return plain.__reduce_ex__(0)


def attach(module: nn.Module, capture: Capture) -> None:
    """Puts a module under capture; a module that already is gets the new capture.

    Args:
        module: A module of a supported type.
        capture: Its link.
    """
    kind = type(module)
    if not isinstance(module, _Captured):
        if kind not in _SWAPPED:
            names = {"__module__": kind.__module__, "_original": kind}
            _SWAPPED[kind] = type(kind.__name__, (_Captured, kind), names)
        module.__class__ = _SWAPPED[kind]
    module.__dict__[_ATTRIBUTE] = capture


def detach(module: nn.Module) -> None:
    """Takes a module out of capture without a trace; does nothing if it is not.

    Args:
        module: Any module.
    """
    if isinstance(module, _Captured):
        module.__class__ = module._original
        del module.__dict__[_ATTRIBUTE]


def original_type(module: nn.Module) -> type:
    """Gives the class that a module has without capture.

    Args:
        module: Any module.

    Returns:
        Its class.
    """
    return module._original if isinstance(module, _Captured) else type(module)


def in_backward() -> bool:
    """Tells whether autograd is running a backward pass in this thread.

    Returns:
        True during recomputation by activation checkpointing.
    """
    return _backward_pass() != -1


def _backward_pass() -> int:
    return torch._C._current_graph_task_id()

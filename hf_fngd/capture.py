"""Taking hold of a layer's input and output gradient, and replacing its weight gradient.

A selected module's class is swapped for a subclass whose forward goes through an autograd
Function. Its backward computes the input gradient as always and a *weighted* weight gradient in
place of the plain one, so `.grad` is the preconditioned gradient before anything else (clipping,
GradScaler, DDP, accumulation) sees it. Nothing is kept on the module between steps, inputs are
saved through `save_for_backward` only, and forward passes without gradients are left alone.

Where coefficients are looked up, a call is weighted by itself. Where they are computed, the calls
of one forward meet in a gate: a node between the parameter and its calls, which autograd runs once
all of them have delivered. A module called several times is thereby one layer with the positions
of all calls, as its per-sample gradient demands. Graphs of `torch.compile` have a way of their own,
see `compiled`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_fngd.calls import to_autocast
from hf_fngd.compiled import run_in_graph
from hf_fngd.handlers import Delivery, LayerHandler, Pass
from hf_fngd.layers import LinearAdapter

_ATTRIBUTE = "_fngd_capture"
_SWAPPED: dict[type, type] = {}


class Capture:
    """The link between one module and its handler.

    Args:
        number: Number of the layer among the selected ones.
        adapter: Adapter of the module's type.
        handler: Preconditioner's side.
    """

    def __init__(self, number: int, adapter: LinearAdapter, handler: LayerHandler) -> None:
        self.number, self.adapter, self.handler = number, adapter, handler

    def leaves_alone(self, module: nn.Module, x: Tensor) -> bool:
        """Tells whether a call is none of the preconditioner's business.

        Args:
            module: The selected module.
            x: Its input.

        Returns:
            True where the plain forward must be used.
        """
        trained = torch.is_grad_enabled() and module.get_parameter("weight").requires_grad
        return not trained or x.dim() < 2 or self.handler.idle

    def run(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """Runs the layer under capture.

        Args:
            module: The selected module.
            x: Its input.

        Returns:
            The output, or None where the plain forward must be used.
        """
        batch = None if self.leaves_alone(module, x) else self.handler.begin(x.shape[0])
        if batch is None:
            return None
        weight: Tensor = module.get_parameter("weight")
        bias: Tensor | None = module._parameters["bias"]
        calls: list[Delivery] | None = None
        if batch.fresh:
            calls, weight, bias = self._gate(batch, weight, bias)
        x, weight, bias = to_autocast(self.adapter, self.adapter.prepare(x), weight, bias)
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
        capture, task = ctx.capture, backward_pass()
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
        input_needed, _, bias, *_ = ctx.needs_input_grad
        if ctx.calls is not None:
            grad_x = adapter.input_gradient(g, x, weight) if input_needed else None
            # What another backward pass left behind (it failed, or was for the input's gradient
            # only) is not part of this one.
            task = backward_pass()
            ctx.calls[:] = [one for one in ctx.calls if one[0] == task]
            ctx.calls.append((task, (x, g, weight)))
            return grad_x, None, None, None, None, None
        gamma = ctx.capture.handler.weights(ctx.batch, x, g)
        grads = adapter.weighted_gradients(g, x, weight, gamma, input_needed, bias)
        return *grads, None, None, None


class _Captured:
    """Mixed into the class of a selected module."""

    _original: type

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self._run(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        link = getattr(self, _ATTRIBUTE)
        if len(inputs) > 1 or link.leaves_alone(self, inputs[0]) or torch.compiler.is_exporting():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        numbers = link.handler.numbers()
        if numbers is None:
            return self._run(*args, **kwargs)
        return run_in_graph(self, link.adapter, numbers, inputs[0])  # type: ignore[arg-type]

    # A compiled model breaks its graph here.
    @torch.compiler.disable
    def _run(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
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
    return backward_pass() != -1


def backward_pass() -> int:
    """Numbers the backward pass that autograd is running in this thread.

    Returns:
        A number, -1 where there is none.
    """
    return torch._C._current_graph_task_id()

"""A captured layer: its weight gradient is computed by a method, everything else as always.

A selected module's class is swapped for a subclass whose forward goes through an autograd
Function. Its backward computes the input gradient as always and asks the method for the weight
gradient, so `.grad` is what the method wants before anything else (clipping, GradScaler, DDP,
accumulation) sees it. Nothing is kept on the module between steps, inputs are saved through
`save_for_backward` only, and forward passes without gradients are left alone.

In a fresh batch the calls of one forward pass meet in a gate, a node between the parameter and its
calls, which autograd runs once all of them are there. A module called several times is thereby one
layer with the positions of all calls, as its per-sample gradient demands. Where the weights are
known, each call is weighted by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_fngd.capture.batches import Batch, Delivery, backward_pass
from hf_fngd.capture.compiled import register, run_in_graph
from hf_fngd.capture.layer_method import LayerMethod
from hf_fngd.capture.watch import watch
from hf_fngd.layers.calls import Call, sum_gradients, to_autocast, without_autocast

_dynamo = torch._C._dynamo.eval_frame
_ATTRIBUTE = "_fngd_layer"
_SWAPPED: dict[type, type] = {}


def _skips(layer: LayerMethod, module: nn.Module, x: Tensor) -> bool:
    """Return True if the module's own forward should run."""
    weight = module._parameters.get("weight")
    return (
        not torch.is_grad_enabled()
        or weight is None
        or not weight.requires_grad
        or x.dim() < layer.kind.batched_dim
        or x.shape[0] == 0
    )


def _run(layer: LayerMethod, module: nn.Module, x: Tensor) -> Tensor | None:
    """Run a layer under capture; None if the module's own forward should run."""
    if (
        layer.skipped
        or not torch.is_grad_enabled()
        # The gradient goes to torch.func, not to the parameter.
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    # Not get_parameter, which takes as long as a small operator.
    weight: Tensor | None = module._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        layer.leave_out("its weight has been replaced, as by pruning, a norm or torch.func")
        return None
    if not weight.requires_grad:
        return None
    shape = x.shape
    if len(shape) < layer.kind.batched_dim:
        layer.leave_out(f"it was called with a single sample {[*shape]}, without a batch")
        return None
    if shape[0] == 0:
        return None
    batch = layer.batches.of_forward(layer, shape[0])
    if batch is None:
        return None
    bias: Tensor | None = module._parameters["bias"]
    calls: list[Delivery] | None = None
    if batch.fresh:
        if layer.number not in batch.gates:
            calls = []
            gate = _apply_gate(weight, bias, (layer, batch, calls))
            batch.gates[layer.number] = (*gate, calls)
        weight, bias, calls = batch.gates[layer.number]
    x, weight, bias = to_autocast(layer.kind.prepare(x), weight, bias)
    return _apply_call(x, weight, bias, (layer, batch, calls))


class _Gate(torch.autograd.Function):
    """Identity on the parameters; its backward turns the collected calls into gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        place: tuple[LayerMethod, Batch, list[Delivery]],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        # No saved tensor here: recomputation by checkpointing must save as many as the original.
        ctx.place = place
        ctx.dtype = weight.dtype
        ctx.bias_needed = bias is not None and bias.requires_grad
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *direct: Tensor | None) -> tuple[Tensor | None, ...]:
        (layer, batch, collected), number = ctx.place, backward_pass()
        calls = [call for its_number, call in collected if its_number == number]
        collected.clear()
        batch.gates.pop(layer.number, None)
        grads: tuple[Tensor | None, ...] = (None, None)
        if calls:
            with without_autocast(calls[0].x.device):
                if takes := layer.takes(batch, calls):
                    grads = layer.gradients(batch, calls, ctx.bias_needed)
                else:
                    grads = sum_gradients(layer.kind, calls, ctx.bias_needed)
            grads = tuple(
                grad if grad is None or grad.dtype == ctx.dtype else grad.to(ctx.dtype)
                for grad in grads
            )
            if takes:
                watch(layer, calls, grads)
        if any(one is not None for one in direct):
            # Second derivatives reach the parameters without a call.
            grads = tuple(map(_add, grads, direct))
        return *grads, None


def _add(grad: Tensor | None, direct: Tensor | None) -> Tensor | None:
    if grad is None or direct is None:
        return direct if grad is None else grad
    return grad + direct


class _CapturedCall(torch.autograd.Function):
    """One call of the layer; `place` is its layer, its batch, and what its gate collects."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        place: tuple[LayerMethod, Batch, list[Delivery] | None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        out = place[0].kind.forward(x, weight, bias)
        # Autograd forbids in-place activations on a Function's output that is a view.
        return out.data if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer, batch, calls = ctx.place
        kind = layer.kind
        input_needed, _, bias, _ = ctx.needs_input_grad
        call = Call(x, g, weight)
        if torch.is_grad_enabled():
            layer.leave_out("a backward pass with create_graph=True went through it")
        elif calls is not None:
            # Calls that another backward pass left behind (it failed, or was for the input's
            # gradient only) are not part of this one.
            number = backward_pass()
            if calls and calls[0][0] != number:
                calls.clear()
            calls.append((number, call))
            return kind.input_gradient(g, x, weight) if input_needed else None, None, None, None
        elif layer.takes(batch, [call]):
            gamma = layer.weights(batch, call)
            grads = kind.weighted_gradients(g, x, weight, gamma, input_needed, bias)
            if layer in batch.odd:
                # Another call of this batch may turn out not to have one row a sample.
                watch(layer, [call], grads[1:])
            else:
                layer.weighted_alone = backward_pass()
            return *grads, None
        grad_x = kind.input_gradient(g, x, weight) if input_needed else None
        return grad_x, *kind.gradients(g, x, weight, bias), None


# Function.apply itself looks for torch.func first, which `_run` has done.
_apply_gate, _apply_call = (
    super(torch.autograd.Function, function).apply  # type: ignore[misc]
    for function in (_Gate, _CapturedCall)
)


class _Captured:
    """Mixed into the class of a captured module."""

    _fngd_original: type

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        layer = self.__dict__.get(_ATTRIBUTE)
        if layer is None:
            # Somebody kept the method of a module that has been let go.
            return _forward_of(self)(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            # Outside compiled models there is nothing to hide from Dynamo.
            run = _run_or_leave if _dynamo.get_eval_frame_callback() is None else _run_apart
            return run(self, layer, *args, **kwargs)
        inputs = (*args, *kwargs.values())
        # Not is_exporting(), which torch 2.11 takes for true in every compiled graph.
        plain = len(inputs) > 1 or torch.compiler._is_exporting_flag
        if plain or _skips(layer, self, inputs[0]):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if layer.gated or not layer.in_graph:
            return _run_apart(self, layer, *args, **kwargs)
        return run_in_graph(self, layer.kind, layer.key, layer.batches.key, inputs[0])  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Copies and pickles are plain modules of the original class, without our attribute.
        plain: Any = object.__new__(self._fngd_original)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != _ATTRIBUTE})
        # Pickle insists on the object's own class in the newer protocols.
        return plain.__reduce_ex__(0)


def _forward_of(module: Any) -> Any:
    """Return the forward of a module's class without capture."""
    return next(c for c in type(module).__mro__ if not issubclass(c, _Captured)).forward  # type: ignore[attr-defined]


def _run_or_leave(module: Any, layer: LayerMethod, *args: Tensor, **kwargs: Tensor) -> Tensor:
    inputs = (*args, *kwargs.values())
    out = _run(layer, module, inputs[0]) if len(inputs) == 1 else None
    return _forward_of(module)(module, *args, **kwargs) if out is None else out


# A compiled model breaks its graph here.
_run_apart = torch.compiler.disable(_run_or_leave)


def attach(module: nn.Module, layer: LayerMethod) -> None:
    """Put a module under capture; a module that already is gets the new method.

    Args:
        module: A module of a supported type.
        layer: The method's part for this module.
    """
    kind = type(module)
    if not isinstance(module, _Captured):
        if kind not in _SWAPPED:
            names = {"__module__": kind.__module__, "_fngd_original": kind}
            _SWAPPED[kind] = type(kind.__name__, (_Captured, kind), names)
        module.__class__ = _SWAPPED[kind]
    if layer.in_graph and layer.key is None:
        layer.key = register(layer)
    module.__dict__[_ATTRIBUTE] = layer


def owner(module: nn.Module) -> LayerMethod | None:
    """Return the method that captures a module; None if there is none."""
    return module.__dict__.get(_ATTRIBUTE)


def detach(module: nn.Module, layer: LayerMethod | None = None) -> None:
    """Take a module out of capture without a trace; does nothing if it is not captured.

    Args:
        module: Any module.
        layer: The method that lets go; another method's capture stays. Default: whoever has it.
    """
    if isinstance(module, _Captured) and layer in (None, module.__dict__.get(_ATTRIBUTE)):
        module.__dict__.pop(_ATTRIBUTE, None)
        # A parametrization derives a class from the captured one, and undoes that itself.
        if type(module) is _SWAPPED[module._fngd_original]:
            module.__class__ = module._fngd_original

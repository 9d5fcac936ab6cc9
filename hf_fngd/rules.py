"""Update rules, applied to gradients that a method has already preconditioned.

SGD, AdamW and Muon are torch's own optimizers, so that without a preconditioner a step equals
torch.optim's bit for bit (on a CPU that of `AdamW(fused=True)`); SOAP is torch's AdamW in another
basis. Weight decay is decoupled in all of them. State is kept in float32 under bf16 and fp16
parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from hf_fngd.errors import FNGDError
from hf_fngd.soap import COUNTS, into_basis, out_of_basis, turns

# Root mean square of a typical AdamW update (Liu et al. 2025, arXiv 2502.16982, section 2.2).
ADAMW_RMS = 0.2
_RMS_EPSILON = 1e-12
# Weights of one shape that are scaled together: at least so many, of at most so many entries.
_MANY, _SMALL = 8, 2**18

# Parameters, gradients, states and the group's hyper-parameters; the first and third change.
Rule = Callable[[list[Tensor], list[Tensor], list[dict[str, Any]], dict[str, Any]], None]


def _momentum(group: dict[str, Any]) -> Any:
    """Return the momentum; OneCycleLR and CyclicLR move that of all groups in `betas`."""
    return group["betas"][0] if "max_momentum" in group else group["momentum"]


def sgd_rule(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """Step by SGD with momentum; `update_scale="rms"` sets the RMS of each tensor's update."""
    if group["weight_decay"]:
        factor = 1 - group["lr"] * group["weight_decay"]
        torch._foreach_mul_(params, factor.view(()) if isinstance(factor, Tensor) else factor)
    if group["update_scale"] == "rms":
        parts: dict[Any, list[int]] = {}
        for i, param in enumerate(params):
            # On a CPU one weight after the other, whose update is then still in the cache.
            key = i if param.device.type == "cpu" else (param.device, param.dtype)
            parts.setdefault(key, []).append(i)
        for part in parts.values():
            members, theirs = [params[i] for i in part], [grads[i] for i in part]
            _rms_sgd(members, theirs, [states[i] for i in part], group)
        return
    buffers = [state.get("momentum_buffer") for state in states]
    sgd(
        params,
        grads,
        buffers,
        weight_decay=0.0,
        momentum=_momentum(group),
        lr=group["lr"],
        dampening=0,
        nesterov=False,
        maximize=False,
        foreach=None,
    )
    for state, buffer in zip(states, buffers, strict=True):
        if buffer is not None:
            state["momentum_buffer"] = buffer


def _rms_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    updates, momentum = grads, _momentum(group)
    if momentum:
        for grad, state in zip(grads, states, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
        updates = [state["momentum_buffer"] for state in states]
        torch._foreach_mul_(updates, momentum)
        torch._foreach_add_(updates, grads)
    sizes, norms = (torch.stack(torch._foreach_norm(some)) for some in (grads, updates))
    # A weight out of use stands still: its old momentum would be stretched to full length.
    inverse = (norms.masked_fill(sizes == 0, torch.inf) + _RMS_EPSILON).reciprocal()
    lengths = [-group["lr"] * ADAMW_RMS * param.numel() ** 0.5 for param in params]
    if isinstance(group["lr"], Tensor):
        factors = [factor * length for factor, length in zip(inverse, lengths, strict=True)]
    else:
        factors = list(torch._foreach_mul(inverse.unbind(), lengths))
    _add_scaled(params, updates, factors)


def _add_scaled(params: list[Tensor], updates: list[Tensor], factors: list[Tensor]) -> None:
    """Add a factor times the update to each parameter; `params` have one device and dtype."""
    alike: dict[torch.Size, list[int]] = {}
    for i, param in enumerate(params):
        alike.setdefault(param.shape, []).append(i)
    for shape, members in alike.items():
        some, theirs, scales = ([all_[i] for i in members] for all_ in (params, updates, factors))
        if len(members) < _MANY or shape.numel() > _SMALL:
            torch._foreach_addcmul_(some, theirs, scales)
            continue
        # A launch for each costs a GPU more than the copy.
        columns = torch.stack(scales).view(-1, *[1] * len(shape))
        torch._foreach_add_(some, list(torch.stack(theirs).mul_(columns).unbind()))


def step_device(param: Tensor) -> torch.device:
    """Return where AdamW counts the steps of a parameter: fused kernels need them on the GPU."""
    on_gpu = param.device.type == "cuda" and param.is_floating_point()
    return param.device if on_gpu else torch.device("cpu")


def _may_fuse(param: Tensor, grad: Tensor, buffers: tuple[Tensor, Tensor]) -> bool:
    """Return whether AdamW's fused kernel is right; elsewhere torch chooses.

    It goes through memory whatever the strides.
    """
    if param.device.type not in ("cpu", "cuda") or param.is_complex():
        return False
    tensors = (param, grad, *buffers)
    return all(map(Tensor.is_contiguous, tensors)) or (
        param.dim() == 4
        and all(one.is_contiguous(memory_format=torch.channels_last) for one in tensors)
    )


def adamw_rule(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """Step by AdamW (Loshchilov & Hutter 2019)."""
    for param, state in zip(params, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=step_device(param))
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
    buffers = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
    fused = all(map(_may_fuse, params, grads, buffers))
    adamw(
        params,
        grads,
        [first for first, _ in buffers],
        [second for _, second in buffers],
        [],
        [state["step"] for state in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        foreach=None,
        fused=fused or None,
        # Steps that are counted on the GPU, for kernels that are not fused.
        capturable=not fused and states[0]["step"].device.type == "cuda",
    )


def muon_rule(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """Step by Muon, with Nesterov momentum; a convolution's weight is a matrix `[d_out, rest]`."""
    # Not always views: a channels-last weight is copied, and written back below.
    flat = [p.detach().reshape(len(p), -1) for p in params]
    momentum = _momentum(group)
    # The functional form is private in torch and its arguments change, the class is not.
    muon = torch.optim.Muon(
        flat,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum=momentum,
        nesterov=momentum > 0,
        adjust_lr_fn="match_rms_adamw" if group["update_scale"] == "rms" else "original",
    )
    for matrix, grad, state in zip(flat, grads, states, strict=True):
        matrix.grad = grad.reshape(len(grad), -1)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        muon.state[matrix] = state
    # Hooks of steps are for the optimizer that the user has made.
    inspect.unwrap(type(muon).step)(muon)
    for param, matrix in zip(params, flat, strict=True):
        if matrix.data_ptr() != param.data_ptr():
            param.copy_(matrix.view_as(param))


def soap_rule(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """Step by AdamW, in the basis of `hf_fngd.soap` where a parameter has one."""
    turning = [turns(param) for param in params]

    def part(all_: list[Any], wanted: bool) -> list[Any]:
        return [one for one, turned in zip(all_, turning, strict=True) if turned == wanted]

    if not all(turning):
        adamw_rule(part(params, False), part(grads, False), part(states, False), group)
    some, own = part(params, True), part(states, True)
    if not some:
        return
    beta2 = group["betas"][1]
    turned = [
        into_basis(grad, state, beta2) for grad, state in zip(part(grads, True), own, strict=True)
    ]
    # What AdamW adds to nothing is the step.
    steps = [torch.zeros_like(one) for one in turned]
    adamw_rule(steps, turned, own, {**group, "weight_decay": 0.0})
    for param, step, state in zip(some, steps, own, strict=True):
        if group["weight_decay"]:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(out_of_basis(step, state).view_as(param))


RULES: dict[str, Rule] = {
    "sgd": sgd_rule,
    "adamw": adamw_rule,
    "muon": muon_rule,
    "soap": soap_rule,
}


# As they are written in messages.
NAMES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "soap": "SOAP"}


def working_dtype(param: Tensor) -> torch.dtype:
    """Return the precision of a parameter's update and of its state."""
    return torch.promote_types(param.dtype, torch.float32)


def place(key: str, value: Any, param: Tensor) -> Any:
    """Bring a part of a loaded state to where the rules look for it.

    Args:
        key: Name of the part.
        value: Its value.
        param: The parameter.

    Returns:
        A copy with the right device and precision, or a whole number.
    """
    if key in COUNTS:
        return int(value)
    counts = key == "step"
    device = step_device(param) if counts else param.device
    dtype = torch.float32 if counts else working_dtype(param)
    return torch.as_tensor(value, dtype=dtype, device=device).detach().clone()


def apply_rule(
    rule: str,
    params: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """Update parameters by their gradients; low-precision ones through a float32 copy.

    Args:
        rule: Name of the rule.
        params: Parameters with gradients, updated in place.
        states: Their optimizer states, updated in place.
        group: Hyper-parameters.

    Raises:
        FNGDError: For a sparse gradient.
    """
    if any(p.grad is not None and p.grad.is_sparse for p in params):
        raise FNGDError(
            "a parameter has a sparse gradient, which these update rules cannot take: make its "
            "embedding with sparse=False"
        )
    work = [_cast(p, working_dtype(p)) for p in params]
    grads = [_cast(p.grad, w.dtype) for p, w in zip(params, work, strict=True)]
    RULES[rule](work, grads, states, group)
    for param, result in zip(params, work, strict=True):
        if result is not param:
            param.copy_(result)


def _cast(tensor: Any, dtype: torch.dtype) -> Tensor:
    # Tensor.to takes as long as a small operator even where it has nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

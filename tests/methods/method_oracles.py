"""Oracles of the comparison methods: a layer's rows by loops, dense curvature, directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd.methods import METHODS, create_preconditioned_optimizer

DAMPING = 0.3


def make(model: nn.Module, method: str, lr: float = 0.0, **settings: Any) -> Any:
    """Make an optimizer that leaves its directions in `.grad`, in their full length."""
    defaults: dict[str, Any] = {"momentum": 0.0}
    if method != "plain":
        defaults |= {"damping": DAMPING, "damping_mode": "absolute"}
    if method in ("tengrad", "seng", "kfac", "ekfac", "eva"):
        defaults |= {"kl_clip": None, "fisher_labels": "empirical"}
    if method == "fngd":
        defaults["share"] = "none"
    if method == "seng":
        defaults["sketch_size"] = 0
    known = METHODS[method].config_class.__dataclass_fields__
    assert settings.keys() <= known.keys(), settings
    return create_preconditioned_optimizer(model, method=method, lr=lr, **defaults | settings)


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Take one step; the directions are in `.grad` afterwards."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def record(layer: nn.Module) -> list[list[Tensor]]:
    """Collect input and output gradient of every call of a plain layer."""
    calls: list[list[Tensor]] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        call = [inputs[0].detach()]
        calls.append(call)
        out.register_hook(lambda g: call.append(g.detach()))

    layer.register_forward_hook(hook)
    return calls


def rows(layer: nn.Module, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return inputs `[N, T, d_in]` (a last 1 for the bias) and gradients of each channel group."""
    if isinstance(layer, nn.Conv2d):
        pairs = _patches(layer, x, g)
    else:
        pairs = [(x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1]))]
    if layer.bias is None:
        return pairs
    return [(torch.cat([a, torch.ones_like(a[..., :1])], 2), b) for a, b in pairs]


def _patches(layer: nn.Conv2d, x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    n, _, height, width = g.shape
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if isinstance(layer.padding, str):
        needed = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        needed = [p if layer.padding == "same" else 0 for p in needed]
        sides = [(p // 2, p - p // 2) for p in needed]
    else:
        sides = [(p, p) for p in layer.padding]
    x = nn.functional.pad(x, (*sides[1], *sides[0]), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    pairs = []
    for a, b in zip(x.chunk(layer.groups, 1), g.chunk(layer.groups, 1), strict=True):
        patches = [
            a[:, :, i * sh : i * sh + dh * (kh - 1) + 1 : dh][
                ..., j * sw : j * sw + dw * (kw - 1) + 1 : dw
            ].reshape(n, -1)
            for i in range(height)
            for j in range(width)
        ]
        pairs.append((torch.stack(patches, 1), b.flatten(2).transpose(1, 2)))
    return pairs


def blocks(layer: nn.Module, read: Callable[[Tensor], Tensor] = lambda p: p.grad) -> list[Tensor]:
    """Return the gradient `[d_out, d_in]` of each channel group, with the bias as last column."""
    weight = read(layer.weight)
    if isinstance(layer, Conv1D):
        weight = weight.t()
    groups = getattr(layer, "groups", 1)
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    if layer.bias is not None:
        matrix = torch.cat([matrix, read(layer.bias).reshape(groups, -1, 1)], 2)
    return [one.clone() for one in matrix]


def factors(
    pairs: list[tuple[Tensor, Tensor]], kappa: float, approx: str, padded: bool
) -> list[tuple[Tensor, Tensor]]:
    """Compute KFAC's A and G of each group, by loops over samples and positions."""
    found = []
    for a, g in pairs:
        n, t, _ = a.shape
        g = g * kappa
        lives = [
            [not padded or t == 1 or bool(g[i, j].abs().sum() > 0) for j in range(t)]
            for i in range(n)
        ]
        kept = [[a[i, j] for j in range(t) if lives[i][j]] for i in range(n)]
        if approx == "expand":
            inputs = [one for sample in kept for one in sample]
            gradients = [g[i, j] for i in range(n) for j in range(t)]
        else:
            inputs = [
                torch.stack(sample).mean(0) if sample else torch.zeros_like(a[0, 0])
                for sample in kept
            ]
            gradients = [g[i].sum(0) for i in range(n)]
        first = sum(torch.outer(x, x) for x in inputs) / len(inputs)
        second = sum(torch.outer(y, y) for y in gradients) / n
        found.append((first, second))
    return found


def kfac_unit(pairs: list[tuple[Tensor, Tensor]], n: float) -> float:
    """Return the unit of relative damping: tr(A)tr(G)/N over all groups."""
    return float(sum(a.trace() * g.trace() for a, g in pairs)) / n


def solve_dense(curvature: Tensor, damping: float, m: Tensor) -> Tensor:
    """Return λ·curvature⁻¹ vec(M), where the curvature holds its damping already."""
    return (damping * torch.linalg.solve(curvature, m.reshape(-1))).view_as(m)


def kfac_direction(
    a: Tensor, g: Tensor, damping: float, m: Tensor, solver: str = "eigen"
) -> Tensor:
    """Compute V of one group by a dense solve."""
    eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
    if solver == "eigen":
        shifted = torch.kron(g, a) + damping * torch.kron(eye_g, eye_a)
    else:
        balance = float((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
        root = damping**0.5
        shifted = torch.kron(g + root / balance * eye_g, a + root * balance * eye_a)
    return solve_dense(shifted, damping, m)

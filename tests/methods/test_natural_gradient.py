"""One step moves a selected layer by exactly -λ(λI + UUᵀ/N)⁻¹M, U from a loop over samples."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import create_fngd_optimizer
from tests.helpers import (
    gram_route,
    natural_gradient,
    padded_tokens,
    sample_gradients,
    tiny_gpt2,
    tiny_marian,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
DAMPING = 0.3
N = 4
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 5), (N, 3)),
    "linear without bias": (lambda: nn.Linear(3, 5, bias=False), (N, 3)),
    "linear tokens": (lambda: nn.Linear(3, 5), (N, 6, 3)),
    "linear tokens without bias": (lambda: nn.Linear(3, 5, bias=False), (N, 6, 3)),
    "linear 4d": (lambda: nn.Linear(3, 2), (N, 2, 3, 3)),
    "conv1d": (lambda: Conv1D(5, 3), (N, 3)),
    "conv1d tokens": (lambda: Conv1D(5, 3), (N, 6, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (N, 2, 5, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, (1, 3), bias=False), (N, 2, 5, 6)),
    "conv2d one pixel": (lambda: nn.Conv2d(2, 3, 3), (N, 2, 3, 3)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (N, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (N, 4, 4, 4)),
    "stride dilation": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
        (N, 2, 7, 6),
    ),
    "patches": (lambda: nn.Conv2d(2, 3, 2, stride=2), (N, 2, 6, 6)),
    "same": (lambda: nn.Conv2d(2, 2, 3, padding="same", dilation=2), (N, 2, 6, 5)),
    "same odd": (lambda: nn.Conv2d(2, 2, (2, 4), padding="same"), (N, 2, 6, 5)),
    "valid": (lambda: nn.Conv2d(2, 2, 3, padding="valid"), (N, 2, 6, 5)),
} | {
    f"{mode} padding {padding}": (
        lambda mode=mode, padding=padding: nn.Conv2d(
            2, 2, (4, 3), padding=padding, padding_mode=mode, groups=2
        ),
        (N, 2, 6, 7),
    )
    for mode in ("reflect", "replicate", "circular")
    for padding in ((2, 1), "same")
}


class Wrapped(nn.Module):
    """The layer within a model whose loss has a share for every sample or position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before = nn.Identity()
        self.layer = layer

    def shares(self, x: Tensor, per_token: bool = False) -> Tensor:
        out = self.layer(self.before(x))
        if isinstance(self.layer, nn.Conv2d):
            out = out.movedim(1, -1)
        out = out.flatten(0, -2) if per_token else out.flatten(1)
        weights = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)
        return (out * weights).sum(1).sin() / len(out)


def case(name: str) -> tuple[Wrapped, Tensor]:
    build, shape = LAYERS[name]
    return Wrapped(build()).double(), torch.randn(shape, dtype=torch.float64)


def displacement(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    route: str = "auto",
    workspace: int | None = None,
    **settings: object,
) -> dict[str, Tensor]:
    """Return how far one plain SGD step of length 1 moves each parameter."""
    optimizer = create_fngd_optimizer(
        model,
        lr=1.0,
        **{
            "damping": DAMPING,
            "damping_mode": "absolute",
            "share": "none",
            "update_rule": "sgd",
            "update_scale": "none",
            "momentum": 0.0,
        }
        | settings,
    )
    if workspace is not None:
        optimizer.config.gram_memory_mb = workspace
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with gram_route(route):
        loss().backward()
    optimizer.step()
    numbers = optimizer.statistics()
    assert numbers["nonfinite"] == numbers["fallbacks"] == 0
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("route", "workspace"),
    [("auto", None), ("direct", None), ("direct", 0), ("hadamard", None), ("hadamard", 0)],
    ids=["auto", "direct", "direct-chunked", "hadamard", "hadamard-blocked"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_samples(name: str, route: str, workspace: int | None) -> None:
    model, x = case(name)
    u = sample_gradients(lambda i: model.shares(x)[i], list(model.layer.parameters()), N)
    expected = natural_gradient(u, DAMPING)
    moved = displacement(model, lambda: model.shares(x).sum(), route=route, workspace=workspace)
    for found, wanted in zip(moved.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)
    # The weighting must matter, or this test would pass for plain SGD.
    assert not torch.allclose(expected[0], u[0].mean(0), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["linear tokens", "conv1d tokens", "groups", "same odd"])
def test_damping_goes_to_the_plain_gradient(name: str) -> None:
    model, x = case(name)
    plain = torch.autograd.grad(model.shares(x).sum(), list(model.layer.parameters()))
    moved = displacement(model, lambda: model.shares(x).sum(), damping=1e12)
    for found, wanted in zip(moved.values(), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_accumulation_is_part_of_the_scale() -> None:
    # Two micro-batches, loss divided by two: each is weighted by its own Gram matrix at its own λ.
    model, x = case("linear tokens")
    y = torch.randn_like(x)
    expected = [torch.zeros_like(p) for p in model.layer.parameters()]
    for part in (x, y):
        u = sample_gradients(
            lambda i, part=part: model.shares(part)[i], list(model.layer.parameters()), N
        )
        for total, piece in zip(expected, natural_gradient(u, DAMPING), strict=True):
            total += piece / 2
    optimizer = create_fngd_optimizer(
        model, lr=1.0, damping=DAMPING, damping_mode="absolute", share="none", momentum=0.0
    )
    optimizer.set_loss_scale(micro_batches=2)
    for part in (x, y):
        (model.shares(part).sum() / 2).backward()
    for parameter, wanted in zip(model.layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, **EXACT)


# ---- whole models ------------------------------------------------------------------------------


def translation() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor], int]:
    source, mask = padded_tokens([5, 2, 7, 4])
    target, target_mask = padded_tokens([3, 6, 4, 2])
    labels = target.masked_fill(target_mask == 0, -100)

    def share(model: nn.Module, rows: slice) -> Tensor:
        logits = model(
            input_ids=source[rows], attention_mask=mask[rows], decoder_input_ids=target[rows]
        ).logits
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[rows].flatten(), reduction="sum"
        )
        return loss / target_mask.sum()

    return tiny_marian().double().eval(), share, len(source)


def language_model() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor], int]:
    tokens, mask = padded_tokens([5, 2, 7, 4])
    labels = tokens.masked_fill(mask == 0, -100)

    def share(model: nn.Module, rows: slice) -> Tensor:
        logits = model(input_ids=tokens[rows], attention_mask=mask[rows]).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[rows, 1:].flatten(), reduction="sum"
        )
        return loss / mask[:, 1:].sum()

    return tiny_gpt2().double().eval(), share, len(tokens)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("task", [translation, language_model])
def test_every_layer_of_a_transformer(task: Callable, relative: bool) -> None:
    model, share, count = task()
    plain = copy.deepcopy(model)
    mode = "relative" if relative else "absolute"
    optimizer = create_fngd_optimizer(
        model, lr=1.0, damping=1e-2, damping_mode=mode, share="none", momentum=0.0
    )
    share(model, slice(None)).backward()
    chosen = optimizer.layer_names
    assert len(chosen) >= 8
    for path in chosen:
        layer = plain.get_submodule(path)
        parameters = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
        u = sample_gradients(lambda i: share(plain, slice(i, i + 1)), parameters, count)
        expected = natural_gradient(u, 1e-2, relative)
        attached = model.get_submodule(path)
        found = [attached.weight.grad] + ([attached.bias.grad] if layer.bias is not None else [])
        for first, second in zip(found, expected, strict=True):
            torch.testing.assert_close(first, second, **EXACT)
    # Everything else keeps its plain gradient.
    share(plain, slice(None)).backward()
    for name, parameter in plain.named_parameters():
        if name.rpartition(".")[0] not in chosen:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, **EXACT)

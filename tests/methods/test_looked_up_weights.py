"""Weights that are looked up weight the parameters' gradients, and the input's not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import create_fngd_optimizer
from tests.helpers import sample_gradients

N = 4
GAMMA = torch.tensor([0.25, 3.0, -1.0, 0.0])
# The weights may be put on inputs or on output gradients: either side may be the narrow one.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "narrow input": (lambda: nn.Linear(3, 5, bias=False), (N, 6, 3)),
    "narrow output": (lambda: nn.Linear(5, 3, bias=False), (N, 6, 5)),
    "rows": (lambda: nn.Linear(3, 5, bias=False), (N, 3)),
    "bias": (lambda: nn.Linear(3, 5), (N, 6, 3)),
    "conv1d": (lambda: Conv1D(5, 3), (N, 6, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, bias=False), (N, 2, 5, 6)),
    "conv2d bias": (lambda: nn.Conv2d(2, 3, 3), (N, 2, 5, 6)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (N, 4, 5, 5)),
    "stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (N, 2, 7, 6)),
    "reflect": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False),
        (N, 2, 5, 5),
    ),
}


def shares(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer(x).flatten(1)
    return (out * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).sum(1).sin() / N


def backward(layer: nn.Module, x: Tensor, compiled: bool) -> tuple[list[Tensor | None], Tensor]:
    """Return the gradients of parameters and input, with GAMMA known for the rows of the batch."""
    model = nn.ModuleDict({"layer": layer})
    optimizer = create_fngd_optimizer(model, lr=0.0, target_modules="layer")
    store = optimizer.store
    store.write(store.locate(range(N), create=True), GAMMA.unsqueeze(1))
    optimizer.start_epoch(1)
    optimizer.set_batch(range(N))
    if compiled:
        layer.compile(backend="aot_eager")
    x = x.clone().requires_grad_()
    shares(layer, x).sum().backward()
    assert optimizer.statistics()["phase"] == "reuse"
    return [p.grad for p in layer.parameters()], x.grad


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_weighted_samples(name: str, compiled: bool) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    probe = x.clone().requires_grad_()
    (of_input,) = torch.autograd.grad(shares(plain, probe).sum(), probe)
    parameters = list(plain.parameters())
    u = sample_gradients(lambda i: shares(plain, x)[i], parameters, N)
    found, found_input = backward(layer, x, compiled)
    for one, rows in zip(found, u, strict=True):
        expected = torch.einsum("n,n...->...", GAMMA.double(), rows) / N
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_input, of_input, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["bias", "conv2d bias"])
def test_a_frozen_bias_gets_none(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    (weight, bias), _ = backward(copy.deepcopy(layer), x, compiled=False)
    assert bias is not None
    layer.bias.requires_grad_(False)
    (alone, none), _ = backward(layer, x, compiled=False)
    assert none is None
    torch.testing.assert_close(alone, weight, rtol=1e-10, atol=1e-12)

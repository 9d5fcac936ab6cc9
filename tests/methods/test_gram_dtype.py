"""gram_dtype=bfloat16: products within its precision, sums and gradients in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import create_fngd_optimizer
from hf_fngd.solve.gram import sample_gram
from tests.helpers import gram_route

# Of a product of two roundings, each to 8 bits.
TOLERANCE = 2.0**-6
LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (6, 4, 7)),
    "conv1d": (lambda: Conv1D(5, 7), (6, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (6, 4, 6, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (6, 4, 6, 6)),
}
SETTINGS = {
    "chosen route": {},
    "direct": {"route": "direct"},
    "hadamard": {"route": "hadamard"},
    "leave one out": {"leave_one_out": True},
}


def gradients(layer: nn.Module, x: Tensor, route: str = "auto", **settings: object) -> list[Tensor]:
    """Return the gradients of a layer's parameters."""
    torch.manual_seed(1)
    weights = torch.randn(layer(x).shape, dtype=x.dtype)
    optimizer = create_fngd_optimizer(
        nn.ModuleDict({"layer": layer}),
        lr=0.0,
        target_modules="layer",
        share="none",
        **settings,
    )
    with gram_route(route):
        (layer(x) * weights).sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    optimizer.zero_grad()
    optimizer.detach()
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_coefficients_are_rounded_and_gradients_are_not(
    name: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    for damping in (1.0, 1e12):
        full = gradients(layer, x, damping=damping, **settings)
        low = gradients(layer, x, damping=damping, gram_dtype="bfloat16", **settings)
        for one, other in zip(full, low, strict=True):
            assert other.dtype is torch.float64
            if damping == 1.0:
                assert not torch.equal(one, other)
                assert (one - other).norm() < TOLERANCE * one.norm()
            else:
                # Every coefficient is 1.
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ["direct", "hadamard"])
def test_sums_go_beyond_what_bfloat16_can_count(route: str) -> None:
    # Its ones stop adding up at 256; 1003 is not among its numbers.
    a = torch.ones(1, 2, 1, 1, dtype=torch.bfloat16)
    g = torch.ones(1, 2, 1, 1003, dtype=torch.bfloat16)
    if route == "hadamard":
        a, g = torch.ones(1003, 2, 1, 1).bfloat16(), torch.ones(1003, 2, 1, 1).bfloat16()
    found = sample_gram(a, g, bias=False, route=route, memory_bytes=4)
    assert found.matrix.dtype is torch.float32
    assert found.matrix.tolist() == [[1003.0] * 2] * 2


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
def test_auto_takes_the_precision_of_the_gradients(autocast: torch.dtype | None) -> None:
    results = []
    for dtype in ("auto", "bfloat16", "float32"):
        torch.manual_seed(0)
        layer, x = nn.Linear(7, 5), torch.randn(6, 4, 7)
        optimizer = create_fngd_optimizer(
            nn.ModuleDict({"layer": layer}),
            lr=0.0,
            target_modules="layer",
            share="none",
            gram_dtype=dtype,
            damping=0.1,
        )
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            layer(x).float().square().mean().backward()
        assert layer.weight.grad.dtype is torch.float32
        results.append(layer.weight.grad.clone())
        optimizer.detach()
    auto, low, full = results
    assert torch.equal(auto, low if autocast is torch.bfloat16 else full)
    assert not torch.equal(low, full)
    assert (low - full).norm() < TOLERANCE * full.norm()

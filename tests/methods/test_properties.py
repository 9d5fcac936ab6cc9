"""Random layers and random orders of events: the oracle and the invariants hold for all of them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import create_fngd_optimizer
from tests.helpers import assert_same, gradients, gram_route, natural_gradient, sample_gradients

# The same examples every time: CI must not depend on chance.
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
sizes = st.integers(1, 5)


@st.composite
def linear(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    d_in, d_out = draw(sizes), draw(sizes)
    places = tuple(draw(st.lists(sizes, max_size=2)))
    if draw(st.booleans()):
        return Conv1D(d_out, d_in), (*places, d_in)
    return nn.Linear(d_in, d_out, bias=draw(st.booleans())), (*places, d_in)


@st.composite
def convolution(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    kernel, stride, dilation = (
        tuple(draw(st.integers(1, high)) for _ in range(2)) for high in (3, 2, 2)
    )
    padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(2))
    if stride == (1, 1) and draw(st.booleans()):
        padding = draw(st.sampled_from(["same", "valid"]))
    layer = nn.Conv2d(
        *channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        # Other modes cannot pad by more than the image is wide.
        padding_mode=draw(st.sampled_from(["zeros", "replicate"])),
    )
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    return layer, (channels[0], *(low + draw(st.integers(0, 3)) for low in least))


def shares(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Return every sample's share of the loss; masked outputs, like padding, have none."""
    out = layer(x)
    return ((out + out.sin()).square() * mask).flatten(1).sum(1) / len(x)


@pytest.mark.slow
@settings(max_examples=2000, **RELAXED)
@given(
    which=st.one_of(linear(), convolution()),
    count=st.integers(1, 6),
    kept=st.sampled_from([1.0, 0.7, 0.3]),
    route=st.sampled_from(["auto", "direct", "hadamard"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    damping=st.sampled_from([0.01, 0.3, 10.0]),
    relative=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 1e2]),
    seed=st.integers(0, 2**16),
)
def test_any_layer_has_its_natural_gradient(
    which: tuple[nn.Module, tuple[int, ...]],
    count: int,
    kept: float,
    route: str,
    dtype: torch.dtype,
    damping: float,
    relative: bool,
    size: float,
    seed: int,
) -> None:
    layer, shape = copy.deepcopy(which[0]), which[1]
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    layer = layer.double()
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64) * size
    mask = torch.rand(layer(x).shape, generator=generator) < kept
    parameters = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    u = sample_gradients(lambda i: shares(layer, x, mask)[i], parameters, count)
    plain = [part.mean(0) for part in u]
    if not relative:  # in the scale of the problem, or nothing would be tested
        damping *= float(sum((part * part).sum() for part in u)) / count**2 or 1.0
    expected = natural_gradient(u, damping, relative) if any(p.any() for p in plain) else plain
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    optimizer = create_fngd_optimizer(
        model,
        lr=0.1,
        damping=damping,
        damping_mode="relative" if relative else "absolute",
        share="none",
    )
    with gram_route(route):
        shares(model, x.to(dtype), mask).sum().backward()
    assert optimizer.statistics()["gram_seconds"] > 0
    found = [model[0].weight.grad] + ([model[0].bias.grad] if len(parameters) > 1 else [])
    scale = max(float(part.abs().max()) for part in (*plain, *expected))
    tight = dtype is torch.float64
    for first, second in zip(found, expected, strict=True):
        torch.testing.assert_close(
            first.double(),
            second,
            rtol=1e-8 if tight else 1e-2,
            atol=scale * (1e-10 if tight else 1e-3),
        )


ROWS, BATCH = 12, 4


class Training(RuleBasedStateMachine):
    """Two runs get the same events; one of them also loses its process now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = torch.randn(ROWS, 3, 4)
        self.run = self._new()
        self.twin = self._new()
        self.epoch, self.place, self.partial = 0, 0, 0

    def _new(self) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 2))
        return [model, self._optimizer(model)]

    @staticmethod
    def _optimizer(model: nn.Module) -> Any:
        return create_fngd_optimizer(
            model, lr=0.05, damping=0.1, refresh_every=3, update_rule="adamw"
        )

    def both(self) -> list[list[Any]]:
        return [self.run, self.twin]

    @rule()
    def micro_batch(self) -> None:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.epoch))
        rows = order[self.place : self.place + BATCH]
        self.place = (self.place + BATCH) % ROWS
        for model, optimizer in self.both():
            optimizer.set_batch(rows)
            (model(self.inputs[rows]).square().mean() / 2).backward()
        self.partial += 1

    @precondition(lambda self: self.partial)
    @rule()
    def step(self) -> None:
        for _, optimizer in self.both():
            optimizer.step()
            optimizer.zero_grad()
            # Whatever was announced, nothing is kept beyond the step.
            assert not optimizer._unwritten and optimizer.batches.current is None
        self.partial = 0

    @precondition(lambda self: not self.partial)
    @rule()
    def next_epoch(self) -> None:
        self.epoch, self.place = self.epoch + 1, 0
        for _, optimizer in self.both():
            optimizer.start_epoch(self.epoch)

    @rule()
    def evaluate(self) -> None:
        for model, _ in self.both():
            model.eval()
            with torch.no_grad():
                model(self.inputs[:3])
            model.train()

    @rule()
    def save(self) -> None:
        before = gradients(self.run[0])
        self.run[1].state_dict()
        assert_same(gradients(self.run[0]), before)

    @rule()
    def forward_without_backward(self) -> None:
        for model, optimizer in self.both():
            optimizer.set_batch(range(3))
            model(self.inputs[:3])

    @precondition(lambda self: not self.partial)
    @rule()
    def killed_and_resumed(self) -> None:
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in self.run], buffer)
        buffer.seek(0)
        weights, state = torch.load(buffer, weights_only=True)
        self.run = self._new()
        self.run[0].load_state_dict(weights)
        self.run[1].load_state_dict(state)

    @invariant()
    def same_bits(self) -> None:
        assert_same(self.run[0].state_dict(), self.twin[0].state_dict())
        for model, optimizer in self.both():
            store = optimizer.store
            assert all(p.isfinite().all() for p in model.parameters())
            assert not store.table[store.known].isnan().any()


TestTraining = pytest.mark.slow(Training.TestCase)
TestTraining.settings = settings(max_examples=40, stateful_step_count=40, **RELAXED)

"""Each layer's gradient is natural or plain, never a mixture: random models and random loops.

A model is a chain of random parts: layers that see one row a sample, and layers that are turned,
flattened, called twice, called aside, or whose weight is used beside its module. The oracle of each
step is a loop over single samples in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGD, create_fngd_optimizer
from tests.helpers import natural_gradient, sample_gradients

WIDTH = 3
DAMPING = 0.1
# Far from a mixture, which differs by far more, and above the rounding of stored coefficients.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}
STORED = {"rtol": 1e-5, "atol": 1e-7}


class Part(nn.Module):
    """A residual part with one selected layer; inputs and outputs are `[N, T, WIDTH]`."""

    # Whether the layer's gradient can be natural at all.
    may_be_natural = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def part(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.part(x))


class Pooled(Part):
    def part(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1)).unsqueeze(1)


class Twice(Part):
    def part(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class Checkpointed(Part):
    def part(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False)


class Aside(Part):
    """As DoRA does it: a call on other rows, whose result has no gradient."""

    def part(self, x: Tensor) -> Tensor:
        size = self.linear(torch.eye(WIDTH).to(x)).detach().norm()
        return self.linear(x) / (1 + size)


class Turned(Part):
    may_be_natural = False

    def part(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


class Flat(Part):
    may_be_natural = False

    def part(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view_as(x)


class Mixed(Part):
    """A call with one row a sample and another one without."""

    may_be_natural = False

    def part(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.linear(x.reshape(-1, WIDTH)).view_as(x)


class Tied(Part):
    may_be_natural = False

    def part(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.linear(x)), self.linear.weight.t())


class Penalised(Part):
    """A second derivative: the gradient of the part's own output enters the output."""

    may_be_natural = False

    def part(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.linear(x)
        inner = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.linear(inner).tanh().sum(), inner, create_graph=True)
        return self.linear(x) + slope


PARTS = [
    Part,
    Pooled,
    Twice,
    Checkpointed,
    Aside,
    Turned,
    Flat,
    Mixed,
    Tied,
    Penalised,
]


def build(parts: list[type[Part]]) -> nn.Sequential:
    return nn.Sequential(*(part() for part in parts)).double()


def shares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean((1, 2)) / len(x)


def plain_and_natural(
    model: nn.Sequential, part: int, x: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of one part's weight and bias, and its per-sample gradients `[N, size]`."""
    parameters = [*model[part].linear.parameters()]
    u = sample_gradients(lambda i: shares(model, x[i : i + 1])[0] / len(x), parameters, len(x))
    flat = torch.cat([one.flatten(1) for one in u], 1)
    return [one.mean(0) for one in u], natural_gradient(u, DAMPING, relative=True), flat


def weighted(flat: Tensor, gamma: Tensor) -> Tensor:
    return gamma @ flat / len(gamma)


steps = st.tuples(
    st.integers(2, 5),  # samples
    st.sampled_from([2, 3, 4, 5]),  # positions
    st.sampled_from(["plain", "plain", "accumulated", "scaled", "extra", "failed", "evaluated"]),
)


@pytest.mark.feature("Layers that see other rows than samples", "works", "found, left out, named")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.lists(steps, min_size=2, max_size=5),
    st.integers(0, 999),
)
def test_natural_or_plain(
    parts: list[type[Part]], loop: list[tuple[int, int, str]], seed: int
) -> None:
    torch.manual_seed(seed)
    model = build(parts)
    twin = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=DAMPING, share="none")
    for samples, positions, accident in loop:
        micro_batches = 2 if accident == "accumulated" else 1
        scale = 2.0**10 if accident == "scaled" else 1.0
        batches = [torch.randn(samples, positions, WIDTH).double() for _ in range(micro_batches)]
        optimizer.zero_grad()
        if accident == "failed":
            with pytest.raises(ZeroDivisionError):
                backward_that_fails(model, optimizer, batches[0])
            optimizer.zero_grad()
        for x in batches:
            optimizer.set_batch(range(samples))
            if accident == "extra":
                model(torch.randn(samples + 1, positions, WIDTH).double())
            if accident == "evaluated":
                with torch.no_grad():
                    model(x[:1])
            (shares(model, x).sum() * scale / micro_batches).backward()
        for number, part in enumerate(parts):
            check(model, twin, number, part, batches, scale * 1.0)
        optimizer.step()


def backward_that_fails(model: nn.Module, optimizer: FNGD, x: Tensor) -> None:
    optimizer.set_batch(range(len(x)))
    out = model(x)
    out.register_hook(lambda g: 1 / 0)
    out.sum().backward()


def check(
    model: nn.Sequential,
    twin: nn.Sequential,
    number: int,
    part: type[Part],
    batches: list[Tensor],
    scale: float,
) -> None:
    found = [parameter.grad / scale for parameter in model[number].linear.parameters()]
    sums = [[0.0, 0.0], [0.0, 0.0]]
    for x in batches:
        plain, natural, _ = plain_and_natural(twin, number, x)
        for total, parts in zip(sums, (plain, natural), strict=True):
            for place, value in enumerate(parts):
                total[place] = total[place] + value / len(batches)
    plain, natural = sums
    is_plain = all(torch.allclose(a, b, **CLOSE) for a, b in zip(found, plain, strict=True))
    is_natural = all(torch.allclose(a, b, **CLOSE) for a, b in zip(found, natural, strict=True))
    assert is_plain or (is_natural and part.may_be_natural), part.__name__

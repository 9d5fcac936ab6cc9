"""A step that computes no curvature or coefficients never waits for the GPU; others are counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests.cuda.common import (
    CUDA,
    DEVICE,
    LAYERS,
    ROWS,
    VARIANTS,
    Net,
    epochs,
    make,
    only_on_gpu,
    step,
    waiting,
)

pytestmark = CUDA
# Methods whose later steps have nothing to read back.
LATER = [
    "fngd sgd",
    "fngd sgd unscaled",
    "fngd adamw",
    "fngd muon",
    "fngd layer",
    "plain sgd",
    "plain rms",
    "plain adamw",
    "plain muon",
]
CURVATURE = [
    "kfac expand eigen",
    "kfac expand inverse",
    "ekfac positions",
    "ekfac batch",
    "eva",
    "tengrad",
    "seng sketched",
]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count how often the host waits; the number is in the list afterwards."""
    found: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with waiting("warn"):
            yield found
    found.append(sum("synchroniz" in str(one.message) for one in caught))


@only_on_gpu
def test_waiting_is_noticed():
    value = torch.ones((), device=DEVICE)
    with counted() as found:
        value.item()
    assert found[0] >= 1
    with waiting("error"), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("name", LATER)
def test_later_steps_never_wait(name):
    model = Net().to(DEVICE)
    optimizer = make(model, name)
    for epoch, *batch in epochs(2):
        optimizer.start_epoch(epoch)
        step(model, optimizer, *batch)
    last = list(epochs(1, start=2))
    optimizer.start_epoch(2)
    with waiting("error"):
        losses = [step(model, optimizer, *batch) for _, *batch in last]
    assert torch.stack(losses).isfinite().all()
    if name.startswith("fngd s"):
        assert optimizer.statistics()["reuse_rate"] == 1.0


@pytest.mark.parametrize("name", CURVATURE)
def test_steps_between_updates_of_the_curvature_never_wait(name):
    model = Net().to(DEVICE)
    optimizer = make(model, name, update_period=3)
    batches = [batch for _, *batch in epochs(2)]
    step(model, optimizer, *batches[0])
    with waiting("error"):
        step(model, optimizer, *batches[1])
        step(model, optimizer, *batches[2])
    assert optimizer.statistics()["updates"] == 1
    # Nor after a checkpoint, whichever device it was read to.
    for place in ("cpu", DEVICE):
        again = Net().to(DEVICE)
        resumed = make(again, name, update_period=3)
        state = optimizer.state_dict()
        state[optimizer.method]["curvature"] = [
            {key: value.to(place) for key, value in layer.items()}
            for layer in state[optimizer.method]["curvature"]
        ]
        resumed.load_state_dict(state)
        step(again, resumed, *batches[3])
        with waiting("error"):
            step(again, resumed, *batches[4])
        assert resumed.statistics()["updates"] == 2


@pytest.mark.parametrize("rows", ["packed", "ids on the device"])
def test_other_announcements(rows, record_property):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(DEVICE)
    optimizer = make(model, "fngd sgd")
    x = torch.randn(1, ROWS, 4, device=DEVICE) if rows == "packed" else torch.randn(ROWS, 4)
    x = x.to(DEVICE)
    ids = torch.arange(4 if rows == "packed" else ROWS)
    ids = ids if rows == "packed" else ids.to(DEVICE)
    lengths = [3, 4, 1, 4] if rows == "packed" else None
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        with counted() as found:
            optimizer.set_batch(ids, lengths)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    record_property("waits of a later step", found[0])
    # The coefficients of ids on the device are in main memory.
    assert found[0] <= (rows != "packed")


@pytest.mark.parametrize("name", [n for n in VARIANTS if not n.startswith("plain")])
def test_waits_of_a_step_that_computes(name, record_property):
    model = Net().to(DEVICE)
    optimizer = make(model, name)
    batches = [batch for _, *batch in epochs(1)]
    found = []
    for batch in batches:
        with counted() as one:
            step(model, optimizer, *batch)
        found.append(one[0])
    record_property(f"waits of the first steps, {len(LAYERS)} layers", found)
    if VARIANTS[name]["method"] == "fngd":
        # The report of each layer's solve, and the coefficients of the batch in one copy; leaving
        # one out asks first whether the matrix is finite, and torch looks at the inverse.
        each = 3 if "leave" in name else 1
        assert max(found) <= each * len(LAYERS) + 1
    if name.startswith("kfac"):
        # Between inversions: the loss scale, whether averages are finite, and how many there are.
        assert max(found[1:]) <= 3


@only_on_gpu
def test_timers_do_not_pile_up_in_a_loop_without_logs():
    model = Net().to(DEVICE)
    optimizer = make(model, "fngd none")
    for _, *batch in epochs(10):
        step(model, optimizer, *batch)
    torch.cuda.synchronize()
    step(model, optimizer, *batch)
    assert len(optimizer.counters.clock._events) <= len(LAYERS)
    assert optimizer.statistics()["gram_seconds"] > 0

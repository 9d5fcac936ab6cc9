"""A spike of the loss, of one sample or of a batch, does not poison the stored coefficients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_fngd import create_fngd_optimizer
from hf_fngd.solve import coefficients

ROWS, BATCH, SPIKED = 12, 4, 1


def first_epoch(factor=1.0, row_factor=1.0, **options):
    """Return the coefficients of an epoch at constant weights; one batch has a spike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, targets = torch.randn(ROWS, 4), torch.randn(ROWS, 3)
    optimizer = create_fngd_optimizer(model, lr=0.0, **options)
    optimizer.bind_dataset(ROWS)
    for number, rows in enumerate(torch.arange(ROWS).split(BATCH)):
        optimizer.set_batch(rows)
        losses = (model(inputs[rows]) - targets[rows]).square().sum(1)
        if number == SPIKED:
            weight = torch.ones(BATCH)
            weight[0] = row_factor
            losses = losses * weight * factor
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.coefficients()


@pytest.mark.feature(
    "Loss spikes",
    "works",
    "a batch of N has ‖γ‖² ≤ N and a spiked sample a small γ, except with `leave_one_out`",
)
@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("factor", [1e4, 1e8, 1e15])
def test_spike_of_one_sample(factor, mode):
    plain = first_epoch(damping_mode=mode, damping=0.1)
    spiked = first_epoch(row_factor=factor, damping_mode=mode, damping=0.1)
    others = [row for row in range(ROWS) if row // BATCH != SPIKED]
    assert torch.equal(spiked[others], plain[others])
    batch = spiked[SPIKED * BATCH :][:BATCH]
    assert batch.isfinite().all()
    assert (batch.square().sum(0) <= BATCH * (1 + 1e-5)).all()
    # Its gradient counts λ/(λ + its share of the trace) of what it was, and the others' about 1.
    assert (batch[0].abs() < 0.1).all()


@pytest.mark.parametrize("factor", [1e4, 1e8, 1e12])
def test_spike_of_a_whole_batch_changes_nothing(factor):
    torch.testing.assert_close(first_epoch(factor=factor), first_epoch(), rtol=1e-4, atol=1e-5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    exponents=st.lists(st.integers(-12, 12), min_size=1, max_size=9),
    width=st.integers(1, 6),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
    mode=st.sampled_from(["relative", "absolute"]),
    seed=st.integers(0, 2**16),
)
def test_norm_of_the_coefficients_is_bounded(exponents, width, damping, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.tensor(exponents)
    u = torch.randn(len(sizes), width, generator=generator) * sizes.unsqueeze(1)
    found = coefficients.solve(u @ u.t(), damping=damping, mode=mode)
    assert found.finite and found.gamma.isfinite().all()
    assert found.gamma.norm() <= math.sqrt(len(sizes)) * 1.01

"""NaN and overflow on one of two ranks: that rank falls back, and the stores stay finite."""

import faulthandler
import gc
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_fngd import FNGDSeq2SeqTrainer, create_fngd_optimizer
from tests.hf.test_ddp import on_two_ranks
from tests.hf_utils import arguments, make_trainer
from tests.hf_utils import weights as weights_of

ROWS, BATCH, BAD_STEP = 16, 2, 1
# Finite gradients of float64 whose squares are finite on rank 0 and not on rank 1.
FACTORS = (1e152, 1e156)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data():
    torch.manual_seed(1)
    return torch.randn(ROWS, 4, dtype=torch.float64), torch.arange(ROWS) % 3


def make(model):
    optimizer = create_fngd_optimizer(model, lr=0.1)
    optimizer.bind_dataset(ROWS)
    return optimizer


def loss_of(model, rows, inputs, classes):
    return nn.functional.cross_entropy(model(inputs[rows]), classes[rows])


def overflow(rank):
    """Return the gradients of a backward pass in which the Gram matrices of rank 1 overflow."""
    model, (inputs, classes) = build(), data()
    optimizer = make(model)
    rows = torch.arange(4) + 4 * rank
    optimizer.set_batch(rows)
    parallel = DistributedDataParallel(model)
    (loss_of(parallel, rows, inputs, classes) * FACTORS[rank]).backward()
    return {
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
        **outcome(optimizer),
    }


def nan(rank, bad):
    """Train two epochs with one NaN in a batch of rank 1, whose step a GradScaler skips."""
    model, (inputs, classes) = build(), data()
    optimizer = make(model)
    parallel = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    found = {}
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        if epoch == 1:
            found["known"] = optimizer.store.known.clone()
            found["first_epoch"] = weights_of(model)
        for number, both in enumerate(torch.arange(ROWS).split(2 * BATCH)):
            rows = both[rank * BATCH :][:BATCH]
            optimizer.set_batch(rows)
            given = inputs.clone()
            if bad and epoch == 0 and number == BAD_STEP and rank == 1:
                given[rows[0]] = torch.nan
            scaler.scale(loss_of(parallel, rows, given, classes)).backward()
            if not bad and epoch == 0 and number == BAD_STEP:
                optimizer.batches.close()  # the same steps without this one
            else:
                scaler.step(optimizer)
                scaler.update(1.0)
            optimizer.zero_grad()
    optimizer.synchronize()
    return {**found, "weights": weights_of(model), **outcome(optimizer)}


def outcome(optimizer):
    optimizer.synchronize()
    mine = optimizer.statistics()["nonfinite"]
    optimizer.synchronize(counts=True)
    return {
        "table": optimizer.coefficients(),
        "nonfinite": (mine, optimizer.statistics()["nonfinite"]),
    }


def main(folder):
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    found = {"overflow": overflow(rank), "nan": nan(rank, True), "skipped": nan(rank, False)}
    torch.save(found, f"{folder}/found{rank}.pt")
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks(
        "tests.methods.test_nonfinite_ddp", tmp_path_factory.mktemp("nonfinite"), "found"
    )


@pytest.mark.feature(
    "NaN or overflow on one rank of DDP",
    "works",
    "that rank falls back to γ = 1 for the batch; `fngd/nonfinite` counts all ranks'",
)
@pytest.mark.slow
def test_overflow_costs_one_rank_its_coefficients(two_ranks):
    first, second = (found["overflow"] for found in two_ranks)
    inputs, classes = data()
    expected = {}
    for rank, preconditioned in enumerate((True, False)):
        model = build()
        if preconditioned:
            optimizer = make(model)
            optimizer.set_batch(range(4))
        rows = torch.arange(4) + 4 * rank
        (loss_of(model, rows, inputs, classes) * FACTORS[rank] / 2).backward()
        for name, parameter in model.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad
    for name, value in expected.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        torch.testing.assert_close(first["gradients"][name], value, rtol=1e-12, atol=0)
    assert first["nonfinite"] == (0.0, 2.0) and second["nonfinite"] == (2.0, 2.0)
    for found in (first, second):
        assert found["table"][:4].isfinite().all() and found["table"][4:].isnan().all()


@pytest.mark.slow
def test_nan_skips_the_step_on_both_ranks_and_spares_the_store(two_ranks):
    for found, other in zip(two_ranks, reversed(two_ranks), strict=True):
        nan, skipped = found["nan"], found["skipped"]
        for name, value in nan["weights"].items():
            assert value.isfinite().all()
            assert torch.equal(value, other["nan"]["weights"][name])
        for name, value in nan["first_epoch"].items():
            assert torch.equal(value, skipped["first_epoch"][name])
        # The rows of rank 0 were stored, those of rank 1 made up for in the next epoch.
        lost = torch.arange(2 * BATCH * BAD_STEP + BATCH, 2 * BATCH * (BAD_STEP + 1))
        assert (~nan["known"]).nonzero().squeeze(1).equal(lost)
        assert nan["table"].isfinite().all() and torch.equal(nan["table"], other["nan"]["table"])
    assert [found["nan"]["nonfinite"] for found in two_ranks] == [(0.0, 2.0), (2.0, 2.0)]


def test_logs_count_all_ranks(tmp_path, monkeypatch):
    # What the other rank would have sent.
    monkeypatch.setattr("hf_fngd.methods.counters.gather", lambda mine: [mine, (3, 1)])
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, max_steps=2))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["fngd/nonfinite"] for entry in entries] == [3.0, 3.0]
    assert [entry["fngd/fallbacks"] for entry in entries] == [1.0, 1.0]


if __name__ == "__main__":
    main(sys.argv[1])

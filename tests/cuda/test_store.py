"""Coefficients wait in main memory or in a file, and train the same from either."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.common import (
    CUDA,
    DEVICE,
    ON_GPU,
    ROWS,
    Net,
    assert_same_way,
    epochs,
    make,
    moved,
    state_of,
    step,
)

pytestmark = CUDA


def train(**settings):
    model = Net().to(DEVICE)
    start = state_of(model)
    optimizer = make(model, "fngd sgd", **settings)
    for epoch, *batch in epochs(3):
        optimizer.start_epoch(epoch)
        step(model, optimizer, *batch)
    assert optimizer.reuse_rate == 1.0
    return moved(model, start), optimizer


@pytest.mark.on_gpu("Coefficients in a file (`store_dir`)")
def test_file_and_memory_give_the_same_bits(tmp_path):
    expected, optimizer = train()
    found, filed = train(store_dir=str(tmp_path))
    assert all(torch.equal(found[name], way) for name, way in expected.items())
    for one in (optimizer, filed):
        assert one.store.table.device.type == "cpu" and one.coefficients().shape[0] == ROWS
    assert torch.equal(optimizer.coefficients(), filed.coefficients())
    assert not list(tmp_path.iterdir())


def test_half_precision_is_near():
    expected, _ = train()
    found, optimizer = train(store_dtype="float16")
    assert optimizer.store.table.dtype == torch.float16
    assert_same_way(found, expected, 1e-2)


@pytest.mark.parametrize("ids", ["cpu", "device", "list", "hash"])
def test_ids_from_anywhere(ids):
    """Row numbers may lie on the device, and any 64-bit integers identify samples."""
    model = Net().to(DEVICE)
    optimizer = make(model, "fngd sgd")
    for epoch, rows, *batch in epochs(2):
        optimizer.start_epoch(epoch)
        given = {
            "cpu": rows,
            "device": rows.to(DEVICE),
            "list": rows.tolist(),
            "hash": rows * 7046029254386353131,
        }[ids]
        step(model, optimizer, given, *batch)
    assert optimizer.reuse_rate == 1.0 and optimizer.coefficients().isfinite().all()


def test_the_store_takes_no_memory_of_the_device():
    """A table of 256 MiB stays where it is; a batch brings its own rows."""
    model = Net().to(DEVICE)
    optimizer = make(model, "fngd sgd", share="sample")
    optimizer.store.num_samples = 2**26 // len(optimizer.layer_names)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for epoch, *batch in epochs(2):
        optimizer.start_epoch(epoch)
        step(model, optimizer, *batch)
    table = optimizer.store.table
    assert table.numel() * table.element_size() > 250 * 2**20
    if ON_GPU:
        # Much of it is the workspace of cuBLAS and cuDNN.
        assert torch.cuda.max_memory_allocated() - before < 192 * 2**20

"""What is stored comes back under the same key, in bounded memory, through a checkpoint too."""

from __future__ import annotations

import copy
import errno
import io
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_fngd import FNGDError
from hf_fngd.methods import stores as stores_module
from hf_fngd.methods.stores import LayerStore, SampleStore

LAYERS = 3
NAMES = {
    "rows": [0, 7, 3, 9],
    "large": [2**63 - 1, 2**40, 5, 10**18],
    "negative": [-1, -(2**63), 0, -7],
}


def reload(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def put(store: SampleStore, ids: list[int], values: Tensor) -> None:
    store.write(store.locate(ids, create=True), values)


def get(store: SampleStore, ids: list[int]) -> Tensor:
    return store.read(store.locate(ids, create=False))


@pytest.mark.parametrize("bound", [None, 10])
@pytest.mark.parametrize("ids", NAMES.values(), ids=NAMES)
def test_any_ids(ids: list[int], bound: int | None) -> None:
    store = SampleStore(LAYERS, torch.float32, bound)
    values = torch.randn(4, LAYERS)
    assert store.count_known(store.locate(ids, create=False)) == 0
    put(store, ids, values)
    assert store.count_known(store.locate(ids, create=False)) == 4
    assert torch.equal(get(store, ids[::-1]), values.flip(0))
    put(store, ids[:1], values[3:])
    assert torch.equal(get(store, ids), values[[3, 1, 2, 3]])


@pytest.mark.parametrize("ids", NAMES.values(), ids=NAMES)
def test_missing_rows_have_the_layers_mean(ids: list[int]) -> None:
    store = SampleStore(LAYERS, torch.float32)
    values = torch.randn(3, LAYERS)
    put(store, ids[:3], values)
    torch.testing.assert_close(get(store, ids[3:]), values.mean(0, keepdim=True))
    assert store.count_known(store.locate(ids, create=False)) == 3


def test_nothing_known_gives_one() -> None:
    store = SampleStore(LAYERS, torch.float32)
    rows = store.locate([4, 5], create=True)
    assert torch.equal(store.read(rows), torch.ones(2, LAYERS))


def test_nan_is_never_stored() -> None:
    store = SampleStore(LAYERS, torch.float32)
    values = torch.randn(2, LAYERS)
    put(store, [1, 2], values)
    put(store, [1, 2, 3], torch.full((3, LAYERS), torch.nan))
    assert torch.equal(get(store, [1, 2]), values)
    assert store.count_known(store.locate([1, 2, 3], create=False)) == 2
    # A layer whose coefficients could not be had leaves the others' in place.
    put(store, [4], torch.tensor([[0.5, torch.nan, 0.25]]))
    found = get(store, [4])[0]
    torch.testing.assert_close(found, torch.tensor([0.5, float(values[:, 1].mean()), 0.25]))


def test_growth_keeps_everything_and_an_epoch_gives_memory_back() -> None:
    store = SampleStore(LAYERS, torch.float32)
    ids = random.Random(0).sample(range(-(10**9), 10**9), 2000)
    values = torch.randn(2000, LAYERS)
    for start in range(0, 2000, 7):
        put(store, ids[start : start + 7], values[start : start + 7])
        assert len(store.table) <= max(256, 1.25 * (start + 7) + 1)
    assert torch.equal(get(store, ids), values)
    store.start_epoch(collecting=False)
    assert store.table.shape == (2000, LAYERS)
    assert torch.equal(get(store, ids), values)
    assert store.count_known(store.locate(ids, create=False)) == 2000


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)])
@pytest.mark.parametrize("shift", [0, -50], ids=["rows", "negative"])
def test_memory_bound(dtype: torch.dtype, size: int, shift: int) -> None:
    rows = 300
    store = SampleStore(LAYERS, dtype, rows)
    ids = [i + shift for i in range(rows)]
    for start in range(0, rows, 32):
        part = ids[start : start + 32]
        put(store, part, torch.rand(len(part), LAYERS))
        assert store.table.untyped_storage().nbytes() <= size * rows * LAYERS
    assert store.count_known(store.locate(ids, create=False)) == rows


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14], [3, 0, 1, 2, 99]], ids=str)
def test_a_reusing_epoch_stores_no_more_samples_than_the_data_has(ids: list[int]) -> None:
    store = SampleStore(LAYERS, torch.float32, 4)
    values = torch.rand(5, LAYERS)
    store.write(store.locate(ids[:2], create=True, bounded=True), torch.zeros(2, LAYERS))
    store.write(store.locate(ids, create=True, bounded=True), values)
    assert torch.equal(get(store, ids[:4]), values[:4])
    torch.testing.assert_close(get(store, ids[4:]), values[:4].mean(0, keepdim=True))
    assert store.count_known(store.locate(ids, create=False)) == 4
    assert len(store.table) == 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sample_of_an_epoch_has_room(data: st.DataObject) -> None:
    """Packed samples, pairs and a mixture of numbers and hashes are more than the rows."""
    bound = data.draw(st.none() | st.integers(1, 12))
    ids = data.draw(st.lists(st.integers(-3, 15) | st.integers(2**40, 2**40 + 9), max_size=40))
    store, expected = SampleStore(LAYERS, torch.float32, bound), {}
    while ids:
        count = data.draw(st.integers(1, 6))
        # A batch has no sample twice.
        part, ids = list(dict.fromkeys(ids[:count])), ids[count:]
        values = torch.rand(len(part), LAYERS)
        put(store, part, values)
        expected |= dict(zip(part, values, strict=True))
        if data.draw(st.booleans()):
            saved = store.state_dict()
            store = SampleStore(LAYERS, torch.float32, bound)
            store.load_state_dict(saved)
        store.start_epoch(collecting=False)
        assert all(torch.equal(get(store, [i])[0], v) for i, v in expected.items())


def test_contents_that_change_do_not_pile_up() -> None:
    store = SampleStore(LAYERS, torch.float32, 4)
    for epoch in range(5):
        store.start_epoch(collecting=True)
        fresh = list(range(100 + 6 * epoch, 106 + 6 * epoch))
        put(store, fresh, torch.rand(6, LAYERS))
        assert store.count_known(store.locate(fresh, create=False)) == 6
    assert store._used() == 6


def test_float16_rounds_and_reads_as_float32() -> None:
    store = SampleStore(LAYERS, torch.float16)
    values = torch.randn(2, LAYERS)
    put(store, [1, 2], values)
    assert torch.equal(get(store, [1, 2]), values.half().float())


@pytest.mark.parametrize("bound", [None, 10])
@pytest.mark.parametrize("ids", NAMES.values(), ids=NAMES)
def test_sample_store_round_trip(ids: list[int], bound: int | None) -> None:
    store = SampleStore(LAYERS, torch.float32, bound)
    put(store, ids, torch.randn(4, LAYERS))
    other = SampleStore(LAYERS, torch.float32, bound)
    other.load_state_dict(reload(store.state_dict()))
    # Both go on alike, with old rows, a new one and one that stays unknown.
    more = torch.randn(2, LAYERS)
    for which in (store, other):
        put(which, [ids[0], 8], more)
    assert torch.equal(get(store, [*ids, 8, 6]), get(other, [*ids, 8, 6]))
    known = [s.count_known(s.locate([*ids, 8, 6], create=False)) for s in (store, other)]
    assert known == [5, 5]


def test_state_of_an_unused_store_loses_nothing() -> None:
    store = SampleStore(LAYERS, torch.float32, 10)
    store.load_state_dict(reload(store.state_dict()))
    put(store, [9], torch.ones(1, LAYERS))
    assert store.count_known(store.locate([9], create=False)) == 1


def test_state_is_a_copy() -> None:
    for store, write in (
        (SampleStore(1, torch.float32, 4), lambda s, v: put(s, [1], torch.tensor([[v]]))),
        (LayerStore(1), lambda s, v: s.write(None, torch.tensor([[v]]))),
    ):
        write(store, 0.25)
        state = store.state_dict()
        before = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
        write(store, 0.75)
        for key, value in before.items():
            torch.testing.assert_close(state[key], value, rtol=0, atol=0, equal_nan=True)


def test_other_data_set_is_refused() -> None:
    store = SampleStore(LAYERS, torch.float32, 10)
    with pytest.raises(FNGDError, match=r"10 rows.*11.*same data"):
        SampleStore(LAYERS, torch.float32, 11).load_state_dict(store.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_too_large_for_the_precision_is_bounded(dtype: torch.dtype) -> None:
    store = SampleStore(LAYERS, dtype)
    put(store, [1], torch.tensor([[torch.inf, -torch.inf, 1.0]]))
    limit = torch.finfo(dtype).max
    assert get(store, [1]).tolist() == [[limit, -limit, 1.0]]


@pytest.mark.parametrize("bound", [None, 20])
@pytest.mark.parametrize("shift", [0, -3, 2**62], ids=["rows", "negative", "hashes"])
def test_merge_keeps_the_mean_of_all_ranks(
    shift: int, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 12 rows, 3 or so at a time go to the other ranks.
    monkeypatch.setattr(stores_module, "_PIECE", 3)
    stores = [SampleStore(LAYERS, torch.float32, bound) for _ in range(3)]
    seen = [[4, 0, 2, 1], [2, 9, 4, 7], [8, 3, 2, 6]]
    values = torch.randn(3, 4, LAYERS)
    values[1, 2, 1] = torch.nan
    for store, rows, part in zip(stores, seen, values, strict=True):
        put(store, [row + shift for row in rows], part)
    merge(stores, monkeypatch)
    for store in stores:
        for row in {row for rows in seen for row in rows}:
            parts = [values[k, rows.index(row)] for k, rows in enumerate(seen) if row in rows]
            expected = torch.stack(parts).nanmean(0)
            torch.testing.assert_close(get(store, [row + shift])[0], expected)
        assert store.count_known(store.locate([5 + shift], create=False)) == 0
        assert not store.dirty.any()
    # What is not new is not sent: merging again changes nothing.
    before = stores[0].values()
    merge(stores, monkeypatch)
    torch.testing.assert_close(stores[0].values(), before, rtol=0, atol=0, equal_nan=True)


def merge(stores: list[SampleStore] | list[LayerStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge as three ranks would, one thread a rank."""
    barrier = threading.Barrier(len(stores))
    mine = threading.local()
    sent: list[Any] = [None] * len(stores)

    def gather(value: Any) -> list[Any]:
        sent[mine.rank] = copy.deepcopy(value)
        barrier.wait(10)
        found = list(sent)
        barrier.wait(10)
        return found

    def run(rank: int) -> None:
        mine.rank = rank
        stores[rank].merge()

    monkeypatch.setattr(stores_module, "gather", gather)
    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(run, range(len(stores)), timeout=20))


# ---- in a file -----------------------------------------------------------------------------------


def mapped(path: Path) -> bool:
    """Return whether this process has memory mapped to a file, deleted or not, of a folder."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bound", [None, 4000])
@pytest.mark.parametrize("shift", [0, -50], ids=["rows", "negative"])
def test_store_in_a_file_is_the_store_in_memory(
    dtype: torch.dtype, bound: int | None, shift: int, tmp_path: Path
) -> None:
    stores = [SampleStore(LAYERS, dtype, bound, folder) for folder in (None, tmp_path)]
    order = torch.randperm(4000) + shift
    for part in order[:3000].split(700):
        values = torch.randn(len(part), LAYERS)
        values[0, 1] = torch.nan
        for store in stores:
            put(store, part.tolist(), values)
    for store in stores:
        store.start_epoch(collecting=False)
    assert mapped(tmp_path)
    assert_close = torch.testing.assert_close
    assert_close(stores[0].values(), stores[1].values(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(*[get(store, order.tolist()) for store in stores])
    # A checkpoint does not say where the coefficients were.
    state = reload(stores[1].state_dict())
    for folder in (None, tmp_path):
        other = SampleStore(LAYERS, dtype, bound, folder)
        other.load_state_dict(state)
        assert torch.equal(get(other, order.tolist()), get(stores[0], order.tolist()))


def test_nothing_of_the_file_stays_behind(tmp_path: Path) -> None:
    store = SampleStore(LAYERS, torch.float32, 100, tmp_path)
    put(store, [1, 2], torch.ones(2, LAYERS))
    assert list(tmp_path.iterdir()) == [] and mapped(tmp_path)
    del store
    assert not mapped(tmp_path)


@pytest.mark.slow
def test_two_processes_have_a_file_each(tmp_path: Path) -> None:
    """As by a launcher: neither sees what the other writes."""
    store = SampleStore(LAYERS, torch.float32, 100, tmp_path)
    code = (
        "import sys, torch; from hf_fngd.methods.stores import SampleStore\n"
        f"store = SampleStore({LAYERS}, torch.float32, 100, sys.argv[1])\n"
        f"store.write(store.locate([1], create=True), torch.ones(1, {LAYERS}))\n"
        "print(float(store.read(store.locate([1], create=False)).sum()))"
    )
    put(store, [1], torch.zeros(1, LAYERS))
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(out) == LAYERS and float(get(store, [1]).sum()) == 0


def test_room_is_taken_at_once_and_not_while_training(tmp_path: Path) -> None:
    """A mapped file that finds the disk full when it is written to ends the process."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    rows = 2**26 // LAYERS
    store = SampleStore(LAYERS, torch.float32, rows, tmp_path)
    store.locate([0], create=True)
    now = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert free - now > 2**27  # of 256 MiB; others use the disk too


@pytest.mark.parametrize("what", ["full", "missing", "file"])
def test_no_room_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "there"
    if what == "full":
        folder.mkdir()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    elif what == "file":
        folder.write_text("")
    store = SampleStore(LAYERS, torch.float16, 2**20, folder)
    with pytest.raises(FNGDError, match=r"store_dir='.*there' .*6 MiB .*: .*share=layer"):
        store.locate([0], create=True)
    assert what != "full" or list(folder.iterdir()) == []


# ---- means of layers -----------------------------------------------------------------------------


def fill(store: LayerStore) -> Tensor:
    """Write random coefficients, some of them missing, and return them."""
    batches = [torch.randn(size, LAYERS) for size in (4, 10, 3)]
    for values in batches:
        values[torch.rand(values.shape) < 0.2] = torch.nan
        store.write(None, values)
    return torch.cat(batches)


def check(store: LayerStore, seen: Tensor) -> None:
    expected = seen.double().nanmean(0, keepdim=True).float()
    for found in (store.read(None), store.values()):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_means_of_layers(merged: bool) -> None:
    store = LayerStore(LAYERS)
    seen = fill(store)
    if merged:
        store.merge()
    check(store, seen)
    check(store, torch.cat([seen, fill(store)]))


def test_empty_layers_have_one() -> None:
    store = LayerStore(LAYERS)
    assert torch.equal(store.read(None), torch.ones(1, LAYERS))
    assert store.values().isnan().all()
    store.write(None, torch.tensor([[torch.nan, 0.25, torch.nan]]))
    assert store.read(None).tolist() == [[1.0, 0.25, 1.0]]


def test_a_collecting_epoch_starts_anew() -> None:
    store = LayerStore(LAYERS)
    seen = fill(store)
    store.start_epoch(collecting=False)
    check(store, seen)
    store.merge()
    fill(store)
    store.start_epoch(collecting=True)
    assert torch.equal(store.read(None), torch.ones(1, LAYERS))
    check(store, fill(store))


def test_layer_means_of_all_ranks_are_those_of_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = [LayerStore(LAYERS) for _ in range(3)]
    seen = [fill(store) for store in stores]
    # What has been added once is not added again.
    for _ in range(2):
        merge(stores, monkeypatch)
        for store in stores:
            check(store, torch.cat(seen))
    seen += [fill(store) for store in stores]
    merge(stores, monkeypatch)
    for store in stores:
        check(store, torch.cat(seen))


@pytest.mark.parametrize("merged", [False, True])
def test_layer_store_round_trip(merged: bool) -> None:
    store = LayerStore(LAYERS)
    seen = fill(store)
    if merged:
        store.merge()
    other = LayerStore(LAYERS)
    other.load_state_dict(reload(store.state_dict()))
    check(other, seen)
    check(other, torch.cat([seen, fill(other)]))

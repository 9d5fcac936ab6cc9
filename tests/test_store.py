"""What is stored comes back under the same key, in bounded memory, through a checkpoint too."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fngd import FNGDError
from hf_fngd.mean_store import MeanStore
from hf_fngd.sample_store import SampleStore

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


def test_growth_keeps_everything_and_trim_gives_memory_back() -> None:
    store = SampleStore(LAYERS, torch.float32)
    ids = random.Random(0).sample(range(-(10**9), 10**9), 2000)
    values = torch.randn(2000, LAYERS)
    for start in range(0, 2000, 7):
        put(store, ids[start : start + 7], values[start : start + 7])
        assert len(store.table) <= max(256, 1.25 * (start + 7) + 1)
    assert torch.equal(get(store, ids), values)
    store.trim()
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


def test_rows_beyond_the_bound_are_not_stored() -> None:
    for ids in ([0, 1, 2, 3, 4], [10, 11, 12, 13, 14]):
        store = SampleStore(LAYERS, torch.float32, 4)
        put(store, ids[:2], torch.zeros(2, LAYERS))
        values = torch.rand(5, LAYERS)
        put(store, ids, values)
        assert torch.equal(get(store, ids[:4]), values[:4])
        torch.testing.assert_close(get(store, ids[4:]), values[:4].mean(0, keepdim=True))
        assert store.count_known(store.locate(ids, create=False)) == 4
        assert len(store.table) == 4


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
        (MeanStore(1), lambda s, v: s.write(0, torch.tensor([1]), torch.tensor([v]))),
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


# ---- means ---------------------------------------------------------------------------------------


def fill(store: MeanStore) -> dict[tuple[int, int], list[float]]:
    """Writes random coefficients and remembers them by layer and key."""
    seen: dict[tuple[int, int], list[float]] = {}
    for layer in range(LAYERS):
        for shape in ((4,), (2, 5), (3,)):
            keys = torch.randint(-1, 6, shape) * 2
            gamma = torch.randn(shape)
            store.write(layer, keys, gamma)
            for key, value in zip(keys.flatten().tolist(), gamma.flatten().tolist(), strict=True):
                if key >= 0:
                    seen.setdefault((layer, key), []).append(value)
    return seen


def check(store: MeanStore, seen: dict[tuple[int, int], list[float]]) -> None:
    for layer in range(LAYERS):
        everything = [v for (owner, _), values in seen.items() if owner == layer for v in values]
        mean = sum(everything) / len(everything)
        keys = torch.arange(-4, 40).view(2, 22)
        expected = [
            sum(seen[layer, k]) / len(seen[layer, k]) if (layer, k) in seen else mean
            for k in keys.flatten().tolist()
        ]
        found = store.read(layer, keys)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, torch.tensor(expected).view(2, 22))


@pytest.mark.parametrize("merged", [False, True])
def test_means_by_layer_and_key(merged: bool) -> None:
    store = MeanStore(LAYERS)
    seen = fill(store)
    if merged:
        store.merge()
    check(store, seen)
    assert store.count_known() == len({key for _, key in seen})
    for key, values in fill(store).items():
        seen.setdefault(key, []).extend(values)
    check(store, seen)


def test_empty_store_gives_one() -> None:
    store = MeanStore(LAYERS)
    assert torch.equal(store.read(1, torch.tensor([[0, 5], [-1, 2]])), torch.ones(2, 2))
    store.write(1, torch.tensor([-1, -100]), torch.tensor([5.0, 7.0]))
    assert torch.equal(store.read(1, torch.tensor([0])), torch.ones(1))


def test_reset_forgets() -> None:
    store = MeanStore(LAYERS)
    fill(store)
    store.merge()
    fill(store)
    store.reset()
    assert torch.equal(store.read(0, torch.arange(8)), torch.ones(8))
    check(store, fill(store))


@pytest.mark.parametrize("merged", [False, True])
def test_mean_store_round_trip(merged: bool) -> None:
    store = MeanStore(LAYERS)
    seen = fill(store)
    if merged:
        store.merge()
    other = MeanStore(LAYERS)
    other.load_state_dict(reload(store.state_dict()))
    check(other, seen)
    for key, values in fill(other).items():
        seen.setdefault(key, []).extend(values)
    check(other, seen)

"""A run stopped anywhere and resumed is the uninterrupted run, and wrong states are refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDError, create_fngd_optimizer
from tests.helpers import assert_same

ROWS, BATCH, EPOCHS, T = 12, 4, 3, 3
STEPS = ROWS // BATCH
VARIANTS: dict[str, dict[str, Any]] = {
    share: {"share": share} for share in ("sample", "layer", "none")
} | {
    "adamw": {"update_rule": "adamw"},
    "muon rms": {"update_rule": "muon", "update_scale": "rms"},
    "refresh": {"share": "layer", "refresh_every": 2},
    "refresh samples": {"share": "sample", "refresh_every": 2},
    "float16": {"store_dtype": "float16"},
    "leave one out": {"share": "none", "leave_one_out": True},
}


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 9)
    ).to(dtype)


def make(model: nn.Module, **settings: Any) -> FNGD:
    return create_fngd_optimizer(model, lr=0.05, weight_decay=0.1, other_lr=0.01, **settings)


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 9, (ROWS, T))


def train(model: nn.Module, optimizer: FNGD, first: int = 0, last: int = EPOCHS * STEPS) -> None:
    """Make the steps first … last - 1 of a run over shuffled batches."""
    data = tokens()
    for step in range(first, last):
        epoch, place = divmod(step, STEPS)
        optimizer.start_epoch(epoch)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        optimizer.set_batch(rows * 10**12 - 5)
        logits = model(data[rows])
        nn.functional.cross_entropy(logits.flatten(0, 1), data[rows].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, STEPS, STEPS + 1, 2 * STEPS, 2 * STEPS + 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_is_bit_identical(name: str, stop: int) -> None:
    model = build()
    train(model, make(model, **VARIANTS[name]))

    interrupted = build()
    optimizer = make(interrupted, **VARIANTS[name])
    train(interrupted, optimizer, 0, stop)
    checkpoint = saved({"model": interrupted.state_dict(), "optimizer": optimizer.state_dict()})

    resumed = build()
    resumed.load_state_dict(checkpoint["model"])
    optimizer = make(resumed, **VARIANTS[name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, optimizer, stop)
    assert_same(resumed.state_dict(), model.state_dict())


def test_coefficients_matter_for_the_resumed_run() -> None:
    # Without them the run of test_resumed_run_is_bit_identical would be another one.
    model, forgetful = build(), build()
    train(model, make(model))
    optimizer = make(forgetful)
    train(forgetful, optimizer, 0, STEPS)
    optimizer.store = make(build()).store
    train(forgetful, optimizer, STEPS)
    assert not torch.equal(model[1].weight, forgetful[1].weight)


@pytest.mark.feature("bf16 weights", "works", "moments stay float32")
@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_moments_stay_float32_under_bf16(rule: str) -> None:
    model = build(torch.bfloat16)
    optimizer = make(model, update_rule=rule)
    train(model, optimizer, 0, 2)
    twin = copy.deepcopy(model)
    other = make(twin, update_rule=rule)
    other.load_state_dict(saved(optimizer.state_dict()))
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    count = 0
    for mine, theirs in pairs:
        assert_same(dict(optimizer.state[mine]), dict(other.state[theirs]))
        assert all(v.dtype is torch.float32 for v in other.state[theirs].values())
        count += len(other.state[theirs])
    assert count
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", VARIANTS)
def test_empty_round_trip_loses_nothing(name: str) -> None:
    # accelerate.prepare loads a new optimizer's state back into it.
    model, twin = build(), build()
    for which, reload in ((model, False), (twin, True)):
        optimizer = make(which, **VARIANTS[name])
        optimizer.bind_dataset(ROWS)
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        train(which, optimizer)
    assert_same(twin.state_dict(), model.state_dict())


def test_saving_changes_nothing() -> None:
    model, twin = build(), build()
    train(model, make(model))
    optimizer = make(twin)
    for step in range(EPOCHS * STEPS):
        train(twin, optimizer, step, step + 1)
        optimizer.state_dict()
    assert_same(twin.state_dict(), model.state_dict())


def test_saving_between_forward_and_step() -> None:
    # Between micro-batches of an accumulated step.
    model = build()
    optimizer = make(model)
    data = tokens()
    for rows in ([0, 1], [2, 3]):
        optimizer.set_batch(rows)
        model(data[rows]).square().mean().backward()
    known = optimizer.state_dict()["fngd"]["store"]["known"]
    assert int(known.sum()) == 4


def test_a_loaded_state_is_a_copy() -> None:
    model, twin = build(), build()
    optimizer = make(model, update_rule="adamw")
    train(model, optimizer, 0, STEPS)
    state = saved(optimizer.state_dict())
    before = copy.deepcopy(state)
    other = make(twin, update_rule="adamw")
    other.load_state_dict(state)
    train(twin, other, STEPS, 2 * STEPS)
    for number, moments in before["state"].items():
        assert_same(moments, state["state"][number])
    assert torch.equal(before["fngd"]["store"]["table"], state["fngd"]["store"]["table"])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"damping": 0.1}, {"damping": 0.2}, ["damping=0.1", "damping=0.2"]),
        ({"damping_mode": "absolute"}, {}, ["damping_mode=absolute", "damping_mode=relative"]),
        ({"share": "layer"}, {"share": "sample"}, ["share=layer", "share=sample"]),
        ({"share": "none"}, {"share": "layer"}, ["share=none", "share=layer"]),
        ({"update_rule": "adamw"}, {"update_rule": "muon"}, ["update_rule=adamw", "=muon"]),
        ({"update_scale": "none"}, {}, ["update_scale=none", "update_scale=rms"]),
        ({}, {"store_dtype": "float16"}, ["store_dtype=float32", "store_dtype=float16"]),
        ({}, {"refresh_every": 3}, ["refresh_every=0", "refresh_every=3"]),
        ({}, {"exclude_modules": ["4"]}, ["selected layers", "4", "exclude_modules"]),
        ({"target_modules": ["1"]}, {}, ["selected layers", "4", "target_modules"]),
    ],
    ids=str,
)
def test_other_settings_are_refused(
    old: dict[str, Any], new: dict[str, Any], words: list[str]
) -> None:
    model = build()
    optimizer = make(model, **old)
    train(model, optimizer, 0, 1)
    other = make(build(), **new)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FNGDError) as error:
        other.load_state_dict(saved(optimizer.state_dict()))
    assert all(word in str(error.value) for word in [*words, "resume with the same"])
    # Nothing of the refused state is left behind.
    assert other.state_dict()["fngd"]["epoch"] == before["fngd"]["epoch"]
    assert not other.state_dict()["state"]


def test_a_data_set_of_another_size_is_refused() -> None:
    model = build()
    optimizer = make(model)
    optimizer.bind_dataset(12)
    train(model, optimizer, 0, 1)
    other = make(build())
    other.bind_dataset(13)
    with pytest.raises(FNGDError, match=r"12 rows.*13: resume with the same data"):
        other.load_state_dict(saved(optimizer.state_dict()))
    assert other.steps == 0 and other.coefficients().shape == (0, 2)


def test_a_checkpoint_of_another_version_is_refused() -> None:
    model = build()
    optimizer = make(model)
    train(model, optimizer, 0, 1)

    def load(change: Callable[[dict[str, Any]], Any]) -> None:
        state = saved(optimizer.state_dict())
        change(state["fngd"])
        other = make(build())
        with pytest.raises(FNGDError, match="written by another version of hf_fngd .*: resume"):
            other.load_state_dict(state)
        assert other.epoch == other.steps == 0 and not other.state_dict()["state"]

    load(lambda state: state["config"].update(collect_every=1))
    load(lambda state: state.pop("store"))
    load(lambda state: state.pop("steps"))
    load(lambda state: state["store"].pop("dirty"))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_state_of_another_optimizer_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = build()
    with pytest.raises(FNGDError, match="not FNGD's"):
        make(model).load_state_dict(kind(model.parameters(), lr=0.1).state_dict())


@pytest.mark.parametrize("bound_first", [False, True], ids=["load, bind", "bind, load"])
@pytest.mark.parametrize("share", ["sample", "layer"])
def test_other_data_is_refused(share: str, bound_first: bool) -> None:
    model = build()
    optimizer = make(model, share=share)
    optimizer.bind_dataset(None, "first")
    train(model, optimizer, 0, 1)
    state = saved(optimizer.state_dict())

    def resume(fingerprint: str) -> None:
        other = make(build(), share=share)
        if bound_first:
            other.bind_dataset(None, fingerprint)
            other.load_state_dict(state)
        else:
            other.load_state_dict(state)
            other.bind_dataset(None, fingerprint)

    resume("first")
    if share == "sample":
        with pytest.raises(FNGDError, match="same data"):
            resume("second")
    else:
        resume("second")  # one mean a layer belongs to no rows


def test_fingerprint_survives_two_resumes() -> None:
    state: dict[str, Any] = {}
    optimizer = make(build())
    optimizer.bind_dataset(None, "first")
    for _ in range(2):
        state = saved(optimizer.state_dict())
        optimizer = make(build())
        optimizer.load_state_dict(state)
    with pytest.raises(FNGDError, match="same data"):
        optimizer.bind_dataset(None, "second")


@pytest.mark.parametrize("resumed", [False, True])
def test_coefficients_are_forgotten_with_their_data(resumed: bool) -> None:
    model = build()
    optimizer = make(model)
    optimizer.bind_dataset(12, "first")
    train(model, optimizer, 0, 1)
    if resumed:
        state = saved(optimizer.state_dict())
        optimizer = make(build())
        optimizer.load_state_dict(state)
        optimizer.bind_dataset(12, "first")
    assert optimizer.coefficients().isfinite().any()
    optimizer.bind_dataset(12, "first")
    assert optimizer.coefficients().isfinite().any()
    optimizer.bind_dataset(30, "second")
    assert len(optimizer.coefficients()) == 0
    optimizer.set_batch([29])
    assert optimizer.store.table.shape[0] == 30

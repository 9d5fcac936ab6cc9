"""torch.optim's contract of state dicts: hooks, other dtypes and devices, files, and DCP."""

import copy
import io
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from hf_fngd import FNGDError
from hf_fngd.methods import METHODS
from hf_fngd.states import Whole
from tests.helpers import fill_store
from tests.optim_rows import ROWS, equal, make, network, train

every_row = pytest.mark.parametrize("row", ROWS)
every_method = pytest.mark.parametrize("method", METHODS)
# Curvature of one step serves the next ones, so that a checkpoint must carry it.
LASTING = {
    "kfac": {"update_period": 3},
    "ekfac": {"update_period": 3},
    "eva": {"update_period": 3},
    "tengrad": {"update_period": 3},
    "seng": {"update_period": 3, "sketch_size": 0},
}


def start(row, dtype=torch.float32, **settings):
    model = network(dtype)
    lasting = LASTING.get(row.split("-")[0], {})
    return model, make(model, row, weight_decay=0.1, **lasting, **settings)


def epochs(model, optimizer, first, last):
    """Make the steps of a run whose epochs have two steps."""
    for step in range(first, last):
        optimizer.start_epoch(step // 2)
        train(model, optimizer, 1, first=step % 2)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same(first, second):
    """Compare states of any nesting, bit for bit."""
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, set):
        same(Whole.read(first), Whole.read(second))
    elif isinstance(first, dict):
        # Of an SGD weight without momentum there is nothing to keep.
        first, second = ({k: v for k, v in one.items() if v != {}} for one in (first, second))
        assert first.keys() == second.keys()
        for key, value in first.items():
            same(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same(one, other)
    else:
        assert first == second


@every_row
def test_states_are_deterministic_and_loaded_as_they_were(row):
    model, optimizer = start(row)
    epochs(model, optimizer, 0, 3)
    state = saved(optimizer.state_dict())
    same(saved(optimizer.state_dict()), state)
    _, other = start(row)
    other.load_state_dict(state)
    same(saved(other.state_dict()), state)
    # A state is a copy of what belongs to the method, and loading takes nothing of the caller's.
    same(saved(copy.deepcopy(state)), state)
    twin, _ = start(row)
    twin.load_state_dict(model.state_dict())
    epochs(model, optimizer, 3, 6)
    other = make(twin, row, weight_decay=0.1, **LASTING.get(row.split("-")[0], {}))
    other.load_state_dict(state)
    epochs(twin, other, 3, 6)
    equal(model, twin)


@every_row
def test_hooks_of_state_dicts(row):
    method = row.split("-")[0]
    model, optimizer = start(row)
    epochs(model, optimizer, 0, 2)
    optimizer.register_state_dict_pre_hook(lambda one: one.state.update(noted=1))
    optimizer.register_state_dict_post_hook(
        lambda one, state: state.update(seen=(state["state"].pop("noted"), method in state))
    )
    optimizer.register_state_dict_post_hook(lambda one, state: {**state, "again": True})
    state = optimizer.state_dict()
    assert state["seen"] == (1, True) and state["again"] and method in state
    del state["seen"], state["again"]

    _, other = start(row)

    def halve(one, given):
        for moments in given["state"].values():
            for name in moments.keys() - {"step"}:
                moments[name] = moments[name] / 2

    def faster(one, given):
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] = 0.003
        return given

    def zero_first(one):
        one.param_groups[0]["weight_decay"] = one.param_groups[0]["lr"] * 2
        weight = one.param_groups[0]["params"][0]
        for value in one.state[weight].values():
            value.zero_()

    expected = {k: {n: v.clone() for n, v in m.items()} for k, m in state["state"].items()}
    for hook in (halve, faster):
        other.register_load_state_dict_pre_hook(hook)
    other.register_load_state_dict_post_hook(zero_first)
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.003, 0.006)
    members = [p for one in other.param_groups for p in one["params"]]
    for number, parameter in enumerate(members):
        for name, value in other.state[parameter].items():
            factor = 0 if number == 0 else 1 if name == "step" else 0.5
            torch.testing.assert_close(value, expected[number][name] * factor, rtol=0, atol=0)
    assert method not in other.param_groups[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_row
def test_states_load_into_other_dtypes(row, dtype):
    model, optimizer = start(row)
    epochs(model, optimizer, 0, 2)
    other_model, other = start(row, dtype)
    other.load_state_dict(saved(optimizer.state_dict()))
    for mine, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        for name, value in other.state[theirs].items():
            precise = dtype is torch.float64 and name != "step"
            assert value.dtype is (torch.float64 if precise else torch.float32)
            assert torch.equal(value.float(), optimizer.state[mine][name])
    epochs(other_model, other, 2, 5)
    assert all(p.dtype is dtype and p.isfinite().all() for p in other_model.parameters())


@every_row
def test_states_load_into_another_device(row):
    model, optimizer = start(row)
    epochs(model, optimizer, 0, 2)
    with torch.device("meta"):
        other_model, other = start(row)
    other.load_state_dict(optimizer.state_dict())
    for parameter in other_model.parameters():
        for name, value in other.state[parameter].items():
            assert value.device.type == ("cpu" if name == "step" else "meta")


@every_row
def test_steps_saved_as_numbers_load(row):
    model, optimizer = start(row)
    epochs(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    plain = copy.deepcopy(state)
    for moments in plain["state"].values():
        if "step" in moments:
            moments["step"] = float(moments["step"])
    other_model, other = start(row)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(plain)
    epochs(model, optimizer, 2, 4), epochs(other_model, other, 2, 4)
    equal(model, other_model)


@every_method
def test_groups_of_another_version_are_refused(method):
    _, optimizer = start(f"{method}-sgd")
    for name in ("rule", "betas", "momentum", "update_scale"):
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][1][name]
        with pytest.raises(FNGDError, match=f"another version of hf_fngd .*{name}"):
            start(f"{method}-sgd")[1].load_state_dict(state)
    before = saved(optimizer.state_dict())
    state = torch.optim.SGD(network().parameters()).state_dict()
    with pytest.raises(FNGDError, match="resume with the optimizer that wrote it"):
        optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][1:]
    with pytest.raises(ValueError, match="match the size"):
        optimizer.load_state_dict(state)
    same(saved(optimizer.state_dict()), before)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def options(kind):
    return StateDictOptions(full_state_dict="full" in kind, cpu_offload="offload" in kind)


@pytest.mark.feature(
    "`torch.distributed.checkpoint`",
    "works",
    "with coefficients and curvature; not `flatten_optimizer_state_dict`",
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["memory", "folder", "full", "full file", "offload folder"])
@pytest.mark.parametrize(
    ("row", "momentum"),
    # Without momentum a weight of SGD has no state.
    [*((row, 0.9) for row in ROWS), *((row, 0.0) for row in ROWS if row.endswith("sgd"))],
)
def test_distributed_checkpoints_carry_everything(row, momentum, kind, tmp_path):
    model, optimizer = start(row, momentum=momentum)
    epochs(model, optimizer, 0, 3)
    weights, state = get_state_dict(model, optimizer, options=options(kind))
    twin, other = start(row, momentum=momentum)
    if "file" in kind:
        weights, state = saved((weights, state))
    elif "folder" in kind:
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        weights, state = get_state_dict(twin, other, options=options(kind))
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path, no_dist=True)
        weights, state = both["model"], both["optimizer"]
    set_state_dict(
        twin,
        other,
        model_state_dict=weights,
        optim_state_dict=state,
        options=options(kind),
    )
    same(saved(other.state_dict()), saved(optimizer.state_dict()))
    epochs(model, optimizer, 3, 6), epochs(twin, other, 3, 6)
    equal(model, twin)


@every_row
def test_reading_the_state_of_a_new_optimizer_changes_no_weight(row):
    # DCP makes a step with zero gradients, for the state to be there.
    model, optimizer = start(row)
    before = copy.deepcopy(model)
    get_optimizer_state_dict(model, optimizer)
    equal(before, model)
    twin, other = start(row)
    epochs(model, optimizer, 0, 5), epochs(twin, other, 0, 5)
    names = ("updates", "gram_seconds", "reuse_rate")
    found, expected = optimizer.statistics(), other.statistics()
    assert [found.get(n) for n in names[::2]] == [expected.get(n) for n in names[::2]]


@every_method
def test_reading_the_state_of_a_new_optimizer_changes_no_step(method):
    # AdamW counts the step for its bias correction, and torch's does so, too.
    model, twin = network(), network()
    for net in (model, twin):
        net[1].requires_grad_(False)
        settings = LASTING.get(method, {})
        if method == "tengrad":
            # Drawn labels differ from step to step.
            settings = settings | {"fisher_labels": "empirical"}
        weights = [p for p in net.parameters() if p.requires_grad]
        optimizer = make(net, f"{method}-sgd", weights, **settings)
        if net is model:
            get_optimizer_state_dict(net, optimizer)
        epochs(net, optimizer, 0, 5)
    equal(model, twin)


@every_method
def test_flattened_states_are_refused(method):
    model, optimizer = start(f"{method}-adamw")
    epochs(model, optimizer, 0, 2)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    twin, other = start(f"{method}-adamw")
    with pytest.raises(FNGDError, match="flatten_optimizer_state_dict=False"):
        set_optimizer_state_dict(twin, other, state, options=flat)


@every_row
def test_accelerate_saves_and_loads(row, tmp_path):
    def prepared():
        model, optimizer = start(row)
        accelerator = Accelerator(cpu=True)
        model, _ = accelerator.prepare(model, optimizer)
        return accelerator, model, optimizer

    accelerator, model, optimizer = prepared()
    epochs(model, optimizer, 0, 3)
    accelerator.save_state(tmp_path)
    accelerator, twin, other = prepared()
    accelerator.load_state(tmp_path)
    epochs(model, optimizer, 3, 6), epochs(twin, other, 3, 6)
    equal(model, twin)
    assert os.listdir(tmp_path)


def test_the_method_state_is_in_a_file_once():
    _, optimizer = start("fngd-sgd")
    fill_store(optimizer, range(20_000))
    state = optimizer.state_dict()
    assert state["fngd"]["store"]["table"].nbytes > 100_000
    buffer = io.BytesIO()
    torch.save(state, buffer)
    whole = buffer.tell()
    state["param_groups"][0].pop("fngd")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    assert whole < buffer.tell() + 1000

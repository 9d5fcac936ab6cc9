"""torch.optim's contract beyond single steps: groups, closures, hooks and wrappers."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_fngd import FNGDError
from hf_fngd.methods import METHODS
from tests.optim_rows import (
    LR,
    ROWS,
    SAMPLES,
    equal,
    give_gradients,
    make,
    network,
    torchs,
    train,
)

every_row = pytest.mark.parametrize("row", ROWS)
every_method = pytest.mark.parametrize("method", METHODS)


# ---- groups --------------------------------------------------------------------------------------


@every_row
def test_groups_have_their_own_settings(row):
    model = network()
    twin = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.01, "weight_decay": 0.3},
        {
            "params": [*model[1].parameters(), *model[3].parameters()],
            "momentum": 0.5,
            "betas": (0.5, 0.6),
        },
    ]
    optimizer = make(model, row, groups)
    theirs = torchs(optimizer, model, twin)
    for step in range(3):
        give_gradients(model, twin, seed=step)
        optimizer.step()
        for group, one in zip(optimizer.param_groups, theirs, strict=True):
            for p in one.param_groups[0]["params"] if group["rule"] == "sgd" else ():
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
            one.step()
    equal(twin, model)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, LR}


@pytest.mark.feature("torch.optim: `named_parameters`", "works")
@every_row
def test_named_parameters_make_the_same_steps(row):
    model, twin = network(), network()
    named, plain = make(model, row, model.named_parameters()), make(twin, row)
    train(model, named), train(twin, plain)
    equal(twin, model)
    for group in named.param_groups:
        assert [model.get_parameter(n) for n in group["param_names"]] == group["params"]
    # A state goes from either to the other; the names are those of the state, if it has any.
    plain.load_state_dict(named.state_dict())
    assert "param_names" in plain.param_groups[0]
    bare = make(twin, row)
    named.load_state_dict(bare.state_dict())
    assert "param_names" in named.param_groups[0]


@pytest.mark.feature(
    "torch.optim: `add_param_group`", "works", "divided like the groups of the constructor"
)
@pytest.mark.parametrize("names", [False, True])
@every_row
def test_groups_added_later_are_divided_like_the_first_ones(row, names):
    def members(part, prefix):
        return part.named_parameters(prefix) if names else part.parameters()

    model, twin = network(), network()
    whole = [{"params": members(model[i], str(i))} for i in (0, 1, 3)]
    at_once = make(model, row, whole, other_lr=0.01)
    later = make(twin, row, members(twin[0], "0"), other_lr=0.01)
    for i in (1, 3):
        later.add_param_group({"params": members(twin[i], str(i))})

    def rules(net, optimizer):
        name = {id(p): n for n, p in net.named_parameters()}
        return {
            name[id(p)]: (g["rule"], g["lr"]) for g in optimizer.param_groups for p in g["params"]
        }

    assert rules(twin, later) == rules(model, at_once)
    train(model, at_once), train(twin, later)
    equal(twin, model)
    for wrong, error in (
        ({"params": members(twin[3], "3")}, ValueError),
        ({"params": set(twin[3].parameters())}, TypeError),
        (twin[3].parameters(), TypeError),
        ({"params": [nn.Parameter(torch.zeros(2))], "maximize": True}, FNGDError),
    ):
        count = len(later.param_groups)
        with pytest.raises(error):
            later.add_param_group(wrong)
        assert len(later.param_groups) == count


@pytest.mark.feature(
    "Gradual unfreezing with `add_param_group`",
    "works",
    "AdamW updates layers that were frozen when the optimizer was made, with a warning",
)
@every_row
def test_gradual_unfreezing(row, caplog):
    model = network()
    model[0].requires_grad_(False)
    optimizer = make(model, row, [p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 2)
    before = copy.deepcopy(model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.01})
    assert optimizer.param_groups[-1]["rule"] == "adamw"
    assert "make the optimizer anew" in caplog.text
    train(model, optimizer, 2, first=2)
    assert all(
        not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )
    again = make(network(), row)
    with pytest.raises((ValueError, FNGDError), match="group|layers"):
        again.load_state_dict(optimizer.state_dict())


# ---- closures and hooks --------------------------------------------------------------------------


@pytest.mark.feature("torch.optim: `step(closure)`", "works", "evaluated once, before the step")
@every_row
def test_closure_is_evaluated_once_before_the_step(row):
    model, twin = network(), network()
    first, second = make(model, row), make(twin, row)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        first.zero_grad()
        torch.manual_seed(len(calls))
        first.set_batch(range(SAMPLES))
        loss = model(torch.randn(SAMPLES, 6)).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    for step in range(3):
        assert first.step(closure) is calls[-1]
        assert len(calls) == step + 1
    train(twin, second)
    equal(twin, model)


@pytest.mark.feature("torch.optim: hooks of steps and of state dicts", "works")
@every_row
def test_hooks_around_a_step(row):
    model = network()
    optimizer = make(model, row)
    seen = []

    def note(name):
        return lambda who, args, kwargs: seen.append((name, who is optimizer, who.steps))

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("global after")),
    ]
    try:
        train(model, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    expected = [("global before", 0), ("before", 0), ("after", 1), ("global after", 1)]
    assert seen == [(name, True, steps) for name, steps in expected]
    train(model, optimizer, 1)
    assert len(seen) == 4


@every_method
def test_steps_are_found_in_a_profile(method):
    model = network()
    optimizer = make(model, f"{method}-sgd")
    with torch.profiler.profile() as profile:
        train(model, optimizer, 1)
    names = {event.key for event in profile.key_averages()}
    kind = type(optimizer).__name__
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= names


@every_row
def test_an_optimizer_can_be_printed(row):
    optimizer = make(network(), row)
    text = str(optimizer)
    assert text.startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")
    assert f"lr: {LR}" in text and f"rule: {row.split('-')[1]}" in text


@pytest.mark.feature("accelerate's wrapper of an optimizer", "works")
@every_row
def test_accelerate_wraps_an_optimizer(row):
    model, twin = network(), network()
    wrapped = Accelerator(cpu=True).prepare(make(model, row))
    own = wrapped.optimizer
    plain = make(twin, row)
    for step in range(3):
        own.set_batch(range(SAMPLES)), plain.set_batch(range(SAMPLES))
        torch.manual_seed(step)
        x = torch.randn(SAMPLES, 6)
        for net, optimizer in ((model, wrapped), (twin, plain)):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    equal(twin, model)
    assert wrapped.defaults.items() >= plain.defaults.items()
    wrapped.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert own.param_groups[-1]["rule"] == "adamw"


@pytest.mark.feature("torch.optim: `torch.compile` of a step", "works", "breaks the graph")
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
@pytest.mark.parametrize("row", ["fngd-sgd", "kfac-adamw", "plain-muon"])
@pytest.mark.slow
def test_a_compiled_step_is_the_same(row):
    torch.compiler.reset()
    model, twin = network(), network()
    first, second = make(model, row), make(twin, row)
    step = torch.compile(first.step, backend="eager")
    for number in range(3):
        give_gradients(model, twin, seed=number)
        step(), second.step()
    equal(twin, model)
    assert first.steps == second.steps == 3

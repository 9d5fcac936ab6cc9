"""torch.optim's contract: what torch's tests ask of an optimizer works in every row, or is refused.

A row is a method with an update rule. The features and inputs come from torch's database of
optimizers (`optim_db`). With gradients that no captured layer delivered every method is its update
rule, so that each row is compared with torch's own optimizer, bit for bit.
"""

import copy
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from hf_fngd import FNGDError
from hf_fngd.methods import METHODS
from tests.optim_rows import (
    INFOS,
    LR,
    ROWS,
    RULES,
    SAMPLES,
    equal,
    give_gradients,
    make,
    network,
    torch_optimizer,
    torchs,
    train,
)

every_row = pytest.mark.parametrize("row", ROWS)
every_method = pytest.mark.parametrize("method", METHODS)

# Arguments of torch's optimizers that have another name here, or none.
RENAMED = {
    "lr": lambda value: {"lr": value},
    "weight_decay": lambda value: {"weight_decay": value},
    "momentum": lambda value: {"momentum": value},
    "eps": lambda value: {"adam_epsilon": value},
    "betas": lambda value: {"adam_beta1": value[0], "adam_beta2": value[1]},
}
FLAGS = sorted(
    {"foreach", "maximize", "capturable", "differentiable"}.union(
        *(info.supported_impls for info in INFOS.values()),
        *(info.not_og_supported_flags for info in INFOS.values()),
        *(
            given.kwargs.keys() - RENAMED.keys()
            for info in INFOS.values()
            for given in info.optim_inputs_func(device="cpu")
        ),
    )
)


def ours(kwargs):
    return {k: v for name, value in kwargs.items() for k, v in RENAMED[name](value).items()}


# ---- steps ---------------------------------------------------------------------------------------

INPUTS = [
    pytest.param(f"{method}-{rule}", given.kwargs, id=f"{method}-{rule}-{given.desc}")
    for method, rule in product(METHODS, RULES)
    for given in INFOS[rule].optim_inputs_func(device="cpu")
    if given.kwargs.keys() <= RENAMED.keys()
]


@pytest.mark.feature("torch.optim: constructor arguments, steps", "works", "as torch's optimizers")
@pytest.mark.parametrize(("row", "kwargs"), INPUTS)
def test_steps_are_torchs(row, kwargs):
    model = network()
    twin = copy.deepcopy(model)
    optimizer = make(model, row, **ours(kwargs))
    decay = kwargs.get("weight_decay", 0.0)
    theirs = torchs(optimizer, model, twin)
    for step in range(5):
        give_gradients(model, twin, seed=step)
        optimizer.step()
        for group, one in zip(optimizer.param_groups, theirs, strict=True):
            # torch's SGD adds the decay to the gradient, ours is decoupled like AdamW's.
            for p in one.param_groups[0]["params"] if group["rule"] == "sgd" else ():
                p.data.mul_(1 - group["lr"] * decay)
            one.step()
        equal(twin, model)
    assert all(optimizer.state[p] for p in model.parameters() if "momentum" in kwargs)


@every_row
def test_the_loss_goes_down(row):
    model = network()
    losses = train(model, make(model, row, lr=0.01), 60)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.feature("torch.optim: learning rate as a tensor", "works")
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scale", ["none", "rms"])
@every_row
def test_tensor_lr(row, scale, shape):
    model = network()
    twin = copy.deepcopy(model)
    settings = {"weight_decay": 0.1, "update_scale": scale}
    first = make(model, row, lr=torch.full(shape, 0.05), **settings)
    second = make(twin, row, lr=0.05, **settings)
    train(model, first), train(twin, second)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], msg=name)
    assert all(isinstance(group["lr"], torch.Tensor) for group in first.param_groups)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.feature(
    "torch.optim: maximize, capturable, differentiable, foreach, fused, amsgrad and the like",
    "refused",
)
@every_method
def test_flags_are_refused(method, flag):
    model = network()
    with pytest.raises(FNGDError, match=rf"^{flag} is not .*: \w+"):
        make(model, f"{method}-sgd", **{flag: True})
    with pytest.raises(FNGDError, match=rf"^{flag} is not .*: \w+"):
        make(model, f"{method}-sgd", [{"params": model.parameters(), flag: True}])
    # As a group of one of torch's optimizers has it.
    make(model, f"{method}-sgd", [{"params": model.parameters(), flag: None}])


# Errors of torch's optimizers that are none here, and why.
NO_ERRORS = {
    "only support 2D parameters": "AdamW updates what is not the matrix of a selected layer",
    "does not support complex parameters": "AdamW updates them",
}
ERRORS = [
    pytest.param(
        f"{method}-{rule}", number, id=f"{method}-{rule}-{given.optimizer_error_input.desc}"
    )
    for method, rule in product(METHODS, RULES)
    for number, given in enumerate(INFOS[rule].optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize(("row", "number"), ERRORS)
def test_wrong_arguments_are_refused(row, number):
    given = INFOS[row.split("-")[1]].optim_error_inputs_func("cpu", torch.float32)[number]
    wrong = given.optimizer_error_input
    model = network()
    settings = {}
    for name, value in wrong.kwargs.items():
        settings |= RENAMED[name](value) if name in RENAMED else {name: value}
    if wrong.desc in NO_ERRORS:
        optimizer = make(model, row, wrong.params)
        wrong.params[0].grad = torch.ones_like(wrong.params[0])
        optimizer.step()
        assert given.error_on is OptimizerErrorEnum.STEP_ERROR or "2D" in wrong.desc
        return
    if given.error_type is UserWarning:
        with pytest.warns(UserWarning, match=given.error_regex):
            make(model, row, wrong.params, **settings)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        make(model, row, wrong.params, **settings)
    assert wrong.params is None or isinstance(caught.value, given.error_type)


@every_method
def test_wrong_kinds_of_params_are_refused(method):
    model = network()
    for params, error in (
        ([], ValueError),
        (model[0].weight, TypeError),
        ([{"params": set(model.parameters())}], TypeError),
        ([1.0], TypeError),
        ([model[0].weight * 2], ValueError),
    ):
        with pytest.raises(error):
            make(model, f"{method}-sgd", params)
    for lr in (-1.0, torch.tensor(-1.0), torch.tensor([0.1, 0.1]), "0.1", torch.tensor(torch.nan)):
        with pytest.raises(FNGDError, match="lr must be"):
            make(model, f"{method}-sgd", lr=lr)


# ---- gradients of unusual kinds ------------------------------------------------------------------


@pytest.mark.feature(
    "torch.optim: zero gradients instead of none",
    "works",
    "as torch's SGD, AdamW and Muon; with `update_scale=rms` an SGD weight stands still",
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_row
def test_zero_gradients_are_torchs(row, decay):
    model = network()
    twin = copy.deepcopy(model)
    optimizer = make(model, row, weight_decay=decay if "sgd" not in row else 0.0)
    theirs = torchs(optimizer, model, twin)
    for step in range(6):
        give_gradients(model, twin, seed=step)
        if step > 2:
            optimizer.zero_grad(set_to_none=False)
            for one in theirs:
                one.zero_grad(set_to_none=False)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        for one in theirs:
            one.step()
    equal(twin, model)


@every_row
def test_zero_gradients_at_first_change_nothing(row):
    model = network()
    before = copy.deepcopy(model)
    optimizer = make(model, row)
    for _ in range(3):
        optimizer.set_batch(range(SAMPLES))
        (0 * model(torch.randn(SAMPLES, 6))).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    equal(before, model)


@every_row
def test_parameters_without_gradient_stay(row):
    model = network()
    before = copy.deepcopy(model)
    optimizer = make(model, row, weight_decay=0.5)
    assert optimizer.step() is None
    equal(before, model)
    assert not any(optimizer.state.values())
    give_gradients(model)
    model[3].weight.grad = None
    optimizer.step()
    assert torch.equal(model[3].weight, before[3].weight)
    assert not torch.equal(model[0].weight, before[0].weight)


@every_row
def test_a_parameter_without_elements_trains(row):
    model = network()
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    optimizer = make(model, row)
    for step in range(2):
        give_gradients(model, seed=step)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()
        self.mix = nn.Linear(4, 3, dtype=torch.cfloat)

    def forward(self, x):
        return self.mix(self.body(x).to(torch.cfloat)).abs()


@pytest.mark.feature("torch.optim: complex parameters", "works", "updated by AdamW")
@every_row
def test_complex_layers_follow_torchs_adamw(row):
    assert INFOS["adamw"].supports_complex
    model = Complex()
    twin = copy.deepcopy(model)
    optimizer = make(model, row)
    assert not [name for name in optimizer.layer_names if "mix" in name]
    train(model, optimizer, 2)
    own = [
        p for group in optimizer.param_groups if group["rule"] == "adamw" for p in group["params"]
    ]
    assert any(model.mix.weight is p for p in own)
    model.load_state_dict(twin.state_dict())
    optimizer = make(model, row)
    theirs = torchs(optimizer, model, twin)
    for step in range(3):
        give_gradients(model, twin, seed=step)
        for one in (optimizer, *theirs):
            one.step()
    torch.testing.assert_close(model.mix.weight, twin.mix.weight)


@every_row
def test_mixed_dtypes_in_one_group(row):
    model = network()
    model[3].double()
    optimizer = make(model, row)
    own = {name: p.dtype for name, p in model.named_parameters()}
    half = nn.Parameter(torch.randn(3, 2, dtype=torch.bfloat16))
    optimizer.param_groups[-1]["params"].append(half)
    model.register_parameter("low", half)
    before = copy.deepcopy(model)
    for step in range(3):
        give_gradients(model, seed=step)
        optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert p.dtype == own.get(name, torch.bfloat16)
        assert p.isfinite().all() and not torch.equal(p, old)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@every_row
def test_gradients_of_lower_precision(row):
    model = network()
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.grad_dtype = torch.bfloat16
    first, second = make(model, row), make(twin, row)
    for step in range(3):
        give_gradients(twin, seed=step)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = other.grad.bfloat16()
            other.grad = mine.grad.float()
        first.step(), second.step()
    equal(twin, model)
    # Of a layer that is captured, too.
    assert train(model, first, 2)[1].isfinite()


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


# ---- torch's own tests ---------------------------------------------------------------------------


def test_torch_optimizer_of_a_group_is_complete():
    # Guards the reference of this file: it must know the settings that a step reads.
    optimizer = make(network(), "plain-adamw", weight_decay=0.1)
    group = optimizer.param_groups[0]
    theirs = torch_optimizer(group, group["params"]).param_groups[0]
    shared = theirs.keys() & group.keys() - {"params"}
    assert {name: theirs[name] for name in shared} == {name: group[name] for name in shared}

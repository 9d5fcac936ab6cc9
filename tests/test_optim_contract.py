"""torch.optim's contract: what torch's tests ask of an optimizer works in every row, or is refused.

A row is a method with an update rule. The features and inputs come from torch's database of
optimizers (`optim_db`). With gradients that no captured layer delivered every method is its update
rule, so that each row is compared with torch's own optimizer, bit for bit.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

from hf_fngd import FNGDError
from hf_fngd.methods import METHODS
from tests.optim_rows import (
    INFOS,
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
    losses = train(model, make(model, row, lr=0.01), 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


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
def test_parameters_without_elements_or_dimensions_train(row):
    model = network()
    model.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    model.register_parameter("scalar", nn.Parameter(torch.ones(())))
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


class Strided(nn.Module):
    """Layers whose parameters have gaps or another order in memory."""

    def __init__(self, strided):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(16, 3)
        if strided:
            for p in (self.out.weight, self.out.bias):
                p.data = torch.stack([p.data, p.data], -1)[..., 0]
            self.conv.weight.data = self.conv.weight.data.permute(1, 2, 3, 0).contiguous()
            self.conv.weight.data = self.conv.weight.data.permute(3, 0, 1, 2)

    def forward(self, x):
        return self.out(self.conv(x.view(SAMPLES, 3, 4, 4)).flatten(1))


@pytest.mark.parametrize("scale", ["none", "rms"])
@every_row
def test_strided_parameters_make_the_same_steps(row, scale):
    found = []
    for strided in (True, False):
        model = Strided(strided)
        assert model.out.weight.is_contiguous() != strided
        own = {"kl_clip": None} if row.split("-")[0] not in ("fngd", "plain") else {}
        optimizer = make(model, row, lr=0.01, update_scale=scale, **own)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.set_batch(range(SAMPLES))
            model(torch.randn(SAMPLES, 48)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    for name, value in found[1].state_dict().items():
        mine = found[0].state_dict()[name]
        # Muon orthogonalizes in bfloat16.
        allowed = 2e-3 if "muon" in row else 1e-5
        torch.testing.assert_close(mine, value, rtol=allowed, atol=allowed, msg=name)


@pytest.mark.feature(
    "torch.optim: parameters and gradients of any memory layout",
    "works",
    "also where torch's `AdamW(fused=True)` on a CPU is wrong: strides that differ",
)
@pytest.mark.parametrize("part", ["parameter", "gradient", "state"])
@every_row
def test_layouts_that_differ_make_the_same_steps(row, part):
    found = []
    for turned in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 3, 2))
        if turned and part == "parameter":
            model.to(memory_format=torch.channels_last)
        optimizer = make(model, row)
        for step in range(3):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
                if turned and part == "gradient" and p.dim() == 4:
                    p.grad = p.grad.contiguous(memory_format=torch.channels_last)
            optimizer.step()
            for moments in optimizer.state.values() if turned and part == "state" else ():
                for name, value in moments.items():
                    if value.dim() == 4:
                        moments[name] = value.contiguous(memory_format=torch.channels_last)
        found.append(model)
    for name, value in found[1].state_dict().items():
        torch.testing.assert_close(found[0].state_dict()[name], value, msg=name)


@every_row
def test_a_layer_frozen_for_some_steps_stays_and_then_goes_on(row):
    model = network()
    optimizer = make(model, row)
    train(model, optimizer, 2)
    before = copy.deepcopy(model)
    model[3].requires_grad_(False)
    train(model, optimizer, 2, first=2)
    equal(before[3], model[3])
    assert not torch.equal(before[0].weight, model[0].weight)
    model[3].requires_grad_(True)
    train(model, optimizer, 2, first=4)
    assert not torch.equal(before[3].weight, model[3].weight)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["fngd", "plain"])
def test_a_step_leaves_gradients_alone(method, rule):
    """The others put their direction into `.grad`, as clipping does."""
    model = network()
    optimizer = make(model, f"{method}-{rule}", weight_decay=0.1)
    for _ in range(2):
        optimizer.set_batch(range(SAMPLES))
        model(torch.randn(SAMPLES, 6)).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        optimizer.zero_grad()


def test_torch_optimizer_of_a_group_is_complete():
    # Guards the reference of this file: it must know the settings that a step reads.
    optimizer = make(network(), "plain-adamw", weight_decay=0.1)
    group = optimizer.param_groups[0]
    theirs = torch_optimizer(group, group["params"]).param_groups[0]
    shared = theirs.keys() & group.keys() - {"params"}
    assert {name: theirs[name] for name in shared} == {name: group[name] for name in shared}

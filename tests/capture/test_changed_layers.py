"""What happens on a captured layer after it was captured is noticed, or harmless."""

import copy
import random

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from hf_fngd import FNGDError, create_fngd_optimizer
from hf_fngd.methods import METHODS
from tests.helpers import assert_same, gradients
from tests.methods.method_oracles import make

ALL = [name for name in METHODS if name != "plain"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def rows(n=3):
    return torch.randn(n, 6, dtype=torch.float64)


def settings(method):
    return {"share": "none"} if method == "fngd" else {"fisher_labels": "empirical"}


def step(model, optimizer, x):
    model.zero_grad()
    optimizer.set_batch(range(len(x)))
    model(x).square().mean().backward()
    found = gradients(model)
    optimizer.step()
    return found


# ---- functional transforms and second derivatives -----------------------------------------------


@pytest.mark.feature("torch.func, second derivatives", "works", "plain gradients")
@pytest.mark.parametrize("method", ALL)
def test_transforms_see_the_plain_layer(method):
    model, x = net(), rows()
    plain = copy.deepcopy(model)
    optimizer = make(model, method, **settings(method))
    optimizer.set_batch(range(len(x)))
    direction = torch.ones_like(x)
    for transform in (
        lambda m: torch.func.jvp(m, (x,), (direction,))[1],
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.jacrev(m)(x[0]),
        lambda m: torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).square().mean())(
            {k: v.detach() for k, v in m.named_parameters()}
        )["0.weight"],
    ):
        torch.testing.assert_close(transform(model), transform(plain), rtol=1e-12, atol=0)
    assert not optimizer.batches.left_out
    found = step(model, optimizer, x)
    assert not torch.equal(found["0.weight"], step_plain(plain, x)["0.weight"]) or method != "fngd"


def step_plain(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return gradients(model)


@pytest.mark.parametrize("phase", ["collect", "reuse"])
def test_gradient_penalty_and_hessian_products_are_plain(phase):
    model, x = net(), rows()
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=0.0, share="layer")
    step(model, optimizer, x)
    if phase == "reuse":
        optimizer.start_epoch(1)
    found = []
    for which in (model, plain):
        which.zero_grad()
        optimizer.set_batch(range(len(x)))
        inputs = x.clone().requires_grad_()
        out = which(inputs).square().mean()
        (slope,) = torch.autograd.grad(out, inputs, create_graph=True)
        (out + slope.square().sum()).backward()
        found.append(gradients(which))
        (first,) = torch.autograd.grad(which(x).square().mean(), which[0].weight, create_graph=True)
        found[-1]["product"] = torch.autograd.grad(first.sum(), which[2].weight)[0]
    assert_same(*found, rtol=1e-12, atol=1e-15)
    assert optimizer.batches.left_out == {"0", "2"}


def test_meta_learning_steps_are_plain():
    model, x = net(), rows()
    plain = copy.deepcopy(model)
    create_fngd_optimizer(model, lr=0.0, share="none").set_batch(range(len(x)))
    found = []
    for which in (model, plain):
        loss = which(x).square().mean()
        slopes = torch.autograd.grad(loss, [*which.parameters()], create_graph=True)
        names = dict(which.named_parameters())
        fast = {k: p - 0.1 * g for (k, p), g in zip(names.items(), slopes, strict=True)}
        torch.func.functional_call(which, fast, (x,)).square().mean().backward()
        found.append(gradients(which))
    assert_same(*found, rtol=1e-12, atol=1e-15)


# ---- the weight is replaced ----------------------------------------------------------------------

CHANGES = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "forward": lambda layer: setattr(
        layer, "forward", lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    ),
    "tied": lambda layer: layer.register_forward_hook(
        lambda module, args, out: out + nn.functional.linear(args[0], module.weight)
    ),
}


@pytest.mark.feature("Pruning, weight norm, replaced forward", "works", "the layer is left out")
@pytest.mark.parametrize("after", [0, 1], ids=["before training", "while training"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ALL)
def test_a_changed_layer_is_left_out_with_its_plain_gradient(method, change, after):
    model, x = net(), rows()
    optimizer = make(model, method, **settings(method))
    for _ in range(after):
        step(model, optimizer, x)
    plain = copy.deepcopy(model)
    for which in (model, plain):
        torch.manual_seed(0)
        CHANGES[change](which[0])
    for _ in range(2):
        found = step(model, optimizer, x)
        wanted = step_plain(plain, x)
        for name in wanted:
            if name.startswith("0."):
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)
        plain.load_state_dict(model.state_dict())
    # Curvature that is kept for many steps is looked at again when it is due.
    if not (after and change in ("forward", "tied") and optimizer.steps < optimizer_due(optimizer)):
        assert optimizer.batches.left_out == {"0"}
    optimizer.detach()
    assert torch.equal(model(x), plain(x))


def optimizer_due(optimizer):
    return getattr(optimizer, "next_update", 0)


def test_a_parametrization_outlives_the_capture():
    model, x = net(), rows()
    optimizer = create_fngd_optimizer(model, lr=1e-2, share="none")
    weight_norm(model[0])
    optimizer.detach()
    before = model(x)
    remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=0)
    assert type(model[2]) is nn.Linear


def test_a_method_that_somebody_kept_works_after_detach():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = net(), rows()
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=1e-2, share="none")
    add_hook_to_module(model[0], ModelHook())
    optimizer.detach()
    assert torch.equal(model(x), plain(x))
    remove_hook_from_module(model[0])
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("first", [True, False], ids=["frozen later", "trained later"])
def test_a_bias_that_is_frozen_or_trained_later(method, first):
    model, x = net(), rows()
    model[0].bias.requires_grad_(first)
    optimizer = make(model, method, lr=0.1, **settings(method))
    for trains in (first, not first, first):
        model[0].bias.requires_grad_(trains)
        before = model[0].bias.detach().clone()
        found = step(model, optimizer, x)
        assert ("0.bias" in found) is trains
        # What was frozen when the optimizer was made is not in its groups.
        assert torch.equal(model[0].bias, before) is not (trains and first)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ALL)
def test_parameters_are_frozen_and_thawed_at_any_moment(method, seed):
    """As in a GAN, which freezes its discriminator between its forward and its backward pass."""
    draw = random.Random(seed)
    model = net()
    twin = copy.deepcopy(model)
    optimizer = make(model, method, **settings(method))

    def flip(chance):
        for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
            if draw.random() < chance:
                its.requires_grad_(mine.requires_grad_(draw.random() < 0.6).requires_grad)

    for _ in range(12):
        flip(0.4)
        if not any(p.requires_grad for p in model.parameters()):
            model[2].bias.requires_grad_(True)
            twin[2].bias.requires_grad_(True)
        x = rows()
        model.zero_grad()
        twin.zero_grad()
        optimizer.set_batch(range(len(x)))
        losses = [one(x).square().mean() for one in (model, twin)]
        flip(0.3)
        for loss in losses:
            loss.backward()
        before = copy.deepcopy(model)
        optimizer.step()
        for (name, mine), its in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (mine.grad is None) == (its.grad is None), name
            changed = not torch.equal(mine, before.get_parameter(name))
            assert changed <= (mine.grad is not None), name
            assert mine.isfinite().all()


# ---- other optimizers ----------------------------------------------------------------------------


@pytest.mark.feature("Another optimizer on an attached model", "refused")
def test_another_optimizer_gets_no_weighted_gradient():
    model, x = net(), rows()
    optimizer = create_fngd_optimizer(model, lr=1e-2, share="none")
    other = torch.optim.AdamW(model.parameters())
    step(model, optimizer, x)
    optimizer.set_batch(range(3))
    model(x).square().mean().backward()
    before = model[0].weight.detach().clone()
    with pytest.raises(FNGDError, match=r"call detach\(\)"):
        other.step()
    assert torch.equal(model[0].weight, before)
    optimizer.detach()
    other.zero_grad()
    model(x).square().mean().backward()
    other.step()
    optimizer.attach()
    with pytest.raises(FNGDError, match=r"call detach\(\)"):
        other.step()


def test_optimizers_of_other_parameters_and_wrappers_step():
    model, x = net(), rows()
    critic = nn.Linear(4, 1).double()
    optimizer = create_fngd_optimizer(model, lr=1e-2, share="none")
    other = torch.optim.SGD(critic.parameters(), lr=0.1)

    class Sharp(torch.optim.Optimizer):
        """As SAM wraps an optimizer."""

        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

        def step(self, closure=None):
            return self.base.step(closure)

    wrapper = Sharp(optimizer)
    optimizer.set_batch(range(3))
    critic(model(x)).square().mean().backward()
    before = model[0].weight.detach().clone()
    other.step()
    wrapper.step()
    assert not torch.equal(model[0].weight, before)


def test_the_optimizer_that_came_last_has_the_layers():
    model, x = net(), rows()
    first = create_fngd_optimizer(model, lr=1e-2, share="none")
    second = create_fngd_optimizer(model, lr=1e-2, share="none")
    second.set_batch(range(3))
    model(x).square().mean().backward()
    with pytest.raises(FNGDError, match=r"call detach\(\)"):
        first.step()
    second.step()
    first.detach()
    step(model, second, x)

"""Learning-rate schedulers, averages of weights and BatchNorm updates treat every row as torch's.

Schedulers come from torch.optim.lr_scheduler itself and from torch's database of optimizers.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from hf_fngd.methods import METHODS
from tests.optim_rows import (
    INFOS,
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
STEPS = 6


def parts(kind):
    """Return a scheduler of schedulers."""

    def build(optimizer):
        first = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2)
        second = lr_scheduler.ExponentialLR(optimizer, 0.9)
        if kind is lr_scheduler.SequentialLR:
            return kind(optimizer, [first, second], milestones=[2])
        return kind([first, second], optimizer=optimizer)

    return build


# How to build each scheduler of torch for any optimizer.
BUILD = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.8),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.7),
    "SequentialLR": parts(lr_scheduler.SequentialLR),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "ChainedScheduler": parts(lr_scheduler.ChainedScheduler),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=STEPS + 1),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, power=2.0),
    "SWALR": partial(SWALR, swa_lr=0.01, anneal_epochs=3),
}


def advance(scheduler, loss=1.0):
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*[loss] if plateau else [])


def test_every_scheduler_of_torch_is_tested():
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert known | {"SWALR"} == BUILD.keys()


@pytest.mark.feature(
    "torch.optim: all schedulers of `lr_scheduler`, `SWALR`",
    "works",
    "lists of values need one for each of `optimizer.param_groups`",
)
@pytest.mark.parametrize("name", BUILD)
@every_row
def test_scheduled_steps_are_torchs(row, name):
    """Learning rates, and momentum where the scheduler moves it, reach the rule of every group."""
    model = network()
    twin = copy.deepcopy(model)
    optimizer = make(model, row)
    theirs = torchs(optimizer, model, twin)
    schedulers = [BUILD[name](one) for one in (optimizer, *theirs)]
    seen = set()
    for step in range(STEPS):
        give_gradients(model, twin, seed=step)
        for one in (optimizer, *theirs):
            one.step()
        lrs = [group["lr"] for one in theirs for group in one.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == lrs
        seen.update(lrs)
        for scheduler in schedulers:
            advance(scheduler)
    equal(twin, model)
    assert len(seen) > 1


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("rule", ["sgd", "muon"])
@every_method
def test_momentum_cycles_under_the_scale_rms(method, rule, name):
    found = []
    for cycled in (True, False):
        model = network()
        optimizer = make(model, f"{method}-{rule}", update_scale="rms")
        scheduler = BUILD[name](optimizer, cycle_momentum=cycled)
        for step in range(STEPS):
            give_gradients(model, seed=step)
            optimizer.step()
            advance(scheduler)
        found.append(model[0].weight)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("row", "number"),
    [(row, i) for row in ROWS for i in range(len(INFOS[row.split("-")[1]].scheduler_inputs))],
)
def test_the_schedulers_of_torchs_database_train(row, number):
    model = network()
    optimizer = make(model, row, lr=0.01)
    builders = INFOS[row.split("-")[1]].scheduler_inputs[number]
    schedulers = [build(optimizer) for build in builders]
    losses = []
    for step in range(16):
        losses += train(model, optimizer, 1, first=step)
        for scheduler in schedulers:
            advance(scheduler, losses[-1])
    assert sum(losses[-4:]) < sum(losses[:4])


@every_row
def test_schedulers_count_groups(row):
    optimizer = make(network(), row, other_lr=0.01)
    count = len(optimizer.param_groups)
    for wrong in (count - 1, count + 1):
        with pytest.raises(ValueError, match=f"{count}"):
            lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5] * wrong)
    factors = [0.5**number for number in range(count)]
    start = [group["lr"] for group in optimizer.param_groups]
    assert {LR, 0.01} == set(start)
    lr_scheduler.LambdaLR(optimizer, [lambda step, f=f: f for f in factors])
    expected = [lr * factor for lr, factor in zip(start, factors, strict=True)]
    assert [group["lr"] for group in optimizer.param_groups] == expected


@every_row
def test_a_group_added_under_a_scheduler_is_scheduled_as_torchs(row):
    def run(optimizer, new):
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.step()
        scheduler.step()
        try:
            optimizer.add_param_group({"params": [new], "lr": 1.0})
            optimizer.step()
            scheduler.step()
        except Exception as error:
            return type(error)
        return optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]

    expected = run(torch.optim.AdamW(network().parameters(), LR), nn.Parameter(torch.zeros(3)))
    assert run(make(network(), row), nn.Parameter(torch.zeros(3))) == expected


@pytest.mark.parametrize("name", BUILD)
@every_method
def test_a_scheduled_run_resumes(method, name):
    """Scheduler and optimizer restored from their states go on as if nothing had been."""

    def start():
        model = network()
        optimizer = make(model, f"{method}-sgd", lr=torch.tensor(LR) if "Cyc" not in name else LR)
        return model, optimizer, BUILD[name](optimizer)

    def go(model, optimizer, scheduler, first, last):
        for step in range(first, last):
            train(model, optimizer, 1, first=step)
            advance(scheduler)

    model, optimizer, scheduler = start()
    go(model, optimizer, scheduler, 0, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    go(model, optimizer, scheduler, 3, STEPS)
    twin, other, second = start()
    for one, state in zip((twin, second, other), (saved[0], saved[2], saved[1]), strict=True):
        one.load_state_dict(state)
    go(twin, other, second, 3, STEPS)
    equal(model, twin)


# ---- averages ------------------------------------------------------------------------------------


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(self.body(x))


def pictures(model, optimizer, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.set_batch(range(SAMPLES))
        x = torch.randn(SAMPLES, 3, 6, 6)
        nn.functional.cross_entropy(model(x), torch.arange(SAMPLES) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.feature("`torch.optim.swa_utils`", "works", "averages are plain modules")
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@every_method
def test_averaged_models_are_plain(method, labels):
    own = {} if method in ("fngd", "plain") else {"fisher_labels": labels}
    start = Pictures()
    model, twin = copy.deepcopy(start), copy.deepcopy(start)
    optimizer, other = make(model, f"{method}-sgd", **own), make(twin, f"{method}-sgd", **own)
    averages = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    snapshots = []
    for _ in range(3):
        pictures(model, optimizer, 1)
        for average in averages:
            average.update_parameters(model)
        snapshots.append(model.head.weight.detach().clone())
    mean = torch.stack(snapshots).mean(0)
    torch.testing.assert_close(averages[0].module.head.weight, mean)
    ema = snapshots[0].lerp(snapshots[1], 0.5).lerp(snapshots[2], 0.5)
    torch.testing.assert_close(averages[1].module.head.weight, ema)
    for average in averages:
        assert type(average.module.head) is nn.Linear
        assert type(average.module.body[0]) is nn.Conv2d
    # Neither averaging nor BatchNorm updates of the average reach the run.
    batches = [torch.randn(SAMPLES, 3, 6, 6) for _ in range(3)]
    update_bn(batches, averages[0])
    reference = copy.deepcopy(start)
    reference.load_state_dict(averages[0].module.state_dict())
    update_bn(batches, reference)
    equal(reference, averages[0].module)
    # The average trains by itself, with a plain gradient and no trace in the optimizer.
    optimizer.set_batch(range(SAMPLES))
    averages[0].train()(batches[0]).square().mean().backward()
    reference.train()(batches[0]).square().mean().backward()
    assert torch.equal(averages[0].module.head.weight.grad, reference.head.weight.grad)
    for _ in range(3):
        pictures(twin, other, 1)
    pictures(model, optimizer), pictures(twin, other)
    equal(twin, model)


@every_method
def test_batch_norm_updates_of_the_model_itself_change_no_step(method):
    model, twin = Pictures(), Pictures()
    optimizer, other = make(model, f"{method}-sgd"), make(twin, f"{method}-sgd")
    pictures(model, optimizer), pictures(twin, other)
    batches = [torch.randn(SAMPLES + 1, 3, 6, 6) for _ in range(2)]
    update_bn(batches, model)
    other.detach()
    update_bn(batches, twin)
    equal(twin, model)
    other.attach()
    pictures(model, optimizer), pictures(twin, other)
    equal(twin, model)

"""One step is the same however its loss was divided or scaled, in a plain and in accelerate's loop.

Every row repeats four times, so that each micro-batch of an accumulated step has the same samples
as the whole batch. Relative damping counts in units of a micro-batch's mean eigenvalue; there the
reference is a loop that tells its scale.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_fngd import FNGDError, create_preconditioned_optimizer
from hf_fngd.methods import METHODS

ROWS, PARTS, SCALE = 8, 4, 2.0**12
CURVATURE = [name for name in METHODS if name not in ("fngd", "plain")]
# How the loss arrives: micro-batches, and the factor of a scaler.
WAYS = [(PARTS, 1.0), (1, SCALE), (PARTS, SCALE)]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def problem(request):
    torch.manual_seed(0)
    x = torch.randn(ROWS, 6, dtype=request.param).repeat(PARTS, 1)
    y = torch.randint(0, 3, (ROWS,)).repeat(PARTS)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(request.param)
    return net, x, y


def close(found, wanted):
    tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-4
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def optimizer_of(net, method, **settings):
    own = {} if method == "fngd" else {"fisher_labels": "empirical", "kl_clip": 1e-3}
    return create_preconditioned_optimizer(
        net, method=method, lr=0.1, momentum=0.0, **{"update_scale": "none", **own, **settings}
    )


def by_hand(start, x, y, method, parts, scale, tell, **settings):
    """Return the change of the weights after three steps; the first one is skipped by a scaler."""
    net = copy.deepcopy(start)
    optimizer = optimizer_of(net, method, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    for step in range(3):
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            optimizer.set_batch(range(len(xs)))
            if tell:
                optimizer.set_loss_scale(parts, scaler.get_scale())
            loss = nn.functional.cross_entropy(net(xs), ys) / parts
            if step == 0 and scale != 1.0:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        if step or scale != 1.0:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    pairs = zip(net.parameters(), start.parameters(), strict=True)
    return torch.cat([(p - q).flatten() for p, q in pairs])


def by_accelerate(start, x, y, method, parts, scale, tell, **settings):
    net = copy.deepcopy(start)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    if scale != 1.0:
        # accelerate makes a scaler on a GPU only.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = optimizer_of(net, method, **settings)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=len(x) // parts)
    net, wrapped, loader = accelerator.prepare(net, optimizer, loader)
    for _ in range(2):
        for xs, ys in loader:
            with accelerator.accumulate(net):
                optimizer.set_batch(range(len(xs)))
                if tell:
                    optimizer.set_loss_scale(parts, scale)
                accelerator.backward(nn.functional.cross_entropy(net(xs), ys))
                wrapped.step()
                wrapped.zero_grad()
    pairs = zip(net.parameters(), start.parameters(), strict=True)
    return torch.cat([(p - q).flatten() for p, q in pairs])


LOOPS = {"by hand": by_hand, "accelerate": by_accelerate}


@pytest.mark.feature("Accumulation and GradScaler in a plain loop", "works", "found, or told")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize(("parts", "scale"), WAYS)
@pytest.mark.parametrize("method", CURVATURE)
def test_curvature_finds_the_scale(problem, method, parts, scale, damping_mode, loop):
    settings = {"damping": 1e-2, "damping_mode": damping_mode}
    base = parts if damping_mode == "relative" else 1
    wanted = by_hand(*problem, method, base, 1.0, True, **settings)
    close(LOOPS[loop](*problem, method, parts, scale, False, **settings), wanted)
    close(LOOPS[loop](*problem, method, parts, scale, True, **settings), wanted)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("parts", "scale"), WAYS)
def test_relative_coefficients_need_no_scale(problem, parts, scale, loop):
    settings = {"share": "none", "damping": 1e-2}
    wanted = by_hand(*problem, "fngd", parts, 1.0, True, **settings)
    close(LOOPS[loop](*problem, "fngd", parts, scale, False, **settings), wanted)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("parts", "scale"), WAYS)
def test_absolute_coefficients_must_be_told(problem, parts, scale, loop):
    settings = {"share": "none", "damping": 1e-2, "damping_mode": "absolute"}
    wanted = by_hand(*problem, "fngd", 1, 1.0, False, **settings)
    close(LOOPS[loop](*problem, "fngd", parts, scale, True, **settings), wanted)
    with pytest.raises(FNGDError, match="call set_loss_scale"):
        LOOPS[loop](*problem, "fngd", parts, scale, False, **settings)


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("method", CURVATURE)
def test_clipping_is_not_a_scale(problem, method, scale):
    _, x, y = problem
    found = []
    for tell in (True, False):
        net = copy.deepcopy(problem[0])
        optimizer = optimizer_of(net, method, damping_mode="absolute", damping=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        optimizer.set_batch(range(len(x)))
        if tell:
            optimizer.set_loss_scale(1, scaler.get_scale())
        scaler.scale(nn.functional.cross_entropy(net(x), y)).backward()
        scaler.unscale_(optimizer)
        norm = float(nn.utils.get_total_norm([p.grad for p in net.parameters()]))
        nn.utils.clip_grad_norm_(net.parameters(), 0.7 * norm)
        scaler.step(optimizer)
        found.append(net[0].weight - problem[0][0].weight)
    close(found[1], found[0])

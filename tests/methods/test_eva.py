"""Eva against a dense solve with (ḡḡᵀ)⊗(āāᵀ) + λI, without Sherman-Morrison."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.methods.method_oracles import DAMPING, blocks, make, record, rows, solve_dense, step
from tests.methods.test_natural_gradient import LAYERS, N, case, language_model, translation

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def vectors(layer: nn.Module, calls: list[list[Tensor]], kappa: float) -> list[list[Tensor]]:
    """Compute ā and ḡ of each channel group, by loops; the calls are of one forward."""
    found = []
    for group in zip(*(rows(layer, x, g) for x, g in calls), strict=True):
        means, total = [], 0
        for a, g in group:
            n, t, _ = a.shape
            padded = t > 1 and not isinstance(layer, nn.Conv2d)
            kept = [
                a[i, j]
                for i in range(n)
                for j in range(t)
                if not padded or bool(g[i, j].abs().sum() > 0)
            ]
            means.append(sum(kept) / len(kept))
            total = total + kappa / n * g.flatten(0, 1).sum(0)
        found.append([sum(means) / len(means), total])
    return found


def check(layer: nn.Module, found: list, means: list[Tensor], relative: bool = False) -> None:
    """Hold the directions in `.grad` against a dense solve with the given vectors."""
    damping = DAMPING
    if relative:
        damping *= sum(float(a @ a) * float(g @ g) for a, g in found)
    for (a, g), m, v in zip(found, means, blocks(layer), strict=True):
        curvature = torch.kron(torch.outer(g, g), torch.outer(a, a))
        shifted = curvature + damping * torch.eye(len(curvature), dtype=a.dtype)
        wanted = solve_dense(shifted, damping, m)
        torch.testing.assert_close(v, wanted, **EXACT)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", LAYERS)
def test_directions(name: str, relative: bool) -> None:
    model, x = case(name)
    plain = copy.deepcopy(model)
    calls = record(plain.layer)
    optimizer = make(model, "eva", damping_mode="relative" if relative else "absolute")
    step(optimizer, lambda: model.shares(x, False).sum())
    plain.shares(x, False).sum().backward()
    means = blocks(plain.layer)
    found = vectors(plain.layer, calls, N)
    check(model.layer, found, means, relative)
    state = optimizer.layers[0].state
    for i, (a, g) in enumerate(found):
        torch.testing.assert_close(state["a"][i], a, **EXACT)
        torch.testing.assert_close(state["g"][i], g, **EXACT)
    # The curvature must matter, or plain gradients would pass.
    assert max(
        float((v - m).abs().max()) for v, m in zip(blocks(model.layer), means, strict=True)
    ) > (1e-5)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("task", [translation, language_model])
def test_padding_does_not_count(task: Callable, relative: bool) -> None:
    model, share, count = task()
    plain = copy.deepcopy(model)
    optimizer = make(model, "eva", damping_mode="relative" if relative else "absolute")
    paths = list(optimizer.selection.chosen)
    calls = {path: record(plain.get_submodule(path)) for path in paths}
    step(optimizer, lambda: share(model, slice(None)))
    share(plain, slice(None)).backward()
    assert len(paths) >= 8
    for path in paths:
        layer = plain.get_submodule(path)
        assert (calls[path][0][1].abs().sum(-1) == 0).any(), "the case must have padding"
        check(
            model.get_submodule(path),
            vectors(layer, calls[path], count),
            blocks(layer),
            relative,
        )


@pytest.mark.parametrize("size", [(N, 3), (N, 4, 3)], ids=["rows", "tokens"])
def test_module_called_twice(size: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 3).double()
    plain = copy.deepcopy(layer)
    calls = record(plain)
    x = torch.randn(size, dtype=torch.float64)
    loss = lambda net: net(net(x).tanh()).square().sum() / N
    step(make(layer, "eva"), lambda: loss(layer))
    loss(plain).backward()
    assert len(calls) == 2
    check(layer, vectors(plain, calls, N), blocks(plain))


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.8])
def test_running_average_and_update_period(decay: float) -> None:
    model, _ = case("groups")
    optimizer = make(model, "eva", stat_decay=decay, update_period=2)
    old: list[list[Tensor]] = []
    for number in range(6):
        x = torch.randn(N, 4, 5, 5, dtype=torch.float64)
        plain = copy.deepcopy(model)
        plain.zero_grad()
        calls = record(plain.layer)
        step(optimizer, lambda x=x: model.shares(x, False).sum())
        plain.shares(x, False).sum().backward()
        if number % 2 == 0:
            new = vectors(plain.layer, calls, N)
            old = [
                [decay * was + (1 - decay) * now for was, now in zip(*pair, strict=True)]
                for pair in zip(old or new, new, strict=True)
            ]
        check(model.layer, old, blocks(plain.layer))
    assert optimizer.statistics()["updates"] == 3


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_micro_batches_are_averaged(relative: bool) -> None:
    model, _ = case("linear tokens")
    plain = copy.deepcopy(model)
    calls = record(plain.layer)
    optimizer = make(model, "eva", damping_mode="relative" if relative else "absolute")
    optimizer.set_loss_scale(2)
    for _ in range(2):
        x = torch.randn(N, 6, 3, dtype=torch.float64)
        for net in (model, plain):
            (net.shares(x, False).sum() / 2).backward()
    optimizer.step()
    each = [vectors(plain.layer, [call], 2 * N)[0] for call in calls]
    mean = [(first + second) / 2 for first, second in zip(*each, strict=True)]
    check(model.layer, [mean], blocks(plain.layer), relative)


def test_damping_goes_to_the_plain_gradient() -> None:
    model, x = case("conv1d tokens")
    plain = copy.deepcopy(model)
    step(make(model, "eva", damping=1e14), lambda: model.shares(x, False).sum())
    plain.shares(x, False).sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, plain.layer.weight.grad, rtol=0, atol=1e-12)

"""TENGraD and SENG: one direction with FNGD where all are exact, and their approximations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fngd.layers.calls import Call
from hf_fngd.methods.blocks import SampleBlock
from hf_fngd.methods.seng import SENGLayer, _low_rank
from hf_fngd.solve import gram
from tests.helpers import natural_gradient, sample_gradients, tiny_resnet
from tests.methods.method_oracles import DAMPING, blocks, make, step
from tests.methods.test_natural_gradient import LAYERS, N, case, language_model, translation

EXACT = {"rtol": 1e-9, "atol": 1e-10}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
DOUBLE = torch.float64


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in (layer.weight, layer.bias) if p is not None]


def assert_directions(layer: nn.Module, wanted: list[Tensor], **tolerance: float) -> None:
    for parameter, value in zip(trained(layer), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, value, **(tolerance or EXACT))


# ---- the three exact methods are one -----------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("scale", [1, N], ids=["mean", "sum"])
@pytest.mark.parametrize("name", LAYERS)
def test_three_methods_and_a_dense_solve(name: str, scale: int, relative: bool) -> None:
    model, x = case(name)
    shares = lambda net: net.shares(x, False) * scale
    u = sample_gradients(lambda i: shares(model)[i], trained(model.layer), N)
    wanted = natural_gradient(u, DAMPING, relative)
    for method in ("tengrad", "seng", "fngd"):
        twin = copy.deepcopy(model)
        optimizer = make(twin, method, damping_mode="relative" if relative else "absolute")
        step(optimizer, lambda twin=twin: shares(twin).sum())
        assert_directions(twin.layer, wanted)
        assert optimizer.statistics()["fallbacks"] == 0
    assert not torch.allclose(wanted[0], u[0].mean(0), rtol=1e-2, atol=1e-3)


def images() -> tuple[nn.Module, Callable[[nn.Module, slice], Tensor], int]:
    x = torch.randn(3, 3, 16, 16, dtype=DOUBLE)
    y = torch.tensor([0, 2, 1])

    def share(model: nn.Module, part: slice) -> Tensor:
        logits = model(pixel_values=x[part]).logits
        return nn.functional.cross_entropy(logits, y[part], reduction="sum") / 3

    model = tiny_resnet().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    # With fixed statistics, samples do not depend on each other.
    return model.eval(), share, 3


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("task", [translation, language_model, images])
def test_every_layer_of_a_model(task: Callable, relative: bool) -> None:
    model, share, count = task()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*named, strict=True)
    rows = [
        torch.autograd.grad(share(model, slice(i, i + 1)) * count, parameters, allow_unused=True)
        for i in range(count)
    ]
    u = {n: column for n, column in zip(names, zip(*rows, strict=True), strict=True)}
    for method in ("tengrad", "seng", "fngd"):
        twin = copy.deepcopy(model)
        optimizer = make(
            twin, method, damping=1e-2, damping_mode="relative" if relative else "absolute"
        )
        step(optimizer, lambda twin=twin: share(twin, slice(None)))
        chosen = list(optimizer.selection.chosen)
        assert len(chosen) >= 4
        for path in chosen:
            layer = twin.get_submodule(path)
            mine = [torch.stack(u[f"{path}.{n}"]) for n, _ in layer.named_parameters()]
            assert_directions(layer, natural_gradient(mine, 1e-2, relative))
        for name, parameter in twin.named_parameters():
            if name.rpartition(".")[0] not in chosen and parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, torch.stack(u[name]).mean(0), **EXACT)


@pytest.mark.parametrize("method", ["tengrad", "seng"])
@pytest.mark.parametrize("name", ["linear", "linear tokens", "conv2d", "groups"])
def test_curvature_stays_between_updates(name: str, method: str) -> None:
    model, x = case(name)
    optimizer = make(model, method, update_period=3)
    kept: list[Tensor] = []
    for number in range(5):
        x = torch.randn_like(x)
        fresh = sample_gradients(
            lambda i, x=x: copied.shares(x, False)[i],
            trained((copied := copy.deepcopy(model)).layer),
            N,
        )
        if number % 3 == 0:
            kept = fresh
        step(optimizer, lambda x=x: model.shares(x, False).sum())
        u = torch.cat([part.reshape(N, -1) for part in kept], 1).t()
        m = torch.cat([part.mean(0).reshape(-1) for part in fresh])
        wanted = DAMPING * torch.linalg.solve(
            DAMPING * torch.eye(len(u), dtype=DOUBLE) + u @ u.t() / N, m
        )
        sizes = [p.numel() for p in trained(model.layer)]
        pieces = wanted.split(sizes)
        assert_directions(
            model.layer,
            [v.view_as(p) for v, p in zip(pieces, trained(model.layer), strict=True)],
        )
    assert optimizer.statistics()["updates"] == 2


@pytest.mark.parametrize("method", ["tengrad", "seng"])
def test_the_latest_of_the_largest_micro_batches_counts(method: str) -> None:
    model, _ = case("linear tokens")
    optimizer = make(model, method)
    optimizer.set_loss_scale(4)
    batches = [torch.randn(n, 6, 3, dtype=DOUBLE) for n in (2, 4, 4, 3)]
    plain = copy.deepcopy(model)
    for x in batches:
        for net in (model, plain):
            (net.shares(x, False).sum() / 4).backward()
    optimizer.step()
    u = sample_gradients(lambda i: plain.shares(batches[2], False)[i], trained(plain.layer), 4)
    flat = torch.cat([part.reshape(4, -1) for part in u], 1).t()
    m = torch.cat([p.grad.reshape(-1) for p in trained(plain.layer)])
    curvature = DAMPING * torch.eye(len(flat), dtype=DOUBLE) + flat @ flat.t() / 4
    wanted = DAMPING * torch.linalg.solve(curvature, m)
    found = torch.cat([p.grad.reshape(-1) for p in trained(model.layer)])
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("route", ["auto", "direct", "hadamard"])
@pytest.mark.parametrize("name", ["linear", "conv2d one pixel", "conv1d"])
def test_gram_routes(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = gram.choose_route if route == "auto" else lambda *_: route
    monkeypatch.setattr(gram, "choose_route", lambda *sizes: asked.append(sizes) or choose(*sizes))
    model, x = case(name)
    u = sample_gradients(lambda i: model.shares(x, False)[i], trained(model.layer), N)
    step(make(model, "tengrad"), lambda: model.shares(x, False).sum())
    assert len(asked) == 1
    assert_directions(model.layer, natural_gradient(u, DAMPING))


# ---- the kept samples --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 1, 4, 2), (1, 4, 5, 3, 2), (3, 2, 4, 2, 5)])
def test_both_forms_of_a_block(shape: tuple[int, ...]) -> None:
    groups, n, t, d_in, d_out = shape
    a = torch.randn(groups, n, t, d_in, dtype=DOUBLE)
    g = torch.randn(groups, n, t, d_out, dtype=DOUBLE)
    m, v = torch.randn(groups, d_out, d_in, dtype=DOUBLE), torch.randn(n, dtype=DOUBLE)
    u = torch.einsum("gnto,gnti->ngoi", g, a).reshape(n, -1)
    for whole in (True, False):
        block = SampleBlock.of(a, g, whole=whole)
        assert ("u" in block.tensors) == whole
        assert block.count == n
        for route in ("auto", "direct", "hadamard"):
            torch.testing.assert_close(block.gram(route), u @ u.t(), **TIGHT)
        torch.testing.assert_close(block.inner(m), u @ m.reshape(-1), **TIGHT)
        torch.testing.assert_close(block.combine(v), (v @ u).view_as(m), **TIGHT)
    kept = SampleBlock.of(a, g).tensors
    sizes = [sum(x.numel() for x in form.values()) for form in (kept, {"u": u}, {"a": a, "g": g})]
    assert sizes[0] <= min(sizes[1:]) + groups * n * d_out * d_in * (groups > 1)


# ---- SENG: sketches ----------------------------------------------------------------------------


def seng_layer(
    d_in: int, d_out: int, n: int = 4, t: int = 3, groups: int = 1, seed: int = 0, **settings: int
) -> tuple[Callable[[int], SENGLayer], Tensor, Tensor, Tensor]:
    """Return a layer's curvature by step of its sketch, its inputs and gradients, and M."""
    torch.manual_seed(seed)
    a = torch.randn(groups, n, t, d_in, dtype=DOUBLE)
    g = torch.randn(groups, n, t, d_out, dtype=DOUBLE)
    m = torch.einsum("gnto,gnti->goi", g, a) / n
    # In a convolution with one pixel a kernel, positions are samples of the input as they are.
    model = nn.Conv2d(groups * d_in, groups * d_out, 1, groups=groups, bias=False).double()
    x, y = (part.permute(1, 0, 3, 2).reshape(n, -1, t, 1) for part in (a, g))

    def build(number: int) -> SENGLayer:
        optimizer = make(model, "seng", damping_mode="relative", **settings)
        optimizer.steps = number
        (layer,) = optimizer.layers
        layer.observe([Call(x, y, model.weight)], 1.0, False)
        return layer

    return build, a, g, m


def direction(layer: SENGLayer, m: Tensor) -> Tensor:
    assert layer.update(0)
    return layer.combine(m, layer.local_parts(m))[0]


def test_error_falls_with_the_size_of_the_sketch() -> None:
    sizes = [4, 8, 16, 32, 41]
    exact, _, _, m = seng_layer(40, 40, sketch_size=0)
    wanted = direction(exact(0), m)
    matrix = exact(0)._pending["gram"]
    errors, grams = [], []
    for q in sizes:
        build = seng_layer(40, 40, sketch_size=q)[0]
        found = [build(number) for number in range(40)]
        grams.append(
            sum(float((one._pending["gram"] - matrix).square().sum()) for one in found) / 40
        )
        errors.append(sum(float((direction(one, m) - wanted).norm()) for one in found) / 40)
    assert errors[-1] < 1e-12 * float(wanted.norm())
    assert grams[-1] < 1e-20
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine < 0.8 * coarse
    # Variance of a sample of k out of P coordinates: proportional to (P - k)/k.
    parameters = 1600
    unit = [grams[i] * q**2 / (parameters - q**2) for i, q in enumerate(sizes[:-1])]
    assert max(unit) < 1.6 * min(unit)
    # And so the error of V falls like 1/sqrt(k), where that is small.
    scaled = [errors[i] * q / (1 - q**2 / parameters) ** 0.5 for i, q in enumerate(sizes[:-1])]
    assert max(scaled[1:]) < 1.6 * min(scaled[1:])


SKETCHES = {
    "moderate": {"d_in": 5, "d_out": 6, "sketch_size": 3},
    "moderate groups": {"d_in": 3, "d_out": 5, "groups": 2, "sketch_size": 3},
    "big": {"d_in": 5, "d_out": 6, "sketch_size": 3, "big_layer_size": 0, "big_rank": 8},
    "big one side": {"d_in": 2, "d_out": 7, "sketch_size": 3, "big_layer_size": 0},
    "big groups": {"d_in": 4, "d_out": 5, "groups": 2, "sketch_size": 2, "big_layer_size": 0},
}


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_are_unbiased(name: str) -> None:
    settings = SKETCHES[name]
    build, a, g, m = seng_layer(**settings)
    n = a.shape[1]
    u = torch.einsum("gnto,gnti->ngoi", g, a).reshape(n, -1)
    # Not M itself, so that signs differ.
    probe = torch.randn_like(m)
    wanted = torch.cat([(u @ u.t()).reshape(-1), u @ probe.reshape(-1)])
    d_out, d_in, q = g.shape[3], a.shape[3], settings["sketch_size"]
    if name.startswith("big"):
        ratio = max(1, d_in / q) * max(1, d_out / q)
    else:
        ratio = m.numel() / q**2
    found = []
    for number in range(400):
        layer = build(number)
        matrix = layer._pending["gram"].reshape(-1)
        assert layer.update(number)
        found.append(torch.cat([matrix, layer.inner(layer.block(), probe)]))
    samples = torch.stack(found)
    error = samples.std(0) / len(samples) ** 0.5
    assert ratio > 1 and (error > 0).all()
    assert ((samples.mean(0) - wanted).abs() < 4 * error).all()


# ---- SENG: big layers --------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", LAYERS)
def test_big_form_of_one_sample_is_exact_with_all_ranks(name: str, relative: bool) -> None:
    # With one sample the product of sums is the sum of products.
    model, x = case(name)
    x = x[:1]
    other = copy.deepcopy(model)
    mode = "relative" if relative else "absolute"
    optimizer = make(model, "seng", big_layer_size=0, big_rank=100, damping_mode=mode)
    step(optimizer, lambda: model.shares(x, False).sum())
    assert "a" in optimizer.layers[0].state and optimizer.layers[0].big
    step(make(other, "tengrad", damping_mode=mode), lambda: other.shares(x, False).sum())
    assert_directions(model.layer, [p.grad for p in trained(other.layer)])


@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_big_form(groups: int, rank: int) -> None:
    build, a, g, m = seng_layer(
        3, 4, t=5, groups=groups, sketch_size=0, big_layer_size=0, big_rank=rank
    )
    # A direction that is not in the span of the samples.
    m = torch.randn_like(m)
    n, p = a.shape[1], min(rank, 4)
    truncated = torch.empty_like(g)
    for i in range(groups):
        for j in range(n):
            left, values, right = torch.linalg.svd(g[i, j], full_matrices=False)
            truncated[i, j] = left[:, :p] * values[:p] @ right[:p]
    u = torch.einsum("gnto,gnti->ngoi", truncated, a).reshape(n, -1)
    layer = build(0)
    found = direction(layer, m)
    # What is kept is each sample's best approximation of that rank.
    x, y = layer.state["a"], layer.state["g"]
    assert x.shape[2] == (p if rank < 5 else 5)
    kept = torch.einsum("gnpo,gnpi->ngoi", y, x).reshape(n, -1)
    torch.testing.assert_close(kept, u, **EXACT)
    damping = DAMPING * float(u.square().sum()) / n**2
    curvature = damping * torch.eye(n, dtype=DOUBLE) + u @ u.t() / n
    v = torch.linalg.solve(curvature, u @ m.reshape(-1)) / n
    correction = torch.zeros_like(m)
    roots = v.abs().sqrt()
    for i in range(groups):
        first = sum(roots[j] * y[i, j].t() for j in range(n))
        second = sum(v[j] / roots.sum() * x[i, j] for j in range(n))
        correction[i] = first @ second
    torch.testing.assert_close(found, m - correction, **EXACT)


def test_low_rank_is_the_best_approximation() -> None:
    g = torch.randn(2, 3, 6, 4, dtype=DOUBLE)
    a = torch.eye(6, dtype=DOUBLE).expand(2, 3, 6, 6)
    for rank in (1, 2, 3, 4, 5):
        x, y = _low_rank(a, g, rank)
        error = (y.transpose(2, 3) @ x - g.transpose(2, 3)).square().sum((2, 3))
        values = torch.linalg.svdvals(g)
        torch.testing.assert_close(error, values[..., rank:].square().sum(-1), **TIGHT)


@pytest.mark.parametrize("samples", [1, N])
@pytest.mark.parametrize("settings", [{}, {"big_layer_size": 0, "big_rank": 100}], ids=str)
def test_a_sketch_as_large_as_the_layer_is_none(settings: dict, samples: int) -> None:
    model, x = case("linear tokens")
    x = x[:samples]
    other = copy.deepcopy(model)
    u = sample_gradients(lambda i: other.shares(x, False)[i], trained(other.layer), samples)
    for net, size in ((model, 1000), (other, 0)):
        optimizer = make(net, "seng", sketch_size=size, **settings)
        step(optimizer, lambda net=net: net.shares(x, False).sum())
    assert_directions(model.layer, [p.grad for p in trained(other.layer)])
    if not settings or samples == 1:
        assert_directions(model.layer, natural_gradient(u, DAMPING))


def test_blocks_helper_agrees_with_the_optimizers_layout() -> None:
    model, x = case("groups")
    optimizer = make(model, "seng")
    step(optimizer, lambda: model.shares(x, False).sum())
    assert optimizer.layers[0].shape == (2, *blocks(model.layer)[0].shape)

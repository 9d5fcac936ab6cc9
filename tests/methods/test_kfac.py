"""KFAC against dense oracles: its factors, where it is exact, its directions and its schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_fngd.methods import KFAC, kfac
from tests.methods.method_oracles import (
    DAMPING,
    blocks,
    factors,
    kfac_direction,
    kfac_unit,
    make,
    record,
    rows,
    step,
)
from tests.methods.test_natural_gradient import LAYERS, N, case, language_model, translation

EXACT = {"rtol": 1e-9, "atol": 1e-10}
SOLVERS = ["eigen", "inverse"]


# ---- where KFAC is exact -----------------------------------------------------------------------


class Linear(nn.Sequential):
    """A deep linear network."""

    def __init__(self, bias: bool) -> None:
        super().__init__(*(nn.Linear(a, b, bias=bias) for a, b in ((3, 4), (4, 2), (2, 3))))


def residuals(count: int, width: int) -> Tensor:
    """Residuals whose mean outer product is I, so that E[g gᵀ] is that of all output units."""
    q, _ = torch.linalg.qr(torch.randn(count, width, dtype=torch.float64))
    return q * count**0.5


def ggn(model: nn.Module, layer: nn.Module, outputs: Callable[[], Tensor]) -> Tensor:
    """Exact GGN of the mean over rows of ½|f - y|², for one layer's block."""
    found = outputs().reshape(-1, outputs().shape[-1])
    jacobian = []
    for value in found.reshape(-1):
        parameters = [p for p in (layer.weight, layer.bias) if p is not None]
        grads = torch.autograd.grad(value, parameters, retain_graph=True)
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        (one,) = blocks(layer)
        jacobian.append(one.reshape(-1))
    model.zero_grad()
    matrix = torch.stack(jacobian)
    return matrix.t() @ matrix / len(found)


def check_exact(
    model: nn.Module,
    x: Tensor,
    pool: Callable[[Tensor], Tensor],
    layers: list,
    terms: int = 1,
    **settings: object,
) -> None:
    outputs = lambda: pool(model(x))
    found = outputs()
    flat = found.reshape(-1, found.shape[-1])
    target = (flat - residuals(*flat.shape)).detach().view_as(found)
    wanted = [ggn(model, layer, outputs) for layer in layers]
    optimizer = make(model, "kfac", **settings)
    step(optimizer, lambda: 0.5 * (outputs() - target).square().sum(-1).mean())
    assert len(optimizer.layers) == len(layers)
    for state, exact in zip((one.state for one in optimizer.layers), wanted, strict=True):
        product = torch.kron(state["g"][0], state["a"][0])
        torch.testing.assert_close(product * terms, exact, **EXACT)
        assert exact.abs().max() > 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_expand_is_exact_for_independent_positions(bias: bool) -> None:
    # The loss is a mean over T positions, each a term of its own: F is T times the product. The
    # factor T is the same for all layers, and relative damping takes it out again.
    model = Linear(bias).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    check_exact(model, x, lambda f: f, list(model), terms=5, kfac_approx="expand")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_reduce_is_exact_for_pooling(pool: str, bias: bool) -> None:
    model = Linear(bias).double()
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    pooling = (lambda f: f.mean(1)) if pool == "mean" else (lambda f: f.sum(1))
    check_exact(model, x, pooling, list(model), kfac_approx="reduce")


def test_reduce_is_exact_for_a_pooled_convolution() -> None:
    conv, head = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Linear(3, 2)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    check_exact(model, x, lambda f: f, [conv, head], kfac_approx="reduce")


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_without_positions_both_are_exact(approx: str) -> None:
    model = Linear(True).double()
    x = torch.randn(7, 3, dtype=torch.float64)
    check_exact(model, x, lambda f: f, list(model), kfac_approx=approx)


# ---- factors and directions of every layer type ------------------------------------------------


def check_layer(
    layer: nn.Module,
    plain: nn.Module,
    state: dict[str, Tensor],
    calls: list[list[Tensor]],
    *,
    approx: str = "expand",
    solver: str = "eigen",
    relative: bool = False,
    damping: float = DAMPING,
    some: slice = slice(None),
) -> None:
    """Hold factors and direction of one attached layer against those of its plain copy."""
    ((x, g),) = calls
    n = len(x)
    seen = [(a[some], b[some]) for a, b in rows(plain, x, g)]
    pairs = factors(seen, n, approx, padded=not isinstance(plain, nn.Conv2d))
    if relative:
        damping *= kfac_unit(pairs, n)
    torch.testing.assert_close(
        state["damping"], torch.tensor(damping, dtype=torch.float64), **EXACT
    )
    found, means = blocks(layer), blocks(plain)
    assert len(found) == len(means) == len(pairs)
    for i, (a, b) in enumerate(pairs):
        torch.testing.assert_close(state["a"][i], a, **EXACT)
        torch.testing.assert_close(state["g"][i], b, **EXACT)
        wanted = kfac_direction(a, b, damping, means[i], solver)
        torch.testing.assert_close(found[i], wanted, **EXACT)


def check_step(
    name: str,
    approx: str,
    solver: str,
    relative: bool,
    some: slice = slice(None),
    **settings: object,
) -> KFAC:
    """Take one step with a layer and hold it against the oracle of its own inputs."""
    model, x = case(name)
    plain = copy.deepcopy(model)
    # The oracle applies the padding modes itself.
    calls = record(plain.layer)
    optimizer = make(
        model,
        "kfac",
        kfac_approx=approx,
        kfac_solver=solver,
        damping_mode="relative" if relative else "absolute",
        **settings,
    )
    step(optimizer, lambda: model.shares(x, False).sum())
    plain.shares(x, False).sum().backward()
    state = optimizer.layers[0].state
    known = {"approx": approx, "solver": solver, "relative": relative, "some": some}
    check_layer(model.layer, plain.layer, state, calls, **known)
    return optimizer


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_directions(name: str, approx: str, solver: str) -> None:
    optimizer = check_step(name, approx, solver, relative=approx == "reduce")
    assert optimizer.statistics()["fallbacks"] == optimizer.statistics()["nonfinite"] == 0


@pytest.mark.parametrize("wanted", range(1, N + 2))
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "linear tokens", "conv2d", "groups"])
def test_factors_of_some_samples(name: str, approx: str, wanted: int) -> None:
    # Evenly spaced, at most as many as asked for; the mean gradient is that of all.
    spacing = next(k for k in range(1, N + 1) if len(range(0, N, k)) <= wanted)
    some = slice(None, None, spacing)
    check_step(name, approx, "eigen", relative=True, some=some, stat_samples=wanted)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("task", [translation, language_model])
def test_padding_does_not_count(task: Callable, approx: str, solver: str) -> None:
    model, share, _ = task()
    plain = copy.deepcopy(model)
    relative = solver == "inverse"
    optimizer = make(
        model,
        "kfac",
        kfac_approx=approx,
        kfac_solver=solver,
        damping=1e-2,
        damping_mode="relative" if relative else "absolute",
    )
    paths = list(optimizer.selection.chosen)
    calls = {path: record(plain.get_submodule(path)) for path in paths}
    step(optimizer, lambda: share(model, slice(None)))
    share(plain, slice(None)).backward()
    assert len(paths) >= 8
    for path, curvature in zip(paths, optimizer.layers, strict=True):
        ((_, g),) = calls[path]
        assert (g.abs().sum(-1) == 0).any(), "the case must have padding"
        check_layer(
            model.get_submodule(path),
            plain.get_submodule(path),
            curvature.state,
            calls[path],
            approx=approx,
            solver=solver,
            relative=relative,
            damping=1e-2,
        )


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_calls_of_one_forward_are_positions(approx: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    plain = copy.deepcopy(layer)
    x = torch.randn(N, 3, dtype=torch.float64)
    calls = record(plain)
    optimizer = make(layer, "kfac", kfac_approx=approx)
    loss = lambda net: net(net(x).tanh()).square().sum() / N
    step(optimizer, lambda: loss(layer))
    loss(plain).backward()
    # As one call over a sequence of two positions, in the order of backward.
    inputs, gradients = (torch.stack(part, 1) for part in zip(*calls, strict=True))
    check_layer(layer, plain, optimizer.layers[0].state, [[inputs, gradients]], approx=approx)


@pytest.mark.parametrize("solver", SOLVERS)
def test_damping_goes_to_the_plain_gradient(solver: str) -> None:
    model, x = case("groups")
    plain = copy.deepcopy(model)
    step(
        make(model, "kfac", damping=1e14, kfac_solver=solver), lambda: model.shares(x, False).sum()
    )
    plain.shares(x, False).sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, plain.layer.weight.grad, rtol=0, atol=1e-5)


# ---- schedule ----------------------------------------------------------------------------------


class Run:
    """A KFAC layer that sees one batch after another, and the factors of each batch."""

    def __init__(self, **settings: object) -> None:
        self.model, _ = case("linear tokens")
        self.optimizer = make(self.model, "kfac", **settings)
        self.state = self.optimizer.layers[0].state

    def feed(self, micro_batches: int = 1, size: int = N) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Take one step; return the mean of the micro-batches' factors, and M."""
        plain = copy.deepcopy(self.model)
        plain.zero_grad()
        calls = record(plain.layer)
        self.optimizer.zero_grad()
        self.optimizer.set_loss_scale(micro_batches)
        for _ in range(micro_batches):
            x = torch.randn(size, 6, 3, dtype=torch.float64)
            for model in (self.model, plain):
                (model.shares(x, False).sum() / micro_batches).backward()
        self.optimizer.step()
        kappa = size * micro_batches
        each = [factors(rows(plain.layer, x, g), kappa, "expand", True)[0] for x, g in calls]
        first, second = (sum(part) / micro_batches for part in zip(*each, strict=True))
        return (first, second), blocks(plain.layer)[0]

    def check(self, a: Tensor, g: Tensor) -> None:
        torch.testing.assert_close(self.state["a"][0], a, **EXACT)
        torch.testing.assert_close(self.state["g"][0], g, **EXACT)

    def check_direction(self, a: Tensor, g: Tensor, m: Tensor) -> None:
        wanted = kfac_direction(a, g, DAMPING, m)
        torch.testing.assert_close(blocks(self.model.layer)[0], wanted, **EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
def test_running_average(decay: float) -> None:
    run = Run(stat_decay=decay, inverse_period=1)
    for k in range(1, 6):
        (a, g), m = run.feed()
        keep = min(1 - 1 / k, decay)
        old = (a, g) if k == 1 else old  # noqa: F821
        old = tuple(keep * x + (1 - keep) * y for x, y in zip(old, (a, g), strict=True))
        run.check(*old)
        run.check_direction(*old, m)


def test_update_period() -> None:
    run = Run(update_period=3, stat_decay=0.0, inverse_period=1)
    for number in range(7):
        fresh, m = run.feed()
        last = fresh if number % 3 == 0 else last  # noqa: F821
        run.check(*last)
        run.check_direction(*last, m)
    assert run.optimizer.statistics()["updates"] == 3


def test_inverse_period() -> None:
    # Factors follow every batch; directions stay with those of the last inversion.
    run = Run(stat_decay=0.0, inverse_period=3)
    for number in range(7):
        fresh, m = run.feed()
        inverted = fresh if number % 3 == 0 else inverted  # noqa: F821
        run.check(*fresh)
        run.check_direction(*inverted, m)


def test_inversion_waits_for_an_update() -> None:
    run = Run(stat_decay=0.0, update_period=2, inverse_period=3)
    inverted = []
    for _ in range(9):
        run.feed()
        inverted.append(int(run.state["inverted_at"]))
    assert inverted == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_micro_batches_are_averaged() -> None:
    run = Run(damping_mode="relative")
    (a, g), m = run.feed(micro_batches=3)
    run.check(a, g)
    damping = DAMPING * kfac_unit([(a, g)], N)
    torch.testing.assert_close(
        run.state["damping"], torch.tensor(damping, dtype=torch.float64), **EXACT
    )
    torch.testing.assert_close(
        blocks(run.model.layer)[0], kfac_direction(a, g, damping, m), **EXACT
    )


# ---- length of the step ------------------------------------------------------------------------


def two_layers() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    return model, lambda net: (net(x) - y).square().sum(1).mean()


@pytest.mark.parametrize("clip", [1e-4, 1e-2, 1e6])
@pytest.mark.parametrize("method", ["kfac", "ekfac", "eva", "tengrad", "seng"])
def test_kl_clip(method: str, clip: float) -> None:
    lr = 0.7
    model, loss = two_layers()
    plain, free = copy.deepcopy(model), copy.deepcopy(model)
    loss(plain).backward()
    unclipped = make(free, method)
    step(unclipped, lambda: loss(free))
    change = sum(
        lr**2 * DAMPING * float((p.grad * q.grad).sum())
        for p, q in zip(free.parameters(), plain.parameters(), strict=True)
    )
    scale = min(1.0, (clip / change) ** 0.5)
    assert (scale == 1) == (clip == 1e6)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, method, lr=lr, kl_clip=clip)
    step(optimizer, lambda: loss(model))
    assert optimizer.statistics()["kl_scale"] == pytest.approx(scale, rel=1e-9)
    for p, q, old in zip(model.parameters(), free.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, scale * q.grad, **EXACT)
        torch.testing.assert_close(p.detach(), old - lr * scale * q.grad, **EXACT)


def test_kl_clip_uses_each_groups_rate() -> None:
    model, loss = two_layers()
    plain, free = copy.deepcopy(model), copy.deepcopy(model)
    loss(plain).backward()
    step(make(free, "kfac"), lambda: loss(free))
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.5},
        {"params": list(model[2].parameters()), "lr": 2.0},
    ]
    optimizer = kfac_of(groups, model, kl_clip=1e-3)
    step(optimizer, lambda: loss(model))
    rates = [0.5, 0.5, 2.0, 2.0]
    change = sum(
        rate**2 * DAMPING * float((p.grad * q.grad).sum())
        for rate, p, q in zip(rates, free.parameters(), plain.parameters(), strict=True)
    )
    assert optimizer.statistics()["kl_scale"] == pytest.approx((1e-3 / change) ** 0.5, rel=1e-9)


def test_layers_that_are_not_optimized_do_not_count() -> None:
    model, loss = two_layers()
    optimizer = kfac_of(list(model[2].parameters()), model, kl_clip=1e-3)
    before = model[0].weight.detach().clone()
    step(optimizer, lambda: loss(model))
    assert torch.equal(model[0].weight, before)
    assert 0 < optimizer.statistics()["kl_scale"] < 1


def kfac_of(params: list, model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return KFAC(params, lr=1.0, module=model, damping=DAMPING, damping_mode="absolute", **settings)


# ---- factors in blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 700, 2**26])
@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 5, 1, 4), (3, 2, 4, 1), (1, 7, 2, 2)])
@pytest.mark.parametrize("layout", ["plain", "strided", "permuted", "expanded"])
def test_second_moment(
    shape: tuple[int, ...], layout: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfac, "_BLOCK_BYTES", budget)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == "strided":
        x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    elif layout == "permuted":
        # As the patches and gradients of a convolution come.
        g, n, t, d = shape
        x = torch.randn(n, g, d, t, dtype=torch.float64).permute(1, 0, 3, 2)
    elif layout == "expanded":
        x = x[:, :, :1].expand(shape)
    found = kfac.second_moment(x)
    torch.testing.assert_close(found, torch.einsum("gnti,gntj->gij", x, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.transpose(1, 2))

"""EKFAC against dense oracles: its moments, its directions, and what a new basis makes of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDError
from hf_fngd.methods import ekfac
from tests.methods.method_oracles import (
    DAMPING,
    blocks,
    factors,
    make,
    record,
    rows,
    solve_dense,
    step,
)
from tests.methods.test_natural_gradient import LAYERS, case, language_model, translation

EXACT = {"rtol": 1e-9, "atol": 1e-10}
KINDS = ["positions", "samples"]


def moments_by_loop(a: Tensor, g: Tensor, basis_a: Tensor, basis_g: Tensor, kind: str) -> Tensor:
    """Mean over samples of squared gradients in a basis, one position or sample after the other."""
    total = torch.zeros(len(basis_g), len(basis_a), dtype=a.dtype)
    for inputs, gradients in zip(a, g, strict=True):
        each = [torch.outer(y, x) for x, y in zip(inputs, gradients, strict=True)]
        for one in each if kind == "positions" else [sum(each)]:
            total += (basis_g.t() @ one @ basis_a).square()
    return total / len(a)


def dense_direction(
    basis_a: Tensor, basis_g: Tensor, moments: Tensor, damping: float, power: float, m: Tensor
) -> Tensor:
    """Compute V of one group from F as a matrix over the entries of the weight."""
    vectors = torch.kron(basis_g, basis_a)
    size = len(vectors)
    curvature = (vectors * moments.reshape(-1)) @ vectors.t()
    shifted = curvature + damping * torch.eye(size, dtype=m.dtype)
    if power == 1:
        return solve_dense(shifted, damping, m)
    # The symmetric root, which knows nothing of the basis.
    values, own = torch.linalg.eigh(shifted)
    return ((own * (damping / values) ** power) @ own.t() @ m.reshape(-1)).view_as(m)


class Run:
    """One EKFAC layer that sees batches, and a plain copy with what the layer saw."""

    def __init__(self, name: str = "linear tokens", **settings: Any) -> None:
        self.model, self.x = case(name)
        self.optimizer = make(self.model, "ekfac", **settings)
        self.layer = self.optimizer.layers[0]

    @property
    def state(self) -> dict[str, Tensor]:
        return self.layer.state

    @property
    def basis(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.state["basis_a"], self.state["basis_g"], strict=True))

    def feed(
        self, micro_batches: int = 1, tell: bool = True
    ) -> tuple[list[list[tuple[Tensor, Tensor]]], list[Tensor]]:
        """Take one step; return rows of each micro-batch by group (g of samples), and M."""
        plain = copy.deepcopy(self.model)
        plain.zero_grad()
        calls = record(plain.layer)
        self.optimizer.zero_grad()
        if tell:
            self.optimizer.set_loss_scale(micro_batches)
        for _ in range(micro_batches):
            x = torch.randn_like(self.x)
            for model in (self.model, plain):
                (model.shares(x, False).sum() / micro_batches).backward()
        self.optimizer.step()
        kappa = len(self.x) * micro_batches
        seen = [[(a, g * kappa) for a, g in rows(plain.layer, x, g)] for x, g in calls]
        return seen, blocks(plain.layer)

    def check_direction(self, moments: list[Tensor], m: list[Tensor], damping: float) -> None:
        power = self.optimizer.config.curvature_power
        found = blocks(self.model.layer)
        assert len(found) == len(moments) == len(m) == len(self.basis)
        for v, (basis_a, basis_g), s, one in zip(found, self.basis, moments, m, strict=True):
            wanted = dense_direction(basis_a, basis_g, s, damping, power, one)
            torch.testing.assert_close(v, wanted, **EXACT)


# ---- moments and directions of every layer type ------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_moments_and_directions(name: str, kind: str, power: float) -> None:
    relative = power == 0.5
    run = Run(
        name,
        second_moments=kind,
        curvature_power=power,
        stat_decay=0.0,
        damping_mode="relative" if relative else "absolute",
    )
    run.feed()
    basis = run.basis
    (pairs,), m = run.feed()
    wanted = [moments_by_loop(a, g, *one, kind) for (a, g), one in zip(pairs, basis, strict=True)]
    torch.testing.assert_close(run.state["moments"], torch.stack(wanted), **EXACT)
    mean = float(torch.stack(wanted).mean())
    run.check_direction(wanted, m, DAMPING * mean if relative else DAMPING)
    for basis_a, basis_g in run.basis:
        for one in (basis_a, basis_g):
            torch.testing.assert_close(one.t() @ one, torch.eye(len(one)).to(one), **EXACT)
    assert run.optimizer.statistics()["nonfinite"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear tokens", "conv2d", "groups"])
def test_moments_of_some_samples(name: str, kind: str) -> None:
    run = Run(name, second_moments=kind, stat_samples=2, stat_decay=0.0)
    run.feed(micro_batches=2)
    basis = run.basis
    pairs, m = run.feed(micro_batches=2)
    spacing = -(-len(run.x) // 2)
    each = [
        torch.stack(
            [
                moments_by_loop(a[::spacing], g[::spacing], *one, kind)
                for (a, g), one in zip(micro_batch, basis, strict=True)
            ]
        )
        for micro_batch in pairs
    ]
    wanted = sum(each) / 2
    torch.testing.assert_close(run.state["moments"], wanted, **EXACT)
    run.check_direction(list(wanted), m, DAMPING)


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("name", ["linear tokens", "conv2d", "groups"])
def test_moments_of_the_batch(name: str, power: float) -> None:
    # Taken from every mean gradient, whatever the period of the factors.
    run = Run(name, second_moments="batch", curvature_power=power, stat_decay=0.6, update_period=10)
    total = None
    for k in range(1, 5):
        _, m = run.feed()
        squares = [(g.t() @ one @ a).square() for (a, g), one in zip(run.basis, m, strict=True)]
        keep = min(1 - 1 / k, 0.6)
        new = torch.stack(squares)
        total = new if total is None else keep * total + (1 - keep) * new
        torch.testing.assert_close(run.state["moments"], total, **EXACT)
        run.check_direction(list(total), m, DAMPING)
    assert run.optimizer.statistics()["updates"] == 1


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_of_eigenvalues_make_it_kfac(name: str, approx: str) -> None:
    model, x = case(name)
    twin = copy.deepcopy(model)
    for method, net in (("ekfac", model), ("kfac", twin)):
        step(make(net, method, kfac_approx=approx), lambda net=net: net.shares(x, False).sum())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("task", [translation, language_model])
def test_padding_does_not_count(task: Any, approx: str, kind: str) -> None:
    model, share, _ = task()
    optimizer = make(model, "ekfac", kfac_approx=approx, second_moments=kind, stat_decay=0.0)
    paths = list(optimizer.selection.chosen)
    step(optimizer, lambda: share(model, slice(None)))
    old = [dict(one.state) for one in optimizer.layers]
    plain = copy.deepcopy(model)
    calls = {path: record(plain.get_submodule(path)) for path in paths}
    step(optimizer, lambda: share(model, slice(None)))
    share(plain, slice(None)).backward()
    for path, before, curvature in zip(paths, old, optimizer.layers, strict=True):
        ((x, g),) = calls[path]
        assert (g.abs().sum(-1) == 0).any(), "the case must have padding"
        ((a, g),) = rows(plain.get_submodule(path), x, g * len(x))
        if approx == "reduce":
            alive = (g.abs().sum(-1, keepdim=True) > 0).to(a)
            a = (a * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
            g = g.sum(1, keepdim=True)
        wanted = moments_by_loop(a, g, before["basis_a"][0], before["basis_g"][0], kind)
        torch.testing.assert_close(curvature.state["moments"][0], wanted, **EXACT)


def test_moments_of_samples_are_the_fishers_diagonal() -> None:
    # In the eigenbasis of A ⊗ G no other diagonal is as near to the Fisher (George et al., 3.1).
    run = Run(second_moments="samples", stat_decay=0.0)
    run.feed()
    ((basis_a, basis_g),) = run.basis
    ((pair,),), _ = run.feed()
    u = torch.stack([(y.t() @ x).reshape(-1) for x, y in zip(*pair, strict=True)])
    fisher = u.t() @ u / len(u)
    vectors = torch.kron(basis_g, basis_a)
    torch.testing.assert_close(
        run.state["moments"].reshape(-1), (vectors.t() @ fisher @ vectors).diagonal(), **EXACT
    )


@pytest.mark.parametrize("kind", [*KINDS, "batch"])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_damping_goes_to_the_plain_gradient(kind: str, power: float) -> None:
    run = Run("groups", damping=1e14, second_moments=kind, curvature_power=power)
    for _ in range(2):
        _, m = run.feed()
        for found, wanted in zip(blocks(run.model.layer), m, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


# ---- schedule ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.95])
def test_running_average(decay: float) -> None:
    # The products of the first batch's eigenvalues are the first observation.
    run = Run(stat_decay=decay, inverse_period=100)
    ((first,),), _ = run.feed()
    ((basis_a, basis_g),) = basis = run.basis
    ((a, g),) = factors([first], 1, "expand", True)
    values = [(q.t() @ one @ q).diagonal() for q, one in ((basis_g, g), (basis_a, a))]
    total = torch.outer(*values)
    torch.testing.assert_close(run.state["moments"][0], total, **EXACT)
    for k in range(2, 6):
        ((pair,),), m = run.feed()
        keep = min(1 - 1 / k, decay)
        total = keep * total + (1 - keep) * moments_by_loop(*pair, *basis[0], "positions")
        torch.testing.assert_close(run.state["moments"][0], total, **EXACT)
        run.check_direction([total], m, DAMPING)


@pytest.mark.parametrize("kind", [*KINDS, "batch"])
def test_a_new_basis_takes_the_diagonal_of_the_old_curvature(kind: str) -> None:
    run = Run("groups", second_moments=kind, update_period=2, inverse_period=4, stat_decay=0.5)
    renewed = 0
    for number in range(9):
        before = {name: value.clone() for name, value in run.state.items()}
        (pairs,), m = run.feed()
        moments = []
        for i, (pair, one) in enumerate(zip(pairs, m, strict=True) if before else ()):
            basis_a, basis_g = before["basis_a"][i], before["basis_g"][i]
            s = before["moments"][i]
            keep = min(1 - 1 / (number // 2 + 1), 0.5)
            if number % 2 == 0 and kind != "batch":
                s = keep * s + (1 - keep) * moments_by_loop(*pair, basis_a, basis_g, kind)
            old = torch.kron(basis_g, basis_a)
            curvature = (old * s.reshape(-1)) @ old.t()
            new = torch.kron(run.state["basis_g"][i], run.state["basis_a"][i])
            if number % 4:
                assert torch.equal(new, old)
            else:
                renewed += 1
                assert not torch.allclose(new.abs(), old.abs())
            s = (new.t() @ curvature @ new).diagonal().view_as(s)
            if kind == "batch":
                keep = min(1 - 1 / (number + 1), 0.5)
                rotated = (new.t() @ one.reshape(-1)).view_as(s)
                s = keep * s + (1 - keep) * rotated.square()
            moments.append(s)
        if before:
            torch.testing.assert_close(run.state["moments"], torch.stack(moments), **EXACT)
            run.check_direction(moments, m, DAMPING)
    assert renewed == 2 * len(run.basis)


def test_moments_follow_eigenvectors_that_change_their_order_and_sign() -> None:
    run = Run()
    run.feed()
    state = run.state
    wanted = {name: state[name].clone() for name in ("basis_a", "basis_g", "moments")}
    # The basis that the layer will find again, written in another order and with other signs.
    for name, dim in (("basis_a", 2), ("basis_g", 1)):
        size = state[name].shape[2]
        order = torch.randperm(size)
        signs = torch.randint(0, 2, (size,)).to(state[name]) * 2 - 1
        state[name] = (state[name] * signs)[:, :, order]
        state["moments"] = state["moments"].index_select(dim, order)
    run.layer.invert()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, **EXACT)


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "batch"])
def test_micro_batches_are_averaged(kind: str, tell: bool) -> None:
    run = Run(second_moments=kind, stat_decay=0.0)
    run.feed(tell=tell)
    ((basis_a, basis_g),) = run.basis
    seen, m = run.feed(micro_batches=3, tell=tell)
    each = [factors(pairs, 1, "expand", True)[0] for pairs in seen]
    for name, parts in zip(("a", "g"), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(run.state[name][0], sum(parts) / 3, **EXACT)
    if kind == "batch":
        wanted = (basis_g.t() @ m[0] @ basis_a).square()
    else:
        wanted = sum(moments_by_loop(*pair, basis_a, basis_g, kind) for (pair,) in seen) / 3
    torch.testing.assert_close(run.state["moments"][0], wanted, **EXACT)
    run.check_direction([wanted], m, DAMPING)


def test_calls_of_one_forward_are_positions() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    optimizer = make(layer, "ekfac", second_moments="samples", stat_decay=0.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    loss = lambda net: net(net(x).tanh()).square().sum() / 4
    step(optimizer, lambda: loss(layer))
    ((basis_a,), (basis_g,)) = (optimizer.layers[0].state[f"basis_{side}"] for side in "ag")
    step(optimizer, lambda: loss(layer))
    calls = record(layer_copy := copy.deepcopy(layer))
    loss(layer_copy).backward()
    a, g = (torch.stack(part, 1) for part in zip(*calls, strict=True))
    ((a, g),) = rows(layer_copy, a, g * 4)
    torch.testing.assert_close(
        optimizer.layers[0].state["moments"][0],
        moments_by_loop(a, g, basis_a, basis_g, "samples"),
        **EXACT,
    )


# ---- memory, rules and refusals ----------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 700, 2**26])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_samples(kind: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ekfac, "_BLOCK_BYTES", budget)
    # Groups, with inputs laid out as the patches of a convolution.
    a = torch.randn(5, 2, 3, 4, dtype=torch.float64).permute(1, 0, 3, 2)
    g = torch.randn(2, 5, 4, 2, dtype=torch.float64)
    basis_a, basis_g = (torch.linalg.qr(torch.randn(2, d, d).double())[0] for d in (3, 2))
    found = ekfac.rotated_moments(a, g, basis_a, basis_g, kind == "samples")
    wanted = [
        5 * moments_by_loop(*group, kind) for group in zip(a, g, basis_a, basis_g, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_muon_follows_the_whitening() -> None:
    model, x = case("linear tokens without bias")
    twin = copy.deepcopy(model)
    settings = {"curvature_power": 0.5, "damping_mode": "relative", "damping": 0.01}
    step(make(twin, "ekfac", **settings), lambda: twin.shares(x, False).sum())
    muon = torch.optim.Muon([twin.layer.weight], lr=0.1, momentum=0.9, weight_decay=0.0)
    muon.step()
    optimizer = make(model, "ekfac", lr=0.1, update_rule="muon", momentum=0.9, **settings)
    step(optimizer, lambda: model.shares(x, False).sum())
    torch.testing.assert_close(model.layer.weight, twin.layer.weight, rtol=0, atol=0)


def test_a_bound_on_a_whitened_step_is_refused() -> None:
    model, _ = case("linear")
    with pytest.raises(FNGDError, match="set curvature_power=1, or kl_clip=none"):
        make(model, "ekfac", kl_clip=1e-3, curvature_power=0.5)
    assert make(model, "ekfac", kl_clip=1e-3).config.kl_clip == 1e-3

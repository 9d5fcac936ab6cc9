"""SOAP against its algorithm, written out; the basis, its moments, and what a state keeps."""

import copy
import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hf_fngd import FNGDError, create_preconditioned_optimizer, soap
from hf_fngd.methods import METHODS
from hf_fngd.rules import RULES

GROUP = {"lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(soap, "PERIOD", 3)


def orthogonal(matrix):
    """Gram and Schmidt, one column after the other, with any signs."""
    columns = []
    for column in matrix.t():
        for _ in range(2):
            column = column - sum((one @ column) * one for one in columns)
        columns.append(column / column.norm() * (1 - 2 * torch.randint(2, ())))
    return torch.stack(columns, 1)


def reference(start, gradients, group):
    """SOAP with eigenvectors of other signs, one entry after the other."""
    w = start.clone()
    sides = [n <= min(soap.LONGEST, soap.RATIO * min(w.shape)) for n in w.shape]
    factors, bases = [None, None], [torch.eye(n).to(w) for n in w.shape]
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    beta1, beta2 = group["betas"]
    for k, m in enumerate(gradients, start=1):
        if (k - 1) % soap.PERIOD == 0:
            seen = (k - 1) // soap.PERIOD + 1
            keep = min(1 - 1 / seen, beta2**soap.PERIOD)
            before = list(bases)
            for side, product in enumerate((m @ m.t(), m.t() @ m)):
                if sides[side]:
                    old = factors[side]
                    factors[side] = product if old is None else keep * old + (1 - keep) * product
                    if seen == 1:
                        vectors = torch.linalg.eigh(factors[side])[1].flip(1)
                        signs = 1 - 2 * torch.randint(2, (len(vectors),))
                        bases[side] = (vectors * signs).contiguous()
                        continue
                    sizes = (bases[side].t() @ factors[side] @ bases[side]).diagonal()
                    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
                    bases[side] = orthogonal(factors[side] @ bases[side][:, order])
            # The moments as a vector and as a diagonal over the entries of W.
            old, new = (torch.kron(*pair) for pair in (before, bases))
            first = (new.t() @ old @ first.reshape(-1)).reshape(w.shape)
            curvature = (old * second.reshape(-1)) @ old.t()
            second = (new.t() @ curvature @ new).diagonal().reshape(w.shape)
        turned = bases[0].t() @ m @ bases[1]
        first = beta1 * first + (1 - beta1) * turned
        second = beta2 * second + (1 - beta2) * turned**2
        step = torch.empty(w.shape, dtype=w.dtype)
        for index in range(w.numel()):
            mean, square = first.reshape(-1)[index], second.reshape(-1)[index]
            root = math.sqrt(square / (1 - beta2**k))
            step.view(-1)[index] = mean / (1 - beta1**k) / (root + group["eps"])
        w = (1 - group["lr"] * group["weight_decay"]) * w
        w = w - group["lr"] * bases[0] @ step @ bases[1].t()
    return w


def trained(start, gradients, group=GROUP, rule="soap"):
    param, state = start.clone(), {}
    for gradient in gradients:
        RULES[rule]([param], [gradient.clone()], [state], group)
    return param, state


def problem(*shape, steps=11, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), list(torch.randn(steps, *shape, dtype=dtype))


@pytest.mark.parametrize(("longest", "ratio"), [(6, 8), (4, 8), (4096, 8), (4096, 1)])
@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (3, 3), (7, 5), (5, 7), (2, 3)])
def test_the_algorithm(shape, longest, ratio, monkeypatch):
    monkeypatch.setattr(soap, "LONGEST", longest)
    monkeypatch.setattr(soap, "RATIO", ratio)
    start, gradients = problem(*shape)
    found, _ = trained(start, gradients)
    torch.testing.assert_close(found, reference(start, gradients, GROUP), **EXACT)


def test_sides_with_a_basis():
    size = torch.Size
    both = {"left": 768, "right": 3072}
    assert soap.sides(size([768, 3072])) == both and soap.sides(size([768, 3072, 1, 1])) == both
    for words in (4_000, 50_257):
        assert soap.sides(size([words, 128])) == {"right": 128}
    assert soap.sides(size([32_000, 4096])) == {"right": 4096}
    assert soap.sides(size([5000, 5000])) == {}


def test_the_basis_is_that_of_the_factor():
    start, gradients = problem(5, 4, steps=1)
    _, state = trained(start, gradients * 600)
    for side in ("left", "right"):
        basis, factor = state[f"basis_{side}"], state[f"factor_{side}"]
        inside = basis.t() @ factor @ basis
        torch.testing.assert_close(inside, inside.diagonal().diag(), **EXACT)
        assert (inside.diagonal().diff() <= 1e-12).all(), "largest first"


def test_a_kernel_is_a_matrix():
    start, gradients = problem(4, 3, 2, 2)
    found, _ = trained(start, gradients)
    flat, _ = trained(start.reshape(4, -1), [g.reshape(4, -1) for g in gradients])
    torch.testing.assert_close(found.reshape(4, -1), flat, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(7,), (), (6, 7), (0, 3), (5, 1), (1, 5)])
def test_what_has_no_basis_is_updated_by_adamw(shape, monkeypatch):
    monkeypatch.setattr(soap, "LONGEST", 5)
    start, gradients = problem(*shape)
    found, state = trained(start, gradients)
    torch.testing.assert_close(found, trained(start, gradients, rule="adamw")[0], rtol=0, atol=0)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_complex_weights_are_updated_by_adamw():
    start, gradients = problem(4, 3, dtype=torch.complex128)
    plain, _ = trained(start, gradients, rule="adamw")
    torch.testing.assert_close(trained(start, gradients)[0], plain, rtol=0, atol=0)


def test_turning_the_features_turns_the_run(monkeypatch):
    # Of an embedding of 9 words; Adam has no such property.
    monkeypatch.setattr(soap, "LONGEST", 5)
    start, gradients = problem(9, 4)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    turned = start @ turn, [g @ turn for g in gradients]
    found = trained(start, gradients)[0]
    torch.testing.assert_close(trained(*turned)[0], found @ turn, **EXACT)
    plain = [trained(*one, rule="adamw")[0] for one in ((start, gradients), turned)]
    assert (plain[1] - plain[0] @ turn).abs().max() > 0.01


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, 1e200])
@pytest.mark.parametrize("when", [0, 3])
def test_a_basis_waits_for_a_gradient_that_says_something(when, bad):
    start, gradients = problem(4, 3, steps=when + 2)
    silent = torch.full_like(start, bad)
    _, state = trained(start, gradients[:when] + [silent, silent, *gradients[when:]])
    _, clean = trained(start, gradients[: when + 1])
    for name in ("factor_left", "factor_right", "basis_left", "basis_right", "seen"):
        torch.testing.assert_close(state[name], clean[name], **EXACT)


def test_moments_from_before_the_first_basis_are_taken_along():
    # Adam in the coordinates of the parameter, until the first gradient that is not zero.
    start, gradients = problem(4, 3, steps=1)
    _, state = trained(start, [torch.full_like(start, 1e200)])
    assert torch.equal(state["basis_left"], torch.eye(4).double()) and state["seen"] == 0
    moments = {name: torch.randn(4, 3).double() for name in ("exp_avg", "exp_avg_sq")}
    state |= {name: value.clone() for name, value in moments.items()}
    soap.into_basis(gradients[0], state, 0.9)
    left, right = state["basis_left"], state["basis_right"]
    torch.testing.assert_close(state["exp_avg"], left.t() @ moments["exp_avg"] @ right, **EXACT)
    squares = left.t().square() @ moments["exp_avg_sq"] @ right.square()
    torch.testing.assert_close(state["exp_avg_sq"], squares, **EXACT)


def test_zero_gradients_move_nothing():
    start, _ = problem(4, 3)
    found, _ = trained(start, [torch.zeros_like(start)] * 7, {**GROUP, "weight_decay": 0.0})
    assert torch.equal(found, start)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 30, bias=False)

    def forward(self, x):
        return self.head(self.body(self.words(x)).tanh())

    def get_output_embeddings(self):
        return self.head


def run(model, optimizer, steps, first=0):
    for number in range(first, first + steps):
        torch.manual_seed(number)
        x = torch.randint(0, 30, (4, 5))
        optimizer.set_batch(range(4))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), (7 * x + 1).flatten() % 30)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def words(method="plain", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = Words().to(dtype)
    settings = {"other_rule": "soap", "update_rule": "soap"} | settings
    return model, METHODS[method](model.parameters(), 0.02, module=model, **settings)


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.feature("SOAP (`update_rule=soap`, `other_rule=soap`)", "works", "refused with FSDP")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_with_it(method):
    model, optimizer = words(method)
    assert [group["rule"] for group in optimizer.param_groups] == ["soap", "soap"]
    first = run(model, optimizer, 1)
    assert run(model, optimizer, 60, 1) < 0.5 * first
    assert optimizer.state[model.words.weight]["basis_right"].shape == (6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_is_the_same(stop, dtype):
    whole, optimizer = words(dtype=dtype)
    run(whole, optimizer, stop)
    again, other = words(dtype=dtype)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    other.load_state_dict(saved(optimizer))
    for model, one in ((whole, optimizer), (again, other)):
        run(model, one, 7, stop)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    state = other.state[again.words.weight]
    kept = {name: getattr(value, "dtype", None) for name, value in state.items()}
    assert {name for name, kind in kept.items() if kind != torch.float32} == {"age", "seen"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_distributed_checkpoint_carries_the_basis(kind, tmp_path):
    whole, optimizer = words()
    run(whole, optimizer, 4)
    weights, state = get_state_dict(whole, optimizer)
    again, other = words()
    if kind == "folder":
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        # Makes a step with zero gradients, for the state to be there.
        weights, state = get_state_dict(again, other)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path, no_dist=True)
        weights, state = both["model"], both["optimizer"]
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    for model, one in ((whole, optimizer), (again, other)):
        run(model, one, 5, 4)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_rule_does_not_resume():
    _, optimizer = words()
    _, other = words(other_rule="adamw")
    with pytest.raises(FNGDError, match="other_rule=soap, this run has other_rule=adamw"):
        other.load_state_dict(saved(optimizer))
    state = saved(optimizer)
    del state["plain"]["config"]["other_rule"]
    with pytest.raises(FNGDError, match="another version .* no setting other_rule"):
        optimizer.load_state_dict(state)


def test_a_later_group_has_the_rules_of_the_first():
    model, optimizer = words()
    more = nn.Parameter(torch.randn(5, 3))
    optimizer.add_param_group({"params": [more]})
    assert optimizer.param_groups[-1]["rule"] == "soap"
    more.grad = torch.randn(5, 3)
    optimizer.step()
    assert optimizer.state[more]["basis_left"].shape == (5, 5)


def test_a_learning_rate_may_be_a_tensor():
    found = []
    for lr in (0.02, torch.tensor(0.02)):
        model, optimizer = words(other_lr=None)
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = 0.1
        run(model, optimizer, 5)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_a_part_of_a_gradient_is_refused():
    class Part(torch.Tensor):
        placements = ("shard",)

    model, optimizer = words()
    gradient = torch.zeros(30, 6).as_subclass(Part)
    with pytest.raises(FNGDError, match="SOAP needs whole gradients, which FSDP divides"):
        RULES["soap"]([model.words.weight.detach()], [gradient], [{}], optimizer.param_groups[0])


def test_a_plain_loop_knows_the_names():
    optimizer = create_preconditioned_optimizer(Words(), method="muon_soap", lr=0.01)
    assert [group["rule"] for group in optimizer.param_groups] == ["muon", "soap", "soap"]
    with pytest.raises(FNGDError, match="soap stands for other_rule=soap, and other_rule=adamw is"):
        create_preconditioned_optimizer(Words(), method="soap", lr=0.01, other_rule="adamw")

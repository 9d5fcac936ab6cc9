"""Whether a layer has one row a sample is decided once for the layer, and kept."""

import copy
import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_fngd import create_fngd_optimizer
from hf_fngd.methods import METHODS
from tests.helpers import natural_gradient, sample_gradients, tiny_llama
from tests.methods.method_oracles import make

BATCH = 5


class SequenceFirst(nn.Module):
    """torch's own layer, with batch_first=False: `[T, N, d]`."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        self.out = nn.Linear(6, 3)

    def forward(self, ids):
        return self.out(self.layer(self.embed(ids).transpose(0, 1))[0])


def loss_of(model, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (BATCH, length), generator=generator)
    return F.cross_entropy(model(ids), torch.arange(BATCH) % 3), ids


@pytest.mark.feature("Sequence-first layers (FSMT)", "works", "left out, also where T = N")
@pytest.mark.parametrize("lengths", [(5, 4, 5), (4, 5), (5, 5, 5, 6)])
def test_sequence_first_layers_are_plain(lengths):
    model = SequenceFirst().double()
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=0.1)
    for number, length in enumerate(lengths):
        optimizer.zero_grad()
        plain.zero_grad()
        optimizer.set_batch(range(BATCH * number, BATCH * (number + 1)))
        loss_of(model, length, number)[0].backward()
        loss_of(plain, length, number)[0].backward()
        for name in ("layer.linear1.weight", "layer.linear2.bias"):
            expected = plain.get_parameter(name).grad
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-12, atol=0)
        assert not torch.allclose(model.out.weight.grad, plain.out.weight.grad, rtol=1e-3)
        optimizer.step()
    assert optimizer.batches.left_out == {"layer.linear1", "layer.linear2"}
    assert optimizer.statistics()["layers"] == 1
    table = optimizer.coefficients()
    kept = dict(zip(optimizer.layer_names, table.isfinite().any(0).tolist(), strict=True))
    assert kept == {"layer.linear1": False, "layer.linear2": False, "out": True}


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part of it"])
def test_equal_dimensions(whole, caplog):
    # The model itself can be asked; a part of it is plain until a batch shows which is which.
    model = nn.Sequential(nn.Linear(4, 3)).double()
    optimizer = create_fngd_optimizer(model, lr=0.0, share="none", damping=0.1)
    found = []
    with caplog.at_level(logging.WARNING):
        for positions in (BATCH, 2, BATCH):
            x = torch.randn(BATCH, positions, 4).double()
            plain = copy.deepcopy(model)
            optimizer.zero_grad()
            optimizer.set_batch(range(BATCH))
            (model if whole else model[0])(x).square().mean().backward()
            u = sample_gradients(
                lambda i, x=x, plain=plain: plain(x[i]).square().mean() / BATCH,
                [*plain.parameters()],
                BATCH,
            )
            pairs = {"plain": [one.mean(0) for one in u], "natural": natural_gradient(u, 0.1, True)}
            grads = [p.grad for p in model.parameters()]
            found += [
                name
                for name, wanted in pairs.items()
                if all(torch.allclose(a, b) for a, b in zip(grads, wanted, strict=True))
            ]
            optimizer.step()
    assert found == ["natural" if whole else "plain", "natural", "natural"]
    assert len(caplog.records) == (not whole)
    assert whole or "choose another batch size" in caplog.text


class Odd(nn.Module):
    """A model that keeps count of what happens to it."""

    def __init__(self, turned):
        super().__init__()
        self.first, self.drop, self.turned = nn.Linear(4, 4), nn.Dropout(0.5), turned
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Linear(4, 3)

    def forward(self, x, mask=None, options=None):
        x = self.norm(self.drop(self.first(x)).transpose(1, 2)).transpose(1, 2)
        x = self.inner(x.transpose(0, 1) if self.turned else x)
        return x.transpose(0, 1) if self.turned else x


@pytest.mark.parametrize("turned", [True, False])
def test_the_look_at_the_first_batch_leaves_no_trace(turned):
    model, twin = Odd(turned), Odd(turned)
    twin.load_state_dict(model.state_dict())
    optimizer = create_fngd_optimizer(model, lr=0.0, share="none")
    # A Trainer attaches an optimizer that is attached: one look is enough.
    optimizer.attach()
    assert len(model._forward_pre_hooks) == 1
    x = torch.randn(BATCH, BATCH, 4)
    given = x.clone()
    mask = {"mask": torch.ones(BATCH, BATCH), "options": [None, "text", {"size": 3}]}
    outs = []
    for net in (model, twin):
        torch.manual_seed(1)
        if net is model:
            optimizer.set_batch(range(BATCH))
        outs.append(net(x, **mask))
        outs[-1].square().sum().backward()
        outs.append(torch.rand(3))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert torch.equal(x, given) and model.training and model.drop.training
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert optimizer.batches.left_out == ({"inner"} if turned else set())
    assert not model._forward_pre_hooks
    sure = dict(
        zip(optimizer.layer_names, [one.rows_are_sure for one in optimizer.layers], strict=True)
    )
    assert sure == {"first": True, "inner": not turned}


@pytest.mark.parametrize("how", ["detached", "gone"])
def test_an_optimizer_without_a_batch_leaves_no_hook(how):
    model = Odd(False)
    optimizer = create_fngd_optimizer(model, lr=0.0, share="none")
    assert model._forward_pre_hooks
    if how == "detached":
        optimizer.detach()
    else:
        del optimizer
        gc.collect()
    assert not model._forward_pre_hooks


def test_a_model_that_cannot_be_asked_trains():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            if not self.training:
                raise RuntimeError("no evaluation")
            return self.linear(x)

    model = Fragile()
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none")
    for positions in (BATCH, 2):
        optimizer.set_batch(range(BATCH))
        model(torch.randn(BATCH, positions, 4)).square().mean().backward()
        optimizer.step()
    assert model.training and optimizer.layers[0].rows_are_sure


def test_the_decision_is_resumed():
    states = []
    for resume in (False, True):
        model = SequenceFirst()
        optimizer = create_fngd_optimizer(model, lr=0.0)
        if resume:
            optimizer.load_state_dict(states[0])
            assert optimizer.batches.left_out == {"layer.linear1", "layer.linear2"}
        else:
            optimizer.set_batch(range(BATCH))
            loss_of(model, 3)[0].backward()
            optimizer.step()
        plain = copy.deepcopy(model)
        # The length that would be taken for the batch.
        optimizer.zero_grad()
        optimizer.set_batch(range(BATCH))
        loss_of(model, BATCH)[0].backward()
        plain.zero_grad()
        loss_of(plain, BATCH)[0].backward()
        assert torch.equal(model.layer.linear1.weight.grad, plain.layer.linear1.weight.grad)
        states.append(optimizer.state_dict())
    assert states[0]["fngd"]["left_out"] == states[1]["fngd"]["left_out"]


def test_a_wrong_announcement_costs_one_batch_only(caplog):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = create_fngd_optimizer(model, lr=0.0, share="none")
    plain = copy.deepcopy(model)
    x = torch.randn(6, 4).double()
    plain(x).square().mean().backward()
    for announced, natural in ((3, False), (6, True)):
        optimizer.zero_grad()
        optimizer.set_batch(range(announced))
        model(x).square().mean().backward()
        same = torch.allclose(model[0].weight.grad, plain[0].weight.grad)
        assert same is not natural
        dropped = optimizer.statistics()["layers_dropped"]
        assert dropped == (0 if natural else 2)
        optimizer.step()
    assert "announce as many samples as the batch has rows" in caplog.text


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "plain"])
def test_calls_without_a_gradient_decide_nothing(method, announced):
    # As DoRA does it: once on the identity, to know the norm of the weight.
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, aside=True):
            norm = self.linear(torch.eye(4).to(x)).detach().norm() if aside else 0.0
            return self.linear(x) * (1 + 0 * norm)

    model = Aside().double()
    twin = copy.deepcopy(model)
    x = torch.randn(6, 4).double()
    for net, aside in ((model, True), (twin, False)):
        settings = {"share": "none"} if method == "fngd" else {"fisher_labels": "empirical"}
        optimizer = make(net, method, **settings)
        for _ in range(3):
            optimizer.zero_grad()
            if announced:
                optimizer.set_batch(range(6))
            net(x, aside).square().mean().backward()
            optimizer.step()
        assert optimizer.statistics()["layers_dropped"] == 0
    assert torch.equal(model.linear.weight, twin.linear.weight)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft's own
@pytest.mark.feature("DoRA", "works")
@pytest.mark.parametrize("announced", [True, False])
def test_dora(announced):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        use_dora=True,
        target_modules=["q_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(tiny_llama(), config)
    optimizer = create_fngd_optimizer(model, lr=1e-2, share="none")
    ids = torch.randint(3, 24, (4, 6))
    for _ in range(2):
        if announced:
            optimizer.set_batch(range(4))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    numbers = optimizer.statistics()
    assert numbers["layers"] == 2 and numbers["layers_dropped"] == 0 and numbers["gamma_mean"] < 1

"""Capture changes the weight gradients of selected layers, and nothing else about a model."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGD, FNGDError, create_fngd_optimizer
from tests.helpers import (
    assert_same,
    fill_store,
    gradients,
    natural_gradient,
    padded_tokens,
    sample_gradients,
    tiny_marian,
)

N = 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PHASES = ["collect", "reuse"]
# A model whose optimizer is gone trains plainly, so tests keep theirs to the end.
KEPT: list[FNGD] = []


@pytest.fixture(autouse=True)
def _keep_optimizers() -> Iterator[None]:
    yield
    KEPT.clear()


def attach(model: nn.Module, phase: str = "collect", **settings: object) -> FNGD:
    """Attach FNGD that computes coefficients, or that reuses a different one for every sample."""
    share = "none" if phase == "collect" else "sample"
    options = {"share": share, "momentum": 0.0} | settings
    optimizer = create_fngd_optimizer(model, lr=0.1, **options)
    KEPT.append(optimizer)
    if phase == "collect":
        return optimizer
    rows = optimizer.store.locate(range(N), create=True)
    table = torch.linspace(0.2, 1.7, N * len(optimizer.layer_names)).view(N, -1)
    optimizer.store.write(rows, table)
    optimizer.start_epoch(1)
    optimizer.set_batch(range(N))
    return optimizer


class Net(nn.Module):
    """Three layers; the middle part can be recomputed in backward."""

    def __init__(self, inplace: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.act, self.reentrant = nn.ReLU(inplace=inplace), reentrant
        self.inner: list[StorageWeakRef] = []

    def middle(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        self.inner.append(StorageWeakRef(x.untyped_storage()))
        return self.act(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.third(self.middle(x))
        x = x.detach().requires_grad_()
        return self.third(checkpoint(self.middle, x, use_reentrant=self.reentrant))


def net(**options: object) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def data(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum(-1).mean().backward()
    return gradients(model)


# ---- activations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_inplace_activations(phase: str) -> None:
    results = []
    for inplace in (False, True):
        model = net(inplace=inplace)
        attach(model, phase)
        results.append(backward(model, data(N, 3, 4)))
    assert_same(*results)
    assert any(g.abs().sum() > 0 for g in results[0].values())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("phase", PHASES)
def test_checkpointing_gives_the_same_gradients(phase: str, reentrant: bool) -> None:
    plain, saving = net(), net(reentrant=reentrant)
    results = []
    for model in (plain, saving):
        optimizer = attach(model, phase)
        steps = []
        for _ in range(2):
            if phase == "reuse":
                optimizer.set_batch(range(N))
            steps.append(backward(model, data(N, 3, 4)))
            optimizer.step()
            optimizer.zero_grad()
        results.append(steps)
    for first, second in zip(*results, strict=True):
        assert_same(first, second)


@pytest.mark.feature("Memory gain of activation checkpointing", "works")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("phase", PHASES)
def test_checkpointing_keeps_its_memory_gain(phase: str, reentrant: bool) -> None:
    plain, saving = net(), net(reentrant=reentrant)
    alive = []
    for model in (plain, saving):
        attach(model, phase)
        out = model(data(N, 3, 4))
        gc.collect()
        alive.append(not model.inner[0].expired())
        out.sum().backward()
    assert alive == [True, False]


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_kept_between_steps(phase: str) -> None:
    model = net()
    optimizer = attach(model, phase)
    backward(model, data(N, 3, 4))
    optimizer.step()
    assert all(reference.expired() for reference in model.inner)


# ---- several forwards ----------------------------------------------------------------------------


class Reused(nn.Module):
    """One layer called three times, with sequences of different lengths."""

    def __init__(self, checkpoints: str = "none") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.checkpoints = checkpoints

    def twice(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh()).tanh()

    def once(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.checkpoints == "none":
            return self.twice(x).flatten(1).sum(1) * self.once(y).flatten(1).sum(1)
        if self.checkpoints == "one":

            def both(x: Tensor, y: Tensor) -> Tensor:
                return self.twice(x).flatten(1).sum(1) * self.once(y).flatten(1).sum(1)

            return checkpoint(both, x, y, use_reentrant=False)
        first = checkpoint(self.twice, x, use_reentrant=False)
        second = checkpoint(self.once, y, use_reentrant=False)
        return first.flatten(1).sum(1) * second.flatten(1).sum(1)


@pytest.mark.parametrize("checkpoints", ["none", "one", "two"])
@pytest.mark.parametrize("phase", PHASES)
def test_module_called_several_times(phase: str, checkpoints: str) -> None:
    model = Reused(checkpoints).double()
    plain = copy.deepcopy(model)
    x, y = data(N, 3, 4), data(N, 7, 4).flip(0)
    u = sample_gradients(lambda i: plain(x, y)[i] / N, list(plain.parameters()), N)
    optimizer = attach(model, phase, damping=0.05)
    if phase == "collect":
        expected = natural_gradient(u, 0.05, relative=True)
    else:
        gamma = torch.linspace(0.2, 1.7, N).double()  # float32 in the store
        expected = [torch.einsum("n,n...->...", gamma, part) / N for part in u]
    for _ in range(2):
        if phase == "reuse":
            optimizer.set_batch(range(N))
        model.zero_grad()
        model(x, y).mean().backward()
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=1e-10 if phase == "collect" else 1e-6, atol=1e-10
            )


@pytest.mark.feature("Extra forward passes", "works")
@pytest.mark.parametrize("size", [N, 2], ids=["same size", "other size"])
@pytest.mark.parametrize("extra", ["no backward", "no grad"])
@pytest.mark.parametrize("phase", PHASES)
def test_extra_forward_changes_nothing(phase: str, extra: str, size: int) -> None:
    results = []
    for extra_first in (False, True):
        model = net()
        attach(model, phase).set_batch(range(N))
        if extra_first:
            with torch.set_grad_enabled(extra == "no backward"):
                model(data(size, 3, 4))
        results.append(backward(model, data(N, 3, 4)))
    assert_same(*results)


def test_extra_forward_of_an_unannounced_batch() -> None:
    model, twin = net(), net()
    for which in (model, twin):
        attach(which)
    model(data(N, 3, 4))
    assert_same(backward(model, data(N, 3, 4)), backward(twin, data(N, 3, 4)))
    for which in (model, twin):
        which.zero_grad()
    model(data(2, 3, 4))
    assert_same(backward(model, data(N, 3, 4)), backward(twin, data(N, 3, 4)))


@pytest.mark.parametrize("phase", PHASES)
def test_gradient_of_the_input_before_backward(phase: str) -> None:
    # As in adversarial training and gradient penalties.
    model, twin = net(), net()
    for which in (model, twin):
        attach(which, phase)
    x = data(N, 3, 4).requires_grad_()
    loss = model(x).square().sum(-1).mean()
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    assert_same(gradients(model), backward(twin, data(N, 3, 4)))


@pytest.mark.parametrize("phase", PHASES)
def test_two_forwards_before_two_backwards(phase: str) -> None:
    # The same samples twice, as in consistency losses; plain torch allows it.
    results = []
    for together in (False, True):
        model = net()
        optimizer = attach(model, phase)
        x = data(N, 3, 4)
        losses = []
        for factor in (1.0, 0.5):
            if not together:
                optimizer.set_batch(range(N))
                (factor * model(factor * x).square().mean()).backward()
            else:
                losses.append(factor * model(factor * x).square().mean())
        for loss in losses:
            loss.backward()
        results.append(gradients(model))
    assert_same(*results, **EXACT)


@pytest.mark.parametrize("phase", PHASES)
def test_two_forwards_before_one_backward(phase: str) -> None:
    # One loss over two passes of the same samples: a sample's gradient is the sum over both.
    model = net()
    plain = copy.deepcopy(model)
    x = data(N, 3, 4)

    def share(which: nn.Module, rows: slice) -> Tensor:
        outs = [which(factor * x[rows]).square().sum((1, 2)) for factor in (1.0, 0.5)]
        return (outs[0] * outs[1]).sum() / N

    attach(model, phase, damping=0.05)
    share(model, slice(None)).backward()
    table = torch.linspace(0.2, 1.7, N * 3).view(N, 3).double()
    for number, path in enumerate(("first", "second", "third")):
        parameters = list(plain.get_submodule(path).parameters())
        u = sample_gradients(lambda i: share(plain, slice(i, i + 1)), parameters, N)
        expected = (
            natural_gradient(u, 0.05, relative=True)
            if phase == "collect"
            else [torch.einsum("n,n...->...", table[:, number], part) / N for part in u]
        )
        for mine, wanted in zip(model.get_submodule(path).parameters(), expected, strict=True):
            torch.testing.assert_close(mine.grad, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("phase", PHASES)
def test_retained_graph(phase: str) -> None:
    model = net()
    attach(model, phase)
    loss = model(data(N, 3, 4)).square().mean()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same({k: 2 * v for k, v in once.items()}, gradients(model))


class Failing(torch.autograd.Function):
    fail = False

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        if Failing.fail:
            raise MemoryError("out of memory")
        return g


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
@pytest.mark.parametrize("phase", PHASES)
def test_clean_step_after_a_failed_backward(
    phase: str, announced: bool, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    twin = copy.deepcopy(model)
    model[place].register_forward_pre_hook(lambda _, inputs: Failing.apply(*inputs))
    optimizer = attach(model, phase)
    attach(twin, phase)
    monkeypatch.setattr(Failing, "fail", True)
    with pytest.raises(MemoryError):
        backward(model, data(N, 3, 4).neg())
    monkeypatch.setattr(Failing, "fail", False)
    model.zero_grad()
    if announced:
        optimizer.set_batch(range(N))
    assert_same(backward(model, data(N, 3, 4)), backward(twin, data(N, 3, 4)))


def test_clean_step_after_a_backward_that_failed_between_two_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(4, 4).double()
    twin = copy.deepcopy(model)

    def loss(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(Failing.apply(layer(x))).square().sum(-1).mean()

    attach(model)
    attach(twin)
    monkeypatch.setattr(Failing, "fail", True)
    with pytest.raises(MemoryError):
        loss(model, data(N, 3, 4).neg()).backward()
    monkeypatch.setattr(Failing, "fail", False)
    for which in (model, twin):
        which.zero_grad()
        loss(which, data(N, 3, 4)).backward()
    assert_same(gradients(model), gradients(twin))


# ---- frozen parts, precision ---------------------------------------------------------------------


@pytest.mark.feature("Frozen layers", "works", "left alone")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("frozen", ["second.weight", "second.bias", "first", "second"])
def test_frozen_parameters(frozen: str, phase: str) -> None:
    model = net()
    plain = copy.deepcopy(model)
    attach(model, phase, damping=0.1)
    full = backward(model, data(N, 4))
    unweighted = backward(plain, data(N, 4))
    names = [n for n, _ in model.named_parameters() if n.startswith(frozen)]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad()
    found = backward(model, data(N, 4))
    assert not set(names) & set(found)
    if frozen == "second.weight":
        # Nothing to precondition: the bias follows its plain gradient.
        torch.testing.assert_close(found.pop("second.bias"), unweighted["second.bias"])
        full.pop("second.bias")
    if frozen == "second.bias" and phase == "collect":
        # The block is smaller, so its coefficients are others: those of a layer without bias.
        weight = plain.second.weight
        u = sample_gradients(lambda i: plain(data(N, 4))[i].square().sum() / N, [weight], N)
        full["second.weight"] = natural_gradient(u, 0.1, relative=True)[0]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, full[name], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("phase", PHASES)
def test_autocast_gradients_have_the_parameters_dtype(phase: str) -> None:
    model = net().float()
    attach(model, phase)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(data(N, 3, 4).float())
        assert out.dtype is torch.bfloat16
        loss = out.float().square().mean()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(4, 6), (N, 4)),
        (lambda: nn.Linear(4, 6), (N, 3, 4)),
        (lambda: Conv1D(6, 4), (N, 3, 4)),
        (lambda: nn.Conv2d(4, 6, 3, bias=False), (N, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3), (N, 4, 5, 5)),
    ],
    ids=["linear", "tokens", "conv1d", "conv2d without bias", "conv2d"],
)
def test_autocast_with_ones_equals_plain_autocast(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(build(), nn.Tanh(), nn.Flatten(1), nn.LazyLinear(2))
    x = torch.randn(shape)
    model(x)
    twin = copy.deepcopy(model)
    fill_store(attach(model, share="layer"))
    for which in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = which(x).float().square().mean()
        loss.backward()
    assert_same(gradients(model), gradients(twin))


def test_coefficients_ignore_autocast_around_backward() -> None:
    results = []
    for inside in (False, True):
        model = net().float()
        attach(model, damping=1e-3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(data(N, 3, 4).float()).float().square().mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(gradients(model))
    assert_same(*results)


# ---- layers that do not see the batch ------------------------------------------------------------


class Odd(nn.Module):
    """`table` works on something whose first dimension is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("places", torch.eye(4, dtype=torch.float64)[:3])

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.table(self.places)).sum((1, 2))


@pytest.mark.parametrize("phase", PHASES)
def test_layer_without_the_batch_is_left_out_and_named_once(
    phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Odd().double()
    plain = copy.deepcopy(model)
    optimizer = attach(model, phase)
    backward(plain, data(N, 3, 4))
    for _ in range(2):
        model.zero_grad()
        optimizer.set_batch(range(N))
        with caplog.at_level(logging.WARNING):
            found = backward(model, data(N, 3, 4))
            optimizer.batches.close()
    warnings = [r.getMessage() for r in caplog.records if "table" in r.getMessage()]
    assert len(warnings) == 1 and "5" in warnings[0] and "3" in warnings[0]
    assert torch.equal(found["table.weight"], plain.table.weight.grad)
    assert not torch.allclose(found["body.weight"], plain.body.weight.grad)
    assert optimizer.statistics()["layers_dropped"] == 1


def test_layer_without_the_batch_is_an_error_if_unannounced() -> None:
    model = Odd().double()
    attach(model)
    with pytest.raises(FNGDError, match=r"table: 3.*body: 5.*set_batch"):
        backward(model, data(N, 3, 4))


# ---- the model stays what it was -----------------------------------------------------------------


def test_evaluation_pays_nothing() -> None:
    model = net()
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=0.1, share="sample")  # no batch announced
    x = data(N, 3, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), plain(x))
            assert model(x).grad_fn is None
    numbers = optimizer.statistics()
    assert numbers["gram_seconds"] == 0 and "reuse_rate" not in numbers
    # The next forward with gradients counts, so the zeros above mean something.
    optimizer.set_batch(range(N))
    backward(model, x)
    assert optimizer.statistics()["gram_seconds"] > 0


def test_attach_and_detach_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    keys = list(model.state_dict())
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    optimizer = attach(model)
    text = repr(model)
    optimizer.attach()
    assert isinstance(model[0], nn.Linear) and type(model[0]) is not nn.Linear
    assert type(model[0]).__name__ == "Linear" and type(model[0]).__mro__.count(nn.Linear) == 1
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == ["", "0", "1", "2"]
    backward(model, torch.randn(N, 4))
    optimizer.step()
    for _ in range(2):
        optimizer.detach()
        assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert repr(model) == text
    optimizer.attach()
    assert type(model[0]) is not nn.Linear


def test_detached_model_has_plain_gradients() -> None:
    model = net()
    plain = copy.deepcopy(model)
    optimizer = attach(model)
    backward(model, data(N, 4))
    optimizer.detach()
    model.zero_grad()
    assert_same(backward(model, data(N, 4)), backward(plain, data(N, 4)))


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.feature(
    "`deepcopy` and `torch.save` of the model", "works", "copies are plain modules"
)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_torch],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_plain_models(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(1, 1, 1), Conv1D(3, 6))
    plain = copy.deepcopy(model)
    attach(model, share="none")
    for number in range(3):
        twin = copied(model[number])
        assert type(twin) is type(plain[number])
        assert set(twin.__dict__) == set(plain[number].__dict__)
        assert_same(twin.state_dict(), plain[number].state_dict())
        assert type(model[number]) is not type(plain[number])


def test_a_copy_can_be_trained_together_with_the_original() -> None:
    model = net()
    first = attach(model, damping=0.1)
    twin = copy.deepcopy(model)
    second = attach(twin, damping=10.0)
    alone = []
    for damping in (0.1, 10.0):
        single = net()
        attach(single, damping=damping)
        alone.append(backward(single, data(N, 3, 4)))
    # Interleaved forwards and backwards of two models with an optimizer each.
    losses = [m(data(N, 3, 4)).square().sum(-1).mean() for m in (model, twin)]
    for loss in losses:
        loss.backward()
    assert_same(gradients(model), alone[0])
    assert_same(gradients(twin), alone[1])
    first.step()
    second.step()


def test_save_pretrained_while_attached(tmp_path: Path) -> None:
    model = tiny_marian()
    tokens, mask = padded_tokens([5, 3])
    model.generation_config.max_length = 6
    expected = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens).logits
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    found = loaded(input_ids=tokens, attention_mask=mask, decoder_input_ids=tokens).logits
    torch.testing.assert_close(found, expected)
    generated = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(
        generated, loaded.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=4)
    )
    assert optimizer.statistics()["gram_seconds"] == 0


@pytest.mark.parametrize("phase", PHASES)
def test_hooks_of_the_user_still_run(phase: str) -> None:
    model = net()
    seen = []
    model.second.register_forward_pre_hook(lambda *_: seen.append("before"))
    attach(model, phase)
    model.second.register_forward_hook(lambda *_: seen.append("after"))
    model.second.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.second.weight.register_hook(lambda g: seen.append("gradient"))
    backward(model, data(N, 3, 4))
    assert seen[:2] == ["before", "after"] and sorted(seen[2:]) == ["backward", "gradient"]


@pytest.mark.parametrize(
    ("model", "name"), [(nn.Linear(4, 2), "input"), (Conv1D(2, 4), "x")], ids=["linear", "conv1d"]
)
@pytest.mark.parametrize("phase", PHASES)
def test_input_by_keyword(phase: str, model: nn.Module, name: str) -> None:
    model = copy.deepcopy(model)
    x = torch.randn(N, 4)
    expected = model(**{name: x})
    attach(model, phase)
    assert torch.equal(model(**{name: x}), expected)


def test_forward_without_backward_is_not_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none")
    seen = []
    for _ in range(3):
        x = torch.randn(5, 4)
        model(x)
        seen.append(weakref.ref(x))
        del x
        optimizer.step()
    assert not any(reference() is not None for reference in seen)

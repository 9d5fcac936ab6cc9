"""Labels drawn from the model: the right distribution, the right positions, and no side effects."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDError
from hf_fngd.methods.fisher_labels import draw, labelled_positions, sampled_loss
from tests.helpers import (
    assert_same,
    gradients,
    padded_tokens,
    tiny_gpt2,
    tiny_llama,
    tiny_marian,
    tiny_vit,
)
from tests.methods.method_oracles import make, record

METHODS = ["kfac", "ekfac", "eva", "tengrad", "seng"]
DOUBLE = torch.float64


def sampled(model: nn.Module, method: str = "tengrad", **settings: Any) -> Any:
    return make(model, method, fisher_labels="sampled", **settings)


def curvature(optimizer: Any) -> dict[str, Tensor]:
    """Return everything that the optimizer knows of the curvature."""
    return {
        f"{number}.{name}": value
        for number, layer in enumerate(optimizer.layers)
        for name, value in layer.state.items()
    }


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the distribution --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_draw_follows_the_softmax(dtype: torch.dtype) -> None:
    rows = 60_000
    logits = torch.tensor([0.0, 1.5, -2.0, -6.0, 0.3], dtype=dtype)
    p = logits.double().softmax(0)
    found = draw(logits.expand(rows, 5), generator()).bincount(minlength=5)
    deviation = (found - rows * p) / (rows * p * (1 - p)).sqrt()
    assert deviation.abs().max() < 4
    assert float(((found - rows * p).square() / (rows * p)).sum()) < 18.5  # χ², 4 degrees: 0.1 %
    assert draw(torch.tensor([[-1e4, 0.0, -1e4]], dtype=dtype), generator()).tolist() == [1]


@pytest.mark.parametrize("uniform", [1e-300, 1e-12, 0.5, 1 - 1e-12, 1 - 2**-53])
def test_extreme_noise_does_not_choose_the_impossible(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A uniform number that rounds to 0 or 1 in float32 must not become an infinite noise.
    noise = torch.tensor([[0.5, uniform]], dtype=DOUBLE)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: noise)
    assert draw(torch.tensor([[0.0, -2000.0]]), generator()).tolist() == [0]


def exact_fisher(x: Tensor, logits: Tensor) -> Tensor:
    """Compute the Fisher of a softmax regression by the formula; the loss averages positions."""
    n, t = len(x), x[0].numel() // x.shape[-1]
    total = 0
    for a, z in zip(x.reshape(n * t, -1), logits.reshape(n * t, -1), strict=True):
        p = z.softmax(0)
        a = torch.cat([a, a.new_ones(1)])
        total = total + torch.kron(p.diag() - torch.outer(p, p), torch.outer(a, a))
    return total / n / t**2


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 2)], ids=["rows", "tokens"])
@pytest.mark.parametrize("form", ["tengrad", "seng"])
def test_sampled_fisher_is_the_models_on_average(form: str, shape: tuple[int, ...]) -> None:
    model = nn.Linear(2, 3).double()
    x = torch.randn(shape, dtype=DOUBLE)
    optimizer = sampled(model, form, update_period=1)
    found, scores = [], []
    for _ in range(600):
        model(x).sum().backward()
        optimizer.step()
        state = optimizer.layers[0].state
        u = state.get("u")
        if u is None:
            u = torch.einsum("gnto,gnti->ngoi", state["g"], state["a"]).flatten(1)
        found.append(u.t() @ u / len(u))
        scores.append(u.mean(0))
    wanted = exact_fisher(x, model(x).detach())
    for samples, expected in ((found, wanted), (scores, torch.zeros(9, dtype=DOUBLE))):
        samples = torch.stack(samples)
        error = samples.std(0) / len(samples) ** 0.5
        assert ((samples.mean(0) - expected).abs() <= 4 * error + 1e-12).all()
        assert error.max() < 0.1 * max(1.0, float(wanted.abs().max()))


def test_kfac_of_drawn_labels_is_exact_on_average() -> None:
    # Without positions, G is the mean over samples of diag(p) - ppᵀ.
    model = nn.Linear(2, 3).double()
    x = torch.randn(5, 2, dtype=DOUBLE)
    optimizer = sampled(model, "kfac", stat_decay=0.0)
    found = []
    for _ in range(600):
        model(x).sum().backward()
        optimizer.step()
        found.append(optimizer.layers[0].state["g"][0])
    p = model(x).detach().softmax(1)
    wanted = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    samples = torch.stack(found)
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - wanted).abs() <= 4 * error).all()


def test_scale_does_not_depend_on_loss_or_accumulation() -> None:
    x = torch.randn(5, 2, dtype=DOUBLE)
    found = []
    for scale, accumulation in ((1.0, 1), (0.25, 4)):
        torch.manual_seed(0)
        model = nn.Linear(2, 3).double()
        optimizer = sampled(model)
        optimizer.set_loss_scale(accumulation)
        (model(x).square().mean() * scale).backward()
        optimizer.step()
        found.append(curvature(optimizer))
    assert_same(found[0], found[1])


# ---- positions ---------------------------------------------------------------------------------


def test_sampled_loss_looks_at_marked_positions_only() -> None:
    logits = torch.randn(3, 4, 5, dtype=DOUBLE, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]]).bool()
    (g,) = torch.autograd.grad(sampled_loss(logits, mask, 3, generator()), logits)
    assert torch.equal(g.abs().sum(2) > 0, mask)
    # Each row is p minus a one, times N over the number of labels.
    rest = logits.detach().softmax(2)[mask] * 3 / 7 - g[mask]
    torch.testing.assert_close(rest.sum(1), torch.full((7,), 3 / 7, dtype=DOUBLE))
    assert ((rest > 0.4).sum(1) == 1).all()


def test_positions_with_a_label() -> None:
    tokens, attention = padded_tokens([5, 2, 7])
    labels = tokens.masked_fill(attention == 0, -100)
    labels[0, 2] = -100
    logits = torch.zeros(3, 7, 24)
    causal = torch.zeros(3, 7, dtype=torch.bool)
    causal[:, :-1] = labels[:, 1:] != -100
    for model in (tiny_gpt2(), tiny_llama()):
        assert torch.equal(labelled_positions(model, logits, {"labels": labels}), causal)
    marian = tiny_marian()
    assert torch.equal(labelled_positions(marian, logits, {"labels": labels}), labels != -100)
    only = {"attention_mask": attention, "input_ids": tokens}
    assert torch.equal(labelled_positions(marian, logits, only), attention.bool())
    assert labelled_positions(marian, logits, {"input_ids": tokens}) is None
    # The encoder's mask has another length than the decoder's logits.
    other = {"attention_mask": attention[:, :4]}
    assert labelled_positions(marian, logits, other) is None
    assert labelled_positions(tiny_vit(), torch.zeros(3, 5), {"labels": torch.zeros(3)}) is None


def translation() -> tuple[dict[str, Tensor], Tensor]:
    source, mask = padded_tokens([5, 2, 7])
    target, target_mask = padded_tokens([4, 6, 3])
    for row, length in enumerate((4, 6, 3)):
        target[row, length - 1] = 1  # eos
    labels = target.masked_fill(target_mask == 0, -100)
    return {"input_ids": source, "attention_mask": mask}, labels


@pytest.mark.parametrize("method", METHODS)
def test_decoder_inputs_stand_for_labels(method: str) -> None:
    # As under label smoothing, where the Trainer keeps the labels to itself.
    inputs, labels = translation()
    found = []
    for given in ("labels", "decoder_input_ids"):
        model = tiny_marian().double().eval()
        if given == "labels":
            extra = {"labels": labels}
        else:
            extra = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
        optimizer = sampled(model, method)
        model(**inputs, **extra).logits.sum().backward()
        optimizer.step()
        found.append(curvature(optimizer))
    assert len(found[0]) > 20
    assert_same(found[0], found[1])


def test_padding_has_no_part_in_a_translation_model() -> None:
    inputs, labels = translation()
    model = tiny_marian().double().eval()
    calls = record(model.model.decoder.layers[0].fc2)
    optimizer = sampled(model, "kfac")
    model(**inputs, labels=labels)
    assert optimizer.seen == 3
    ((_, g),) = calls
    assert torch.equal(g.abs().sum(2) > 0, labels != -100)


def test_labels_given_by_position() -> None:
    tokens, attention = padded_tokens([5, 2, 7])
    labels = tokens.masked_fill(attention == 0, -100)
    found = []
    for by_name in (True, False):
        model = tiny_gpt2().double().eval()
        optimizer = sampled(model)
        if by_name:
            model(input_ids=tokens, labels=labels).loss.backward()
        else:
            names = list(inspect.signature(model.forward).parameters)
            arguments = [None] * (names.index("labels") + 1)
            arguments[0], arguments[-1] = tokens, labels
            model(*arguments).loss.backward()
        optimizer.step()
        found.append(curvature(optimizer))
    assert_same(found[0], found[1])


# ---- no side effects ---------------------------------------------------------------------------


def language_model() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tokens, attention = padded_tokens([5, 2, 7])
    labels = tokens.masked_fill(attention == 0, -100)
    return (
        tiny_gpt2(),
        lambda net: net(input_ids=tokens, attention_mask=attention, labels=labels).loss,
    )


@pytest.mark.parametrize("method", METHODS)
def test_training_gradients_are_those_of_plain_training(method: str) -> None:
    model, loss = language_model()
    plain = copy.deepcopy(model)
    optimizer = sampled(model, method)
    value = loss(model)
    assert not gradients(model), "sampling alone left a gradient"
    value.backward()
    wanted = loss(plain)
    wanted.backward()
    assert torch.equal(value, wanted)
    assert_same(gradients(model), gradients(plain))
    # Neither does it touch gradients that are there already.
    loss(model)
    assert_same(gradients(model), gradients(plain))
    optimizer.step()
    assert any(
        not torch.equal(p.grad, plain.get_parameter(n).grad) for n, p in model.named_parameters()
    )


def test_the_global_generator_has_no_say() -> None:
    model, loss = language_model()
    optimizer = sampled(model)
    before = torch.get_rng_state()
    loss(model)
    assert optimizer.seen == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_that_are_not_due_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fngd.methods import fisher_labels

    count = []
    monkeypatch.setattr(
        fisher_labels, "sampled_loss", lambda *a: (count.append(1), sampled_loss(*a))[1]
    )
    model, loss = language_model()
    optimizer = sampled(model, update_period=3)
    for number in range(5):
        with torch.no_grad():
            loss(model)
        assert len(count) == (number + 2) // 3
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(count) == 2


def run(seed: int = 0, steps: int = 2, micro_batches: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    optimizer = sampled(model, "kfac", seed=seed, stat_decay=0.0)
    x = torch.randn(6, 3, dtype=DOUBLE)
    found = []
    for _ in range(steps):
        for _ in range(micro_batches):
            model(x).square().sum().backward()
        optimizer.step()
        found.append({k: v.clone() for k, v in curvature(optimizer).items()})
    return found


def test_seed() -> None:
    first, second, other = run(), run(), run(seed=1)
    assert_same(first[0], second[0])
    assert_same(first[1], second[1])
    assert not torch.equal(first[0]["0.g"], first[1]["0.g"])
    assert not torch.equal(first[0]["0.g"], other[0]["0.g"])


def test_micro_batches_draw_labels_of_their_own() -> None:
    # Three times the same batch: with the same labels, the mean would be that of one.
    assert not torch.allclose(run()[0]["0.g"], run(micro_batches=3)[0]["0.g"])


# ---- refusals ----------------------------------------------------------------------------------


class Answer(nn.Module):
    """A model whose output is what it is told to be."""

    def __init__(self, shape: Callable[[Tensor], Any], config: Any = None) -> None:
        super().__init__()
        self.layer, self.shape = nn.Linear(3, 4), shape
        if config is not None:
            self.config = config

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.layer(x))


class Config:
    problem_type = "regression"


def assert_refused(model: nn.Module, message: str, *args: Tensor, **inputs: Tensor) -> None:
    optimizer = sampled(model)
    with pytest.raises(FNGDError, match=message):
        model(*args, **inputs)
    assert optimizer.seen == 0


@pytest.mark.parametrize(
    "answer",
    [
        lambda z: {"loss": z.sum()},
        lambda z: (z.sum(), z),
        lambda z: z.sum(),
        lambda z: z.sum(1),
        lambda z: z[:, :1],
        lambda z: z.view(-1, 2, 2, 1).expand(-1, 2, 2, 3),
    ],
    ids=["dict", "tuple", "scalar", "one number", "one column", "image"],
)
def test_output_without_class_logits_is_refused(answer: Callable) -> None:
    message = "logits of one class.*fisher_labels=empirical"
    assert_refused(Answer(answer), message, torch.randn(5, 3))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_problems_are_refused(kind: str) -> None:
    config = Config()
    config.problem_type = kind
    assert_refused(Answer(lambda z: z, config), kind, torch.randn(5, 3))


def test_regression_model_of_transformers_is_refused() -> None:
    model = tiny_vit()
    model.config.problem_type, model.num_labels = "regression", 3
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.randn(2, 3)}
    assert_refused(model, "problem_type=regression", **inputs)


@pytest.mark.parametrize("method", METHODS)
def test_parts_called_directly_are_noticed(method: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = sampled(model, method)
    model[1](model[0](torch.randn(5, 3))).sum().backward()
    with pytest.raises(FNGDError, match="no forward of the whole model"):
        optimizer.step()


def test_layer_frozen_later() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = sampled(model)
    model[0].requires_grad_(False)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    assert optimizer.layers[1].state and not optimizer.layers[0].state


# ---- checkpointing -----------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two blocks between two layers, or the blocks alone, under checkpointing or not."""

    def __init__(self, reentrant: bool | None, alone: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Identity() if alone else nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.last = nn.Identity() if alone else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alone", [False, True])
def test_checkpointing_changes_nothing(method: str, alone: bool) -> None:
    found = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = Blocks(reentrant, alone).double()
        optimizer = sampled(model, method, update_period=2)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                model(torch.randn(5, 4, dtype=DOUBLE)), torch.tensor([0, 1, 2, 3, 0])
            ).backward()
            optimizer.step()
        found.append({**curvature(optimizer), **gradients(model)})
    assert_same(found[0], found[1])


@pytest.mark.parametrize("alone", [False, True], ids=["some layers", "all layers"])
def test_reentrant_checkpointing_is_refused(alone: bool) -> None:
    model = Blocks(True, alone)
    optimizer = sampled(model)
    x = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(FNGDError, match="use_reentrant=False"):
        model(x).square().sum().backward()
        optimizer.step()


def test_checkpointing_of_transformers() -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, loss = language_model()
        model = model.double().train()
        if checkpointed:
            # Named otherwise from transformers 5.13 on.
            enable = getattr(model, "activation_checkpointing_enable", None)
            enable = enable or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        optimizer = sampled(model)
        loss(model).backward()
        optimizer.step()
        found.append({**curvature(optimizer), **gradients(model)})
    assert_same(found[0], found[1], rtol=1e-10, atol=1e-12)


# ---- copies ------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
def test_copies_have_no_link(duplicate: Callable) -> None:
    model, loss = language_model()
    optimizer = sampled(model)
    twin = duplicate(model)
    loss(twin).backward()
    assert optimizer.seen == 0
    assert all(layer._pending is None for layer in optimizer.layers)
    # The copy can have an optimizer of its own, and then draws for that one only.
    other = sampled(twin)
    other.zero_grad()
    loss(twin).backward()
    other.step()
    assert optimizer.seen == 0 and all(layer.state for layer in other.layers)
    loss(model).backward()
    optimizer.step()
    assert_same(curvature(optimizer), curvature(other))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_optimizer_is_gone_trains_plainly(method: str) -> None:
    model, loss = language_model()
    plain = copy.deepcopy(model)
    optimizer = sampled(model, method)
    loss(model)
    assert optimizer.seen > 0
    del optimizer
    gc.collect()
    for net in (model, plain):
        loss(net).backward()
    assert_same(gradients(model), gradients(plain))
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    assert len(model._forward_hooks) == len(plain._forward_hooks)


def test_detach_removes_the_hook() -> None:
    model, loss = language_model()
    before = len(model._forward_hooks)
    optimizer = sampled(model)
    assert len(model._forward_hooks) == before + 1
    optimizer.attach()
    assert len(model._forward_hooks) == before + 1
    optimizer.detach()
    assert len(model._forward_hooks) == before
    loss(model).backward()
    assert optimizer.seen == 0
    optimizer.attach()
    loss(model).backward()
    assert optimizer.seen > 0

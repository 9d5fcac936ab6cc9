"""Compiled models: the results of eager ones, in no more graphs than the plain model has."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from hf_fngd import FNGDError, create_fngd_optimizer, create_preconditioned_optimizer
from tests.helpers import assert_same, gradients, tiny_gpt2, tiny_llama, tiny_marian

ROWS, BATCH = 10, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(module: nn.Module, **options: object) -> Callable[..., Tensor]:
    return torch.compile(module, backend="aot_eager", **options)


def breaks() -> int:
    return sum(counters["graph_break"].values())


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def image_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


def rows(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, *shape, dtype=torch.float64), torch.arange(count) % 3


def train(
    model: nn.Module,
    call: Callable[..., Tensor],
    data: tuple[Tensor, Tensor],
    epochs: int = 3,
    announce: bool = True,
    **settings: object,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return weights and the store of FNGD after some epochs with a short last batch."""
    optimizer = create_fngd_optimizer(model, lr=0.1, **settings)
    for epoch in range(epochs):
        optimizer.start_epoch(epoch)
        for ids in torch.arange(len(data[0])).split(BATCH):
            inputs, classes = data[0][ids], data[1][ids]
            if announce:
                optimizer.set_batch(ids)
            nn.functional.cross_entropy(call(inputs), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.detach()
    return dict(model.state_dict()), optimizer.method_state()["store"] or {}


def assert_trains_the_same(
    build: Callable[[], nn.Module], data: tuple[Tensor, Tensor], **settings: object
) -> None:
    eager, model = build(), build()
    expected = train(eager, eager, data, **settings)
    found = train(model, compiled(model, fullgraph=True), data, **settings)
    assert_same(expected[0], found[0], **CLOSE)
    for name, value in expected[1].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- the same results, in whole graphs -----------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_rule": "adamw"},
        {"share": "layer"},
        {"share": "none"},
        {"refresh_every": 2},
    ],
    ids=str,
)
def test_mlp_in_one_graph(settings: dict[str, object]) -> None:
    assert_trains_the_same(mlp, rows(ROWS, 4), **settings)


@pytest.mark.parametrize("share", ["none", "layer"])
def test_batches_that_nobody_announced(share: str) -> None:
    assert_trains_the_same(mlp, rows(ROWS, 4), share=share, announce=False)


def test_forgotten_announcement() -> None:
    model = mlp()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    loss = compiled(model)(rows(BATCH, 4)[0]).sum()
    with pytest.raises(FNGDError, match="share=sample needs set_batch"):
        loss.backward()
    optimizer.set_batch(range(BATCH))
    compiled(model)(rows(BATCH, 4)[0]).sum().backward()


def test_convolutions_in_one_graph() -> None:
    assert_trains_the_same(image_net, rows(ROWS, 2, 4, 4))
    assert counters["stats"]["unique_graphs"] <= 2  # one more for the short last batch


def test_autocast() -> None:
    found = []
    for wrap in (lambda model: model, compiled):
        model = mlp().float()
        optimizer = create_fngd_optimizer(model, lr=0.1, share="none")
        optimizer.set_batch(range(BATCH))
        with torch.autocast("cpu", torch.bfloat16):
            out = wrap(model)(rows(BATCH, 4)[0].float())
            assert out.dtype == torch.bfloat16
            loss = out.float().square().mean()
        loss.backward()
        found.append(gradients(model))
        assert all(g.dtype == torch.float32 for g in found[-1].values())
    assert_same(*found, rtol=1e-6, atol=1e-7)


class Blocks(nn.Module):
    """Equal blocks, each compiled by itself."""

    def __init__(self, depth: int, compiled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks).double()
        if compiled:
            for block in self.blocks:
                block.compile(backend="aot_eager", fullgraph=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, :3]


def test_blocks_compiled_by_themselves_share_their_graphs() -> None:
    found = []
    for compile_blocks in (False, True):
        model = Blocks(12, compile_blocks)
        found.append(train(model, model, rows(ROWS, 4))[0])
    assert_same(*found, **CLOSE)
    # First block (whose input has no gradient) and the others; the short last batch.
    assert counters["stats"]["unique_graphs"] <= 4


MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "marian": tiny_marian}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_break_that_the_plain_model_does_not_have(name: str) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(3, 24, (5, 7))
    found, graphs = [], []
    for preconditioned in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = MODELS[name]()
        optimizer = create_fngd_optimizer(model, lr=0.1)
        if not preconditioned:
            optimizer.detach()
        call = compiled(model)
        for epoch in range(2):
            if preconditioned:
                optimizer.start_epoch(epoch)
                optimizer.set_batch(range(5))
            call(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(breaks())
        graphs.append(counters["stats"]["unique_graphs"])
    assert found[1] <= found[0] and graphs[1] <= graphs[0]
    if name != "gpt2":  # whose forward logs
        assert found[0] == 0
    assert optimizer.statistics()["reuse_rate"] == 1.0


# ---- what goes on around a forward ---------------------------------------------------------------


def test_micro_batches_with_their_backward_passes_at_the_end() -> None:
    inputs, classes = rows(8, 4)
    found = []
    for wrap in (lambda model: model, compiled):
        model = mlp()
        call, optimizer = wrap(model), create_fngd_optimizer(model, lr=0.1, damping=0.05)
        for epoch in range(2):
            optimizer.start_epoch(epoch)
            losses = []
            for ids in torch.arange(8).split([5, 3]):
                optimizer.set_batch(ids)
                losses.append(nn.functional.cross_entropy(call(inputs[ids]), classes[ids]))
                with torch.no_grad():
                    call(inputs[:2])
            for loss in losses:
                loss.backward()
            optimizer.step()
            found.append(gradients(model))
            optimizer.zero_grad()
    assert_same(found[0], found[2], **CLOSE)
    assert_same(found[1], found[3], **CLOSE)


def test_backward_after_the_step_is_refused() -> None:
    model = mlp()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    optimizer.set_batch(range(BATCH))
    loss = compiled(model)(rows(BATCH, 4)[0]).sum()
    optimizer.step()
    with pytest.raises(FNGDError, match="after the optimizer step .*: call backward before step"):
        loss.backward()


def test_layer_that_does_not_see_the_batch() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.reshape(-1, 4)).tanh().view(-1, 2, 4).sum(1))

    torch.manual_seed(0)
    plain = Folded().double()
    found = []
    for wrap in (lambda model: model, compiled):
        model = copy.deepcopy(plain)
        optimizer = create_fngd_optimizer(model, lr=0.1)
        optimizer.set_batch(range(BATCH))
        wrap(model)(rows(BATCH, 8)[0]).square().sum().backward()
        found.append(gradients(model))
        assert optimizer.statistics()["layers_dropped"] == 1
    assert_same(*found, **CLOSE)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2"])
def test_frozen_parameters(frozen: str) -> None:
    found = []
    for wrap in (lambda model: model, compiled):
        model = mlp()
        optimizer = create_fngd_optimizer(model, lr=0.1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        optimizer.set_batch(range(BATCH))
        wrap(model)(rows(BATCH, 4)[0]).square().sum().backward()
        found.append(gradients(model))
    assert_same(*found, **CLOSE)


def test_module_called_several_times_breaks_the_graph_from_the_second_step_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    plain = Twice().double()
    x = rows(BATCH, 4)[0]
    found = []
    for wrap in (lambda model: model, compiled):
        model = copy.deepcopy(plain)
        call, optimizer = wrap(model), create_fngd_optimizer(model, lr=0.0, share="none")
        for _ in range(2):
            model.zero_grad()
            optimizer.set_batch(range(BATCH))
            with caplog.at_level(logging.WARNING):
                call(x).square().sum().backward()
            found.append(gradients(model))
            optimizer.step()
    assert "layer is called several times by a compiled model" in caplog.text
    assert_same(found[0], found[3], **CLOSE)
    with pytest.raises(AssertionError):
        assert_same(found[0], found[2], rtol=1e-3, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def middle(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.middle, x, use_reentrant=False))


@pytest.mark.parametrize(
    "inside", [True, False], ids=["checkpoint in graph", "graph in checkpoint"]
)
def test_activation_checkpointing(inside: bool) -> None:
    found = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = Checkpointed().double()
        if compile_it and not inside:
            model.middle = compiled(model.middle)
        call = compiled(model) if compile_it and inside else model
        found.append(train(model, call, rows(ROWS, 4))[0])
    assert_same(*found, **CLOSE)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_is_the_plain_one(strict: bool) -> None:
    model, plain = mlp(), mlp()
    create_fngd_optimizer(model, lr=0.1)
    x = rows(BATCH, 4)[0]
    found, expected = (torch.export.export(m, (x,), strict=strict) for m in (model, plain))
    assert [n.target for n in found.graph.nodes] == [n.target for n in expected.graph.nodes]
    assert torch.equal(found.module()(x), plain(x))
    # And it trains naturally when it is compiled afterwards.
    assert_trains_the_same(mlp, rows(ROWS, 4))


@pytest.mark.parametrize("method", ["kfac", "tengrad"])
def test_other_methods_break_the_graph_and_train_the_same(method: str) -> None:
    inputs, classes = rows(BATCH, 4)
    found = []
    for wrap in (lambda model: model, compiled):
        model = mlp()
        optimizer = create_preconditioned_optimizer(
            model, method=method, lr=0.1, fisher_labels="empirical"
        )
        call = wrap(model)
        for _ in range(3):
            optimizer.set_batch(range(BATCH))
            nn.functional.cross_entropy(call(inputs), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(dict(model.state_dict()))
    assert_same(*found, **CLOSE)
    assert breaks() > 0

"""With γ = 1 a run equals torch's own optimizers bit for bit, and λ → ∞ goes there."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGD, create_fngd_optimizer, rules
from tests.helpers import assert_same, fill_store, gradients, tiny_gpt2

N, STEPS, LR = 6, 20, 0.02
PLAIN = {"update_scale": "none"}
RULES = {
    "sgd": {"update_rule": "sgd", "momentum": 0.0},
    "momentum": {"update_rule": "sgd", "momentum": 0.9},
    "adamw": {"update_rule": "adamw", "adam_beta1": 0.8, "adam_epsilon": 1e-6},
    "muon": {"update_rule": "muon", "momentum": 0.95},
    "muon without momentum": {"update_rule": "muon", "momentum": 0.0},
}


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(self.embedding(x)).tanh())
        return nn.functional.cross_entropy(self.second(hidden).flatten(0, 1), x.flatten())


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).square().mean()


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2, groups=2, padding=1, padding_mode="reflect"),
            nn.Conv2d(4, 4, 2, padding="same", bias=False),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()


class Gpt2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = tiny_gpt2()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(input_ids=x, labels=x).loss


def tokens(dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 11, (N, 5))


MODELS: dict[str, tuple[type[nn.Module], Callable[[torch.dtype], Tensor]]] = {
    "text": (Text, tokens),
    "pooled": (Pooled, lambda dtype: torch.randn(N, 7, dtype=dtype)),
    "image": (Image, lambda dtype: torch.randn(N, 3, 8, 8, dtype=dtype)),
    "gpt2": (Gpt2, tokens),
}
# torch.optim.Muon takes matrices only.
PAIRS = [(m, r) for m in MODELS for r in RULES if not (m == "image" and r.startswith("muon"))]
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(8, 16), torch.randn(N, 8)),
    "linear tokens": lambda: (nn.Linear(8, 16), torch.randn(N, 5, 8)),
    "linear without bias": lambda: (nn.Linear(8, 16, bias=False), torch.randn(N, 5, 8)),
    "linear of a transpose": lambda: (nn.Linear(64, 128), torch.randn(64, 32).t()),
    "linear of transposed tokens": lambda: (nn.Linear(8, 16), torch.randn(N, 8, 5).mT),
    "one sample": lambda: (nn.Linear(8, 16), torch.randn(1, 8)),
    "one feature": lambda: (nn.Linear(8, 1), torch.randn(N, 8)),
    "conv1d": lambda: (Conv1D(16, 8), torch.randn(N, 5, 8)),
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), torch.randn(N, 3, 8, 8)),
    "conv2d without bias": lambda: (nn.Conv2d(3, 4, 3, bias=False), torch.randn(N, 3, 8, 8)),
    "groups": lambda: (nn.Conv2d(8, 8, 3, groups=4), torch.randn(N, 8, 8, 8)),
    "depthwise": lambda: (nn.Conv2d(8, 8, 3, groups=8), torch.randn(N, 8, 8, 8)),
    "circular": lambda: (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        torch.randn(N, 3, 8, 8),
    ),
}


class Reference:
    """torch's optimizers over the same split of the parameters."""

    def __init__(
        self, model: nn.Module, chosen: list[str], weight_decay: float = 0.0, **rule: object
    ) -> None:
        names = {f"{path}.{kind}" for path in chosen for kind in ("weight", "bias")}
        named = dict(model.named_parameters())
        muon = rule["update_rule"] == "muon"
        mine = [p for n, p in named.items() if n in names and (p.dim() > 1 or not muon)]
        rest = [p for p in named.values() if all(p is not q for q in mine)]
        self.decay = [(p, weight_decay if p.dim() > 1 else 0.0) for p in mine]
        adam = {
            "lr": LR,
            "betas": (rule.get("adam_beta1", 0.9), 0.999),
            "eps": rule.get("adam_epsilon", 1e-8),
        }
        adam_groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if rule["update_rule"] == "sgd":
            self.optimizers = [torch.optim.SGD(mine, LR, momentum=rule["momentum"])]
        elif muon:
            momentum = rule["momentum"]
            options = {"momentum": momentum, "nesterov": momentum > 0}
            self.decay = []
            self.optimizers = [torch.optim.Muon(mine, LR, weight_decay=weight_decay, **options)]
        else:
            self.decay = []
            adam_groups[0]["params"] += [p for p in mine if p.dim() > 1]
            adam_groups[1]["params"] += [p for p in mine if p.dim() <= 1]
        groups = [group for group in adam_groups if group["params"]]
        self.optimizers += [torch.optim.AdamW(groups, fused=True, **adam)] if groups else []

    def step(self) -> None:
        with torch.no_grad():
            for parameter, decay in self.decay:
                parameter.mul_(1 - LR * decay)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def run(
    model: nn.Module, batch: Tensor, optimizer: FNGD | Reference, ids: list[int] | None = None
) -> dict[str, Tensor]:
    for step in range(STEPS):
        if ids is not None:
            optimizer.set_batch(ids)
        model(batch.roll(step, 0)).backward()
        optimizer.step()
        model.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_one_layer(name: str, dtype: torch.dtype) -> None:
    layer, data = LAYERS[name]()
    layer, x = layer.to(dtype), data.to(dtype).requires_grad_()
    twin, y = copy.deepcopy(layer), x.detach().requires_grad_()
    optimizer = create_fngd_optimizer(layer, lr=LR, share="layer")
    fill_store(optimizer)
    outs = layer(x), twin(y)
    assert torch.equal(*outs)
    weights = torch.randn_like(outs[0])
    for out in outs:
        (out * weights).sum().backward()
    assert_same(gradients(layer) | {"x": x.grad}, gradients(twin) | {"x": y.grad})
    assert optimizer.batches.current.used


@pytest.mark.parametrize("weight_decay", [0.0, 0.1], ids=["plain", "decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_bit_for_bit(name: str, rule: str, dtype: torch.dtype, weight_decay: float) -> None:
    build, data = MODELS[name]
    model, batch = build().to(dtype), data(dtype)
    twin = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(
        model, lr=LR, weight_decay=weight_decay, share="layer", **RULES[rule], **PLAIN
    )
    fill_store(optimizer)
    reference = Reference(twin, optimizer.layer_names, weight_decay, **RULES[rule])
    assert_same(run(model, batch, optimizer), run(twin, batch, reference))
    assert optimizer.statistics()["gram_seconds"] == 0


@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit_by_sample(name: str) -> None:
    build, data = MODELS[name]
    model, batch = build(), data(torch.float32)
    twin = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=LR, share="sample", **PLAIN)
    fill_store(optimizer, range(N))
    reference = Reference(twin, optimizer.layer_names, update_rule="sgd", momentum=0.9)
    assert_same(run(model, batch, optimizer, list(range(N))), run(twin, batch, reference))


def test_muon_sees_convolutions_as_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    batch = torch.randn(N, 3, 6, 6)
    optimizer = create_fngd_optimizer(model, lr=LR, share="layer", update_rule="muon")
    fill_store(optimizer)
    flat = nn.Parameter(model[0].weight.detach().flatten(1).clone())
    muon = torch.optim.Muon([flat], LR, momentum=0.9, weight_decay=0.0)
    for _ in range(3):
        model(batch).square().mean().backward()
        flat.grad = model[0].weight.grad.flatten(1).clone()
        optimizer.step()
        optimizer.zero_grad()
        muon.step()
        assert torch.equal(model[0].weight.flatten(1), flat)


@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_channels_last_weights(rule: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batch = torch.randn(N, 3, 6, 6)
    for net, x in ((model, batch), (twin, batch.to(memory_format=torch.channels_last))):
        optimizer = create_fngd_optimizer(net, lr=LR, share="none", update_rule=rule)
        for _ in range(3):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_large_damping_goes_to_the_base_optimizer(name: str) -> None:
    build, data = MODELS[name]
    model, batch = build().double(), data(torch.float64)
    twin = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=LR, share="none", damping=1e30, **PLAIN)
    reference = Reference(twin, optimizer.layer_names, update_rule="sgd", momentum=0.9)
    assert_same(run(model, batch, optimizer), run(twin, batch, reference), rtol=1e-10, atol=1e-10)
    assert optimizer.statistics()["gram_seconds"] > 0


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw", "muon"])
def test_low_precision_parameters_keep_float32_moments(rule: str) -> None:
    build, data = MODELS["pooled"]
    model = build().bfloat16()
    batch = data(torch.bfloat16)
    optimizer = create_fngd_optimizer(
        model, lr=LR, weight_decay=0.1, share="layer", **RULES[rule], **PLAIN
    )
    fill_store(optimizer)
    # The reference steps float32 copies by the same gradients and rounds after every step.
    twin = copy.deepcopy(model).float()
    reference = Reference(twin, optimizer.layer_names, 0.1, **RULES[rule])
    for step in range(STEPS):
        model(batch.roll(step, 0)).backward()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = mine.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert mine.dtype is torch.bfloat16
            other.data.copy_(other.data.bfloat16())
            assert torch.equal(mine.float(), other)
    moments = [v for state in optimizer.state.values() for v in state.values()]
    assert all(v.dtype is torch.float32 for v in moments)
    assert moments or rule == "sgd"


def rms(change: Tensor) -> float:
    return float(change.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_rms_scale_of_sgd(scale: float) -> None:
    build, data = MODELS["pooled"]
    model, batch = build(), data(torch.float32)
    optimizer = create_fngd_optimizer(model, lr=LR, share="none", update_scale="rms")
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        (scale * model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for old, new in zip(before, model.parameters(), strict=True):
            assert rms(new - old) == pytest.approx(0.2 * LR, rel=1e-3)


def test_rms_scale_keeps_the_direction() -> None:
    model = nn.Linear(5, 4)
    twin = copy.deepcopy(model)
    batch = torch.randn(N, 5)
    moved = []
    for net, scale in ((model, "rms"), (twin, "none")):
        before = net.weight.detach().clone()
        optimizer = create_fngd_optimizer(net, lr=LR, share="none", update_scale=scale)
        net(batch).square().mean().backward()
        optimizer.step()
        moved.append((net.weight.detach() - before).flatten())
    assert torch.cosine_similarity(*moved, dim=0) > 1 - 1e-6


def test_rms_scale_of_many_weights_at_once() -> None:
    """As on a GPU, where small weights of one shape are scaled together."""
    torch.manual_seed(0)
    shapes = [(5,)] * 9 + [(4, 5)] * 10 + [(3, 4, 2, 2)] * 8 + [(7,), (2, 3), ()]
    together = [torch.randn(shape) for shape in shapes]
    together[20] = together[20].to(memory_format=torch.channels_last)
    alone = copy.deepcopy(together)
    group = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.99)}
    states: list[list[dict[str, Tensor]]] = [[{} for _ in shapes] for _ in range(2)]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in together]
        rules._rms_sgd(together, grads, states[0], group)
        for one, grad, state in zip(alone, grads, states[1], strict=True):
            rules._rms_sgd([one], [grad], [state], group)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_rms_scale_of_a_zero_gradient() -> None:
    model = nn.Linear(5, 4)
    optimizer = create_fngd_optimizer(model, lr=LR, share="none", update_scale="rms")
    before = copy.deepcopy(model.state_dict())
    (0 * model(torch.randn(N, 5))).sum().backward()
    optimizer.step()
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_rms_scale_of_the_other_rules(rule: str) -> None:
    build, data = MODELS["pooled"]
    model, batch = build(), data(torch.float32)
    twin = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(
        model, lr=LR, share="layer", update_rule=rule, update_scale="rms"
    )
    fill_store(optimizer)
    weights = [p for p in twin.parameters() if p.dim() > 1]
    biases = [p for p in twin.parameters() if p.dim() == 1]
    references = [torch.optim.AdamW(biases, LR, weight_decay=0.0, fused=True)]
    if rule == "muon":
        options = {"momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        references.append(torch.optim.Muon(weights, LR, **options))
    else:
        references.append(torch.optim.AdamW(weights, LR, weight_decay=0.0, fused=True))
    for _ in range(3):
        for net in (model, twin):
            net.zero_grad()
            net(batch).backward()
        optimizer.step()
        for reference in references:
            reference.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


def test_other_lr_and_decay_groups() -> None:
    model = Text()
    optimizer = create_fngd_optimizer(
        model, lr=0.5, weight_decay=0.1, other_lr=0.003, share="none", adam_beta2=0.9
    )
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            assert name not in seen
            seen[name] = (group["rule"], group["lr"], group["weight_decay"])
            assert group["betas"] == (0.9, 0.9)
    assert seen == {
        "embedding.weight": ("adamw", 0.003, 0.1),
        "first.weight": ("sgd", 0.5, 0.1),
        "first.bias": ("sgd", 0.5, 0.0),
        "norm.weight": ("adamw", 0.003, 0.0),
        "norm.bias": ("adamw", 0.003, 0.0),
        "second.weight": ("sgd", 0.5, 0.1),
    }


def test_scheduler_and_closure() -> None:
    model = nn.Linear(3, 2)
    optimizer = create_fngd_optimizer(model, lr=1.0, share="none")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    x = torch.randn(N, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    before = model.weight.detach().clone()
    second = optimizer.step(closure)
    assert second < first
    assert torch.equal(model.weight, before)


def test_parameters_without_gradient_stay() -> None:
    model = Text()
    optimizer = create_fngd_optimizer(model, lr=1.0, weight_decay=0.5, share="none")
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert_same(model.state_dict(), before)

"""Comparison methods: resumed bit for bit, wrong settings refused, and finite whatever comes."""

from __future__ import annotations

import copy
import io
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGDError
from hf_fngd.layers.calls import Call
from hf_fngd.methods import create_preconditioned_optimizer
from tests.helpers import assert_same, gradients
from tests.methods.method_oracles import blocks, make

DOUBLE = torch.float64
METHODS = ["kfac", "ekfac", "eva", "tengrad", "seng"]
BLOCKS = ["tengrad", "seng"]
ROWS, BATCH, EPOCH, STEPS = 12, 4, 3, 10
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("kfac", {"update_period": 3, "inverse_period": 4}),
    "kfac inverse": ("kfac", {"kfac_solver": "inverse", "kfac_approx": "reduce"}),
    "kfac sampled": ("kfac", {"fisher_labels": "sampled", "update_period": 2}),
    "ekfac": ("ekfac", {"update_period": 2, "inverse_period": 4}),
    "ekfac muon": ("ekfac", {"curvature_power": 0.5, "update_rule": "muon", "inverse_period": 3}),
    "ekfac samples": ("ekfac", {"second_moments": "samples", "fisher_labels": "sampled"}),
    "ekfac batch": ("ekfac", {"second_moments": "batch", "update_period": 3, "inverse_period": 3}),
    "eva": ("eva", {"update_period": 3, "stat_decay": 0.5}),
    "eva sampled": ("eva", {"fisher_labels": "sampled", "update_rule": "adamw"}),
    "tengrad": ("tengrad", {"update_period": 4}),
    "tengrad empirical": ("tengrad", {"update_period": 3, "fisher_labels": "empirical"}),
    "seng": ("seng", {"update_period": 4, "sketch_size": 0}),
    "seng sketched": ("seng", {"update_period": 3, "sketch_size": 4}),
    "seng big": (
        "seng",
        {"update_period": 3, "sketch_size": 3, "big_layer_size": 0, "big_rank": 2},
    ),
    "seng muon": ("seng", {"update_period": 4, "update_rule": "muon", "update_scale": "rms"}),
    "plain": ("plain", {"update_rule": "sgd"}),
    "plain muon": ("plain", {"update_rule": "muon"}),
}


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 9)
    ).to(dtype)


def start(model: nn.Module, name: str, **changes: Any) -> Any:
    method, settings = VARIANTS[name]
    return create_preconditioned_optimizer(
        model, method=method, lr=0.05, weight_decay=0.1, **{"other_lr": 0.01} | settings | changes
    )


def train(model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS) -> None:
    data = torch.randint(0, 9, (ROWS, 3), generator=torch.Generator().manual_seed(1))
    for step in range(first, last):
        epoch, place = divmod(step, EPOCH)
        optimizer.start_epoch(epoch)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        optimizer.set_batch(rows)
        logits = model(data[rows])
        nn.functional.cross_entropy(logits.flatten(0, 1), data[rows].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_is_bit_identical(name: str, stop: int) -> None:
    model = build()
    whole = start(model, name)
    train(model, whole)

    interrupted = build()
    optimizer = start(interrupted, name)
    train(interrupted, optimizer, 0, stop)
    checkpoint = saved({"model": interrupted.state_dict(), "optimizer": optimizer.state_dict()})

    resumed = build()
    resumed.load_state_dict(checkpoint["model"])
    optimizer = start(resumed, name)
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(resumed, optimizer, stop)
    assert_same(resumed.state_dict(), model.state_dict())
    if name.startswith("plain"):
        return
    assert optimizer.statistics()["updates"] == whole.statistics()["updates"] > 1
    for mine, theirs in zip(optimizer.layers, whole.layers, strict=True):
        assert_same(mine.state, theirs.state)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "plain" not in name])
def test_curvature_matters_for_the_resumed_run(name: str) -> None:
    model, forgetful = build(), build()
    train(model, start(model, name))
    optimizer = start(forgetful, name)
    train(forgetful, optimizer, 0, 2)
    for layer in optimizer.layers:
        layer.state = {}
    train(forgetful, optimizer, 2)
    assert not torch.equal(model[1].weight, forgetful[1].weight)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_loaded_state_is_a_copy(name: str) -> None:
    model, twin = build(), build()
    optimizer, other = start(model, name), start(twin, name)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    before = saved(state)
    other.load_state_dict(state)
    train(twin, other, 2)
    after = saved(optimizer.state_dict())
    for first, second in zip(
        before[optimizer.method].get("curvature", []),
        after[optimizer.method].get("curvature", []),
        strict=True,
    ):
        assert_same(first, second)


CHANGES: dict[str, dict[str, Any]] = {
    "kfac": {"kfac_solver": "inverse", "kfac_approx": "reduce", "inverse_period": 2},
    "kfac inverse": {"damping": 0.2, "stat_decay": 0.5, "kl_clip": None, "stat_samples": 2},
    "ekfac": {"second_moments": "batch", "curvature_power": 0.5, "damping": 0.2},
    "eva": {"stat_decay": 0.1, "update_period": 2, "fisher_labels": "sampled", "seed": 1},
    "tengrad": {"kl_clip": 0.5, "damping_mode": "absolute", "fisher_labels": "empirical"},
    "seng": {"sketch_size": 3, "big_layer_size": 1, "big_rank": 1},
    "seng sketched": {"seed": 1, "update_scale": "rms"},
    "plain": {"update_rule": "adamw"},
}


@pytest.mark.parametrize(
    ("name", "change"), [(n, {k: v}) for n, c in CHANGES.items() for k, v in c.items()], ids=str
)
def test_other_settings_are_refused(name: str, change: dict[str, Any]) -> None:
    model = build()
    state = start(model, name).state_dict()
    other = start(build(), name, **change)
    (field,) = change
    with pytest.raises(FNGDError, match=f"written with {field}="):
        other.load_state_dict(state)


@pytest.mark.parametrize("first", [*METHODS, "plain", "fngd"])
@pytest.mark.parametrize("second", [*METHODS, "plain", "fngd"])
def test_states_of_other_methods_are_refused(first: str, second: str) -> None:
    optimizers = [
        create_preconditioned_optimizer(build(), method=m, lr=0.1) for m in (first, second)
    ]
    if first == second:
        optimizers[1].load_state_dict(optimizers[0].state_dict())
        return
    with pytest.raises(FNGDError, match="optimizer state is not"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("name", ["kfac", "seng", "plain"])
def test_other_layers_are_refused(name: str) -> None:
    state = start(build(), name).state_dict()
    with pytest.raises(FNGDError, match="other selected layers"):
        start(build(), name, exclude_modules=["1"]).load_state_dict(state)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "eva", "tengrad", "seng", "plain"])
def test_a_state_of_another_version_is_refused(name: str) -> None:
    optimizer = start(build(), name)
    older = optimizer.state_dict()
    older[name]["config"]["step_control"] = "norm"
    message = "another version of hf_fngd .*setting step_control.*: resume with that version"
    with pytest.raises(FNGDError, match=message):
        optimizer.load_state_dict(older)
    for part in ("steps",) if name == "plain" else ("steps", "updates", "curvature"):
        state = optimizer.state_dict()
        del state[name][part]
        with pytest.raises(FNGDError, match=f"another version of hf_fngd .*no '{part}' in its"):
            optimizer.load_state_dict(state)


def test_state_dtypes() -> None:
    for dtype, wanted in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (DOUBLE, DOUBLE),
    ):
        for name in VARIANTS:
            model = build(dtype)
            optimizer = start(model, name)
            if "plain" in name:
                continue
            train(model, optimizer, 0, 2)
            for layer in optimizer.layers:
                assert layer.state
                kinds = {k: v.dtype for k, v in layer.state.items() if v.is_floating_point()}
                counts = ("samples", "ratio")
                assert {v for k, v in kinds.items() if k not in counts} == {wanted}, kinds
            state = saved(optimizer.state_dict())
            twin = copy.deepcopy(model)
            other = start(twin, name)
            other.load_state_dict(state)
            for layer, copied in zip(optimizer.layers, other.layers, strict=True):
                assert_same(layer.state, copied.state)


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        *[(m, "update_period", v) for m in METHODS for v in (0, -1, 1.5, True)],
        *[(m, "damping", v) for m in METHODS for v in (0, -1.0, math.inf, math.nan)],
        *[("seng", "big_rank", v) for v in (0, -2, 1.0)],
        *[("seng", "sketch_size", v) for v in (-1, 2.5)],
        ("seng", "big_layer_size", -1),
        *[(m, "stat_decay", v) for m in ("kfac", "ekfac", "eva") for v in (1, 1.0, -0.1)],
        *[("kfac", "inverse_period", v) for v in (0, 0.5)],
        *[(m, "stat_samples", v) for m in ("kfac", "ekfac") for v in (0, -1, 2.5, True)],
        *[("ekfac", "curvature_power", v) for v in (0, 1.5, True)],
        ("ekfac", "second_moments", "rows"),
        ("kfac", "kfac_approx", "mean"),
        ("kfac", "kfac_solver", "eig"),
        *[(m, "kl_clip", v) for m in METHODS for v in (0, -1e-3, "norm", True)],
        *[(m, "fisher_labels", "true") for m in METHODS],
        ("tengrad", "gram_memory_mb", 0),
    ],
)
def test_bad_values_are_refused(method: str, field: str, value: Any) -> None:
    with pytest.raises(FNGDError, match=field):
        create_preconditioned_optimizer(build(), method=method, lr=0.1, **{field: value})


@pytest.mark.parametrize(
    ("method", "field", "near"),
    [
        ("kfac", "kfac_solvr", "kfac_solver"),
        ("kfac", "sketch_size", None),
        ("ekfac", "kfac_solver", None),
        ("ekfac", "second_moment", "second_moments"),
        ("eva", "stat_deacy", "stat_decay"),
        ("tengrad", "big_rank", None),
        ("seng", "sketchsize", "sketch_size"),
        ("plain", "update_period", None),
        ("fngd", "update_period", None),
    ],
)
def test_unknown_settings_are_refused(method: str, field: str, near: str | None) -> None:
    with pytest.raises(FNGDError, match=f"'{field}' is not a setting of") as caught:
        create_preconditioned_optimizer(build(), method=method, lr=0.1, **{field: 1})
    assert near is None or f"did you mean {near!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "field", "advice"),
    [
        ("tengrad", "rank_threshold", "the inverse is always exact"),
        ("tengrad", "gram_route", "fewer operations"),
        ("seng", "reference_sketch", "always unbiased"),
        ("seng", "big_product", "product of sums"),
        ("seng", "batch_norm", "AdamW updates"),
        ("kfac", "loss_terms", "set damping instead"),
        ("eva", "step_control", "set kl_clip to a number .* or to none"),
        ("plain", "damping", "no curvature to damp"),
    ],
)
def test_removed_settings_are_refused_with_the_reason(method: str, field: str, advice: str) -> None:
    with pytest.raises(FNGDError, match=f"^{field} is not a setting of .*: .*{advice}"):
        create_preconditioned_optimizer(build(), method=method, lr=0.1, **{field: 1})


def test_unknown_method_is_refused() -> None:
    with pytest.raises(FNGDError, match="'shampoo' is unknown: choose from fngd, kfac"):
        create_preconditioned_optimizer(build(), method="shampoo", lr=0.1)


def test_layers_that_no_method_knows() -> None:
    with pytest.raises(FNGDError, match="no layer matches"):
        make(nn.Sequential(nn.BatchNorm2d(3)), "kfac")


# ---- plain -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=0.1)),
        ({}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            {"update_rule": "adamw", "adam_beta1": 0.8},
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.999), weight_decay=0.0, fused=True),
        ),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_plain_is_torchs(settings: dict, reference: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))
    twin = copy.deepcopy(model)
    kinds = [type(module) for module in model]
    optimizer = create_preconditioned_optimizer(model, method="plain", lr=0.1, **settings)
    assert [type(module) for module in model] == kinds
    other = reference(twin.parameters())
    for _ in range(4):
        x = torch.randn(5, 2, 5, 5)
        for net, one in ((model, optimizer), (twin, other)):
            one.zero_grad()
            net(x).square().sum().backward()
            one.step()
    assert_same(model.state_dict(), twin.state_dict())


def test_plain_adamw_with_weight_decay_is_torchs() -> None:
    model, twin = build(), build()
    optimizer = create_preconditioned_optimizer(
        model, method="plain", lr=0.05, weight_decay=0.1, update_rule="adamw"
    )
    params = list(twin.parameters())
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    other = torch.optim.AdamW(groups, lr=0.05, fused=True)
    other.set_batch = other.start_epoch = lambda *_: None
    train(model, optimizer)
    train(twin, other)
    assert_same(model.state_dict(), twin.state_dict())


# ---- sizes -------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def feed(model: nn.Module, optimizer: Any, x: Tensor, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    (model(x).square().sum(-1).mean() * scale).backward()
    optimizer.step()


@pytest.mark.parametrize("big", [0, 10**6])
def test_ranks_and_sketches_beyond_the_layer_are_exact(big: int) -> None:
    # In a big layer the product of sums is exact for one sample.
    x = torch.randn(5 if big else 1, 3, dtype=DOUBLE)
    models = [small(DOUBLE) for _ in range(2)]
    feed(models[0], make(models[0], "tengrad"), x)
    huge = {"sketch_size": 10**6, "big_rank": 10**6, "big_layer_size": big}
    feed(models[1], make(models[1], "seng", **huge), x)
    assert_same(gradients(models[0]), gradients(models[1]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", BLOCKS)
def test_a_smaller_batch_waits_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = make(model, method, update_period=2)
    updates = []
    with caplog.at_level(logging.WARNING):
        for size in (6, 6, 4, 4, 4, 6, 2, 6, 6):
            feed(model, optimizer, torch.randn(size, 3))
            updates.append((int(optimizer.statistics()["updates"]), optimizer.last_size))
    # Step 2 waits, step 3 takes the small batch, step 5 the large one, and step 7 too.
    expected = [(1, 6), (1, 6), (1, 6), (2, 4), (2, 4), (3, 6), (3, 6), (4, 6), (4, 6)]
    assert updates == expected
    messages = [r.message for r in caplog.records if "update waits" in r.message]
    assert len(messages) == 1 and "a batch of 4 is smaller" in messages[0]


@pytest.mark.parametrize("method", ["kfac", "ekfac", "eva"])
def test_averages_take_small_batches(method: str) -> None:
    model = small()
    optimizer = make(model, method)
    for number, size in enumerate((6, 4, 1), start=1):
        feed(model, optimizer, torch.randn(size, 3))
        assert optimizer.statistics()["updates"] == number


# ---- what may go wrong -------------------------------------------------------------------------

HARD = [
    *[("kfac", {"kfac_solver": s, "kfac_approx": a, "stat_decay": 0.0, "inverse_period": 1})
      for s in ("eigen", "inverse") for a in ("expand", "reduce")],
    *[("ekfac", {"second_moments": s, "stat_decay": 0.0, "inverse_period": 1})
      for s in ("positions", "samples", "batch")],
    ("eva", {}),
    ("tengrad", {}),
    ("seng", {}),
    ("seng", {"sketch_size": 2}),
    ("seng", {"big_layer_size": 0, "big_rank": 1}),
    ("seng", {"big_layer_size": 0, "big_rank": 2, "sketch_size": 2}),
]  # fmt: skip


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize(("method", "settings"), HARD, ids=str)
def test_singular_curvature_is_harmless(
    method: str, settings: dict, mode: str, clip: float | None
) -> None:
    zero, one = torch.zeros(4, 3, 3), torch.ones(4, 3, 3)
    cases = {
        "zero gradients": (torch.randn(4, 3, 3), 0.0),
        "zero inputs": (zero, 1.0),
        "both": (zero, 0.0),
        "equal samples": (one, 1.0),
        "one sample": (torch.randn(1, 3, 3), 1.0),
        "tiny": (torch.randn(4, 3, 3) * 1e-15, 1e-12),
        "huge": (torch.randn(4, 3, 3) * 1e4, 1e10),
        "huger": (torch.randn(4, 3, 3) * 1e4, 1e24),
        "ordinary again": (torch.randn(4, 3, 3), 1.0),
    }
    for name, (x, scale) in cases.items():
        model = small()
        optimizer = make(model, method, lr=0.1, damping_mode=mode, kl_clip=clip, **settings)
        for _ in range(2):
            before = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            (model(x).square().sum(-1).mean() * scale).backward()
            if not all(g.isfinite().all() for g in gradients(model).values()):
                continue
            optimizer.step()
            for key, value in {**gradients(model), **model.state_dict()}.items():
                assert value.isfinite().all(), (name, key)
            model.load_state_dict(before)
        if name in ("zero gradients", "both"):
            assert all(not g.any() for g in gradients(model).values())


@pytest.mark.parametrize("damping", [1e-30, 1e-6])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize(("method", "settings"), HARD, ids=str)
def test_every_size_of_gradient_is_harmless(
    method: str, settings: dict, mode: str, damping: float
) -> None:
    # From what underflows when squared to what overflows, in steps that miss no border.
    x, state = torch.randn(4, 3, 3), small().state_dict()
    model = small()
    optimizer = make(
        model,
        method,
        lr=0.1,
        damping=damping,
        damping_mode=mode,
        kl_clip=1e-3,
        update_period=1,
        **settings,
    )
    for exponent in range(-44, 38, 2):
        model.load_state_dict(state)
        feed(model, optimizer, x, 10.0**exponent)
        if exponent > 18:
            # The step itself may be too long for float32; the direction must not be.
            model.load_state_dict(state)
        for key, value in {**gradients(model), **model.state_dict()}.items():
            assert value.isfinite().all(), (exponent, key)


def spoil(model: nn.Module, what: float, position: int = 0) -> Any:
    """Make one sample's gradient at one layer's output non-finite, as only its observer sees."""
    curvature = model[0].__dict__["_fngd_layer"]

    def observe(
        calls: list[Call], kappa: float, joint: bool, original: Any = curvature.observe
    ) -> None:
        broken = []
        for x, g, weight in calls:
            g = g.clone()
            g[1, position] = what
            broken.append(Call(x, g, weight))
        original(broken, kappa, joint)

    curvature.observe = observe
    return curvature


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("method", "settings"), HARD, ids=str)
def test_one_bad_sample_leaves_the_old_curvature(method: str, settings: dict, what: float) -> None:
    model = small()
    optimizer = make(model, method, lr=0.1, update_period=1, **settings)
    feed(model, optimizer, torch.randn(4, 5, 3))
    old = {k: v.clone() for k, v in optimizer.layers[0].state.items()}
    other = {k: v.clone() for k, v in optimizer.layers[1].state.items()}
    # The last position, which a low rank would cut off.
    curvature = spoil(model, what, position=-1)
    feed(model, optimizer, torch.randn(4, 5, 3))
    numbers = optimizer.statistics()
    assert numbers["nonfinite"] == 1
    # Moments of the batch are of the whole gradient, which is finite here.
    own = ("moments", "batches") if settings.get("second_moments") == "batch" else ()
    assert_same(*({k: v for k, v in one.items() if k not in own} for one in (curvature.state, old)))
    assert any(not torch.equal(v, other[k]) for k, v in optimizer.layers[1].state.items())
    for value in [*model.state_dict().values(), *gradients(model).values()]:
        assert value.isfinite().all()
    # The next batch is fine, and taken.
    del curvature.observe
    feed(model, optimizer, torch.randn(4, 5, 3))
    assert optimizer.statistics()["nonfinite"] == 1
    assert any(not torch.equal(v, old[k]) for k, v in optimizer.layers[0].state.items())


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize(("method", "settings"), HARD, ids=str)
def test_a_bad_first_batch_gives_plain_gradients(method: str, settings: dict, what: float) -> None:
    model, twin = small(), small()
    optimizer = make(model, method, **settings)
    spoil(model, what, position=-1)
    x = torch.randn(4, 5, 3)
    feed(model, optimizer, x)
    twin(x).square().sum(-1).mean().backward()
    assert not optimizer.layers[0].state
    assert_same(
        {k: v for k, v in gradients(model).items() if k.startswith("0")},
        {k: v for k, v in gradients(twin).items() if k.startswith("0")},
    )


@pytest.mark.parametrize("method", BLOCKS)
def test_lost_curvature_is_tried_again_at_once(method: str) -> None:
    model = small()
    optimizer = make(model, method, update_period=50)
    curvature = spoil(model, math.nan)
    feed(model, optimizer, torch.randn(4, 5, 3))
    del curvature.observe
    feed(model, optimizer, torch.randn(4, 5, 3))
    assert optimizer.layers[0].state
    assert optimizer.next_update == 51


@pytest.mark.parametrize("method", METHODS)
def test_unused_layer(method: str) -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)
            self.which = "used"

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.which)(x)

    model = Partial()
    optimizer = make(model, method, lr=0.1, update_period=1)
    before = model.unused.weight.detach().clone()
    feed(model, optimizer, torch.randn(4, 3))
    assert model.unused.weight.grad is None
    assert torch.equal(model.unused.weight, before)
    assert optimizer.layers[0].state and not optimizer.layers[1].state
    # It comes into use later.
    model.which = "unused"
    feed(model, optimizer, torch.randn(4, 3))
    assert optimizer.layers[1].state
    assert not torch.equal(model.unused.weight, before)
    assert optimizer.statistics()["nonfinite"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_frozen_bias(method: str) -> None:
    model, without = small(DOUBLE), small(DOUBLE)
    model[0].bias.requires_grad_(False)
    model[0].bias.zero_()
    old = without[0]
    without[0] = nn.Linear(3, 4, bias=False).double()
    without[0].weight = old.weight
    x = torch.randn(5, 3, dtype=DOUBLE)
    for net in (model, without):
        feed(net, make(net, method, lr=0.1), x)
    assert model[0].bias.grad is None and not model[0].bias.any()
    torch.testing.assert_close(blocks(without[0])[0], model[0].weight.grad)
    torch.testing.assert_close(model[0].weight, without[0].weight)


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["parameters", "autocast"])
def test_bf16(method: str, kind: str, labels: str) -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = copy.deepcopy(exact)
    x, y = torch.randn(16, 5, 6), torch.randint(0, 4, (16, 5))
    if kind == "parameters":
        model, inputs = model.bfloat16(), x.bfloat16()
    else:
        inputs = x
    found = []
    for net, data in ((exact, x), (model, inputs)):
        options = {"kl_clip": 1e-3, "fisher_labels": labels, "damping": 10.0}
        optimizer = make(net, method, lr=0.05, **options)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and net is model):
                loss = nn.functional.cross_entropy(net(data).flatten(0, 1).float(), y.flatten())
            loss.backward()
            optimizer.step()
        found.append({n: p.detach().float() for n, p in net.named_parameters()})
        for layer in optimizer.layers:
            assert all(
                v.dtype == torch.float32
                for k, v in layer.state.items()
                if v.is_floating_point() and v.dim()
            )
        kinds = {p.grad.dtype for p in net.parameters()}
        assert kinds == {next(net.parameters()).dtype}
    assert_same(found[0], found[1], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_layer_without_one_row_a_sample(method: str, caplog: pytest.LogCaptureFixture) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x.flatten(0, 1)).view(len(x), -1))

    model = Flat()
    plain = copy.deepcopy(model)
    optimizer = make(model, method)
    x = torch.randn(4, 2, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            optimizer.set_batch(torch.arange(4))
            feed(model, optimizer, x)
    assert [r.message for r in caplog.records if "inner is left out" in r.message] != []
    assert len(caplog.records) == 1
    numbers = optimizer.statistics()
    assert numbers["layers_dropped"] == 1 and numbers["layers"] == 1
    plain(x).square().sum(-1).mean().backward()
    assert torch.equal(model.inner.weight.grad, plain.inner.weight.grad)
    assert not torch.allclose(model.outer.weight.grad, plain.outer.weight.grad, rtol=1e-4)
    # Nobody says which of the two is the batch.
    optimizer = make(plain, method)
    with pytest.raises(FNGDError, match="disagree about the batch size"):
        feed(plain, optimizer, x)


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_observes_nothing(method: str, labels: str) -> None:
    model = small()
    optimizer = make(model, method, fisher_labels=labels)
    for context in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            model.train(training)
            with context():
                out = model(torch.randn(7, 3))
            assert out.grad_fn is None
    assert optimizer.batches.current is None and optimizer.seen == 0
    assert all(layer._pending is None for layer in optimizer.layers)
    # A batch of another size in between disturbs nothing.
    optimizer.set_batch(torch.arange(4))
    out = model(torch.randn(4, 3))
    with torch.no_grad():
        model(torch.randn(7, 3))
    out.square().mean().backward()
    optimizer.step()
    assert optimizer.steps == 1 and all(layer.state for layer in optimizer.layers)


@pytest.mark.parametrize("method", BLOCKS)
def test_steps_between_updates_keep_nothing(method: str) -> None:
    model = small()
    optimizer = make(model, method, update_period=3)
    feed(model, optimizer, torch.randn(4, 3))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        assert optimizer.batches.current is None and optimizer.seen == 0
        assert all(layer._pending is None for layer in optimizer.layers)
        optimizer.step()


def test_step_without_gradients() -> None:
    for method in (*METHODS, "plain"):
        model = small()
        before = copy.deepcopy(model.state_dict())
        make(model, method, lr=0.1).step()
        assert_same(model.state_dict(), before)


@pytest.mark.parametrize("method", METHODS)
def test_closure(method: str) -> None:
    model, twin = small(), small()
    x = torch.randn(4, 3)
    optimizer = make(model, method, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum(-1).mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0
    feed(twin, make(twin, method, lr=0.1), x)
    assert_same(model.state_dict(), twin.state_dict())

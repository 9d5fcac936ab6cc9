"""What one epoch collects, the next reuses under the same key; oracles are loops over samples."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    assert_same,
    gamma_of,
    gradients,
    padded_tokens,
    sample_gradients,
    tiny_marian,
    watch,
)
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDError, create_fngd_optimizer

DAMPING = 0.1
ROWS = 11
FIRST_EPOCH = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
LATER_EPOCH = [[10, 0, 5, 7], [3], [9, 1, 2]]
STORED = {"rtol": 1e-5, "atol": 1e-8}  # the store keeps float32
SHARES = ["sample", "label", "position", "layer"]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


@pytest.fixture
def inputs() -> Tensor:
    return (
        torch.randn(ROWS, 3, 4, dtype=torch.float64) * torch.linspace(0.3, 3, ROWS)[:, None, None]
    )


@pytest.fixture
def classes() -> Tensor:
    return torch.arange(ROWS) % 3


def shares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1) / len(x)


def per_sample(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    plain = copy.deepcopy(model)
    return {
        path: sample_gradients(lambda i: shares(plain, x)[i], list(layer.parameters()), len(x))
        for path, layer in plain.named_children()
        if isinstance(layer, nn.Linear)
    }


def gammas(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """γ of every layer of a batch, from gradients of single samples."""
    found = {}
    for path, u in per_sample(model, x).items():
        flat = torch.cat([part.flatten(1) for part in u], 1)
        found[path] = gamma_of(flat @ flat.t(), DAMPING)
    return found


def train(
    optimizer: FNGD, model: nn.Module, inputs: Tensor, classes: Tensor, batches: list[list[int]]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Steps through batches; gives the gradients of each before the step."""
    for rows in batches:
        optimizer.set_batch(rows, classes[rows])
        shares(model, inputs[rows]).sum().backward()
        yield rows, gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def check(model: nn.Module, x: Tensor, found: dict[str, Tensor], gamma: dict[str, Tensor]) -> None:
    """Compares gradients with the weighted mean of gradients of single samples."""
    for path, u in per_sample(model, x).items():
        layer = model.get_submodule(path)
        for (kind, _), part in zip(layer.named_parameters(), u, strict=True):
            expected = torch.einsum("n,n...->...", gamma[path], part) / len(x)
            torch.testing.assert_close(found[f"{path}.{kind}"], expected, **STORED)


def key_of(share: str, rows: list[int], place: int) -> int:
    return {"sample": rows[place], "label": rows[place] % 3, "position": place, "layer": 0}[share]


@pytest.mark.parametrize("share", SHARES)
def test_coefficients_come_back_under_their_key(
    share: str, model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    # lr=0: coefficients of the first epoch are those of the oracle at the same weights.
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    collected: dict[tuple[str, int], list[float]] = {}
    for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
        gamma = gammas(model, inputs[rows])
        check(model, inputs[rows], found, gamma)
        for path, values in gamma.items():
            for place, value in enumerate(values.tolist()):
                collected.setdefault((path, key_of(share, rows, place)), []).append(value)
    first = optimizer.statistics()
    assert first["phase"] == "collect" and first["gram_seconds"] > 0
    optimizer.start_epoch(1)
    for rows, found in train(optimizer, model, inputs, classes, LATER_EPOCH):
        expected = {}
        for path in gammas(model, inputs[rows]):
            values = [collected[path, key_of(share, rows, p)] for p in range(len(rows))]
            expected[path] = torch.tensor([sum(v) / len(v) for v in values]).double()
            if share == "position":
                # Of a short batch the mean step is that of a full one.
                full = [sum(vs) / len(vs) for (p, _), vs in collected.items() if p == path]
                expected[path] *= sum(full) / len(full) / expected[path].mean()
        check(model, inputs[rows], found, expected)
    later = optimizer.statistics()
    assert later["phase"] == "reuse" and later["epoch"] == 1
    # No Gram matrix was formed, no coefficient computed.
    assert later["gram_seconds"] == first["gram_seconds"] and "gamma_mean" not in later


def test_none_computes_in_every_epoch(model: nn.Module, inputs: Tensor, classes: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none", damping=DAMPING)
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
            check(model, inputs[rows], found, gammas(model, inputs[rows]))
        assert optimizer.statistics()["phase"] == "collect"


def test_unknown_rows_make_their_batch_fresh(
    model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share="sample", damping=DAMPING)
    list(train(optimizer, model, inputs, classes, FIRST_EPOCH[:1]))
    optimizer.start_epoch(1)
    before = optimizer.statistics()["gram_seconds"]
    batch = [0, 1, 8]
    ((_, found),) = train(optimizer, model, inputs, classes, [batch])
    fresh = gammas(model, inputs[batch])
    check(model, inputs[batch], found, fresh)
    numbers = optimizer.statistics()
    assert numbers["reuse_rate"] == pytest.approx(2 / 3) and numbers["gram_seconds"] > before
    # Now all three are known.
    ((_, found),) = train(optimizer, model, inputs, classes, [batch[::-1]])
    check(model, inputs[batch[::-1]], found, {k: v.flip(0) for k, v in fresh.items()})
    again = optimizer.statistics()
    assert again["gram_seconds"] == numbers["gram_seconds"]
    assert again["reuse_rate"] == pytest.approx(5 / 6)
    optimizer.start_epoch(2)
    assert "reuse_rate" not in optimizer.statistics()


def test_memory_of_later_epochs(model: nn.Module, inputs: Tensor, classes: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share="sample")
    list(train(optimizer, model, inputs, classes, FIRST_EPOCH))
    optimizer.start_epoch(1)
    assert optimizer.coefficients.store.table.untyped_storage().nbytes() == 4 * ROWS * 2


@pytest.mark.parametrize("share", ["sample", "layer"])
def test_refresh_every(share: str, model: nn.Module, inputs: Tensor, classes: Tensor) -> None:
    optimizer = create_fngd_optimizer(
        model, lr=0.1, share=share, damping=DAMPING, refresh_every=2, momentum=0.0
    )
    gamma: dict[str, Tensor] = {}
    for epoch in range(4):
        optimizer.start_epoch(epoch)
        assert optimizer.statistics()["phase"] == ("reuse" if epoch % 2 else "collect")
        for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH[:1]):
            if epoch % 2 == 0:
                gamma = gammas(model, inputs[rows])
            elif share == "layer":
                gamma = {path: value.mean().expand(len(rows)) for path, value in gamma.items()}
            check(model, inputs[rows], found, gamma)


@pytest.mark.parametrize("share", ["sample", "layer", "none"])
def test_collect_from(share: str, model: nn.Module, inputs: Tensor, classes: Tensor) -> None:
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(
        model, lr=0.1, share=share, damping=DAMPING, collect_from=2, update_scale="none"
    )
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        assert optimizer.statistics()["phase"] == "wait"
        for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
            reference.zero_grad()
            shares(plain, inputs[rows]).sum().backward()
            assert_same(found, gradients(plain))
            reference.step()
    numbers = optimizer.statistics()
    assert numbers["gram_seconds"] == 0 and "reuse_rate" not in numbers
    collected: dict[int, dict[str, Tensor]] = {}
    optimizer.start_epoch(2)
    assert optimizer.statistics()["phase"] == "collect"
    for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
        collected[rows[0]] = gammas(model, inputs[rows])
        check(model, inputs[rows], found, collected[rows[0]])
    optimizer.start_epoch(3)
    assert optimizer.statistics()["phase"] == ("collect" if share == "none" else "reuse")
    for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
        gamma = gammas(model, inputs[rows]) if share == "none" else collected[rows[0]]
        if share == "layer":
            total = {path: torch.cat([one[path] for one in collected.values()]) for path in gamma}
            gamma = {path: value.mean().expand(len(rows)) for path, value in total.items()}
        check(model, inputs[rows], found, gamma)


@pytest.mark.parametrize("refresh_every", [0, 5])
@pytest.mark.parametrize("share", ["sample", "label"])
def test_mean_over_collected_epochs(
    share: str, refresh_every: int, model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    optimizer = create_fngd_optimizer(
        model,
        lr=0.1,
        share=share,
        damping=DAMPING,
        collect_from=1,
        collect_epochs=3,
        refresh_every=refresh_every,
    )
    epochs: list[dict[str, Tensor]] = []
    rows = FIRST_EPOCH[0]  # classes 0, 1, 2, 0
    for epoch in range(11):
        optimizer.start_epoch(epoch)
        since = (epoch - 1) % refresh_every if refresh_every else epoch - 1
        wanted = "wait" if epoch == 0 else "collect" if since < 3 else "reuse"
        assert optimizer.statistics()["phase"] == wanted
        for _, found in train(optimizer, model, inputs, classes, [rows]):
            if wanted == "collect":
                epochs = (epochs if since else []) + [gammas(model, inputs[rows])]
                check(model, inputs[rows], found, epochs[-1])
            elif wanted == "reuse":
                mean = {p: sum(one[p] for one in epochs) / 3 for p in epochs[0]}
                if share == "label":
                    for value in mean.values():
                        value[[0, 3]] = value[[0, 3]].mean()
                check(model, inputs[rows], found, mean)


@pytest.mark.parametrize("share", ["label", "layer"])
def test_some_steps_of_an_epoch_are_enough(
    share: str, model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    options = {"collect_every": 3, "refresh_every": 2, "update_scale": "none"}
    optimizer = create_fngd_optimizer(model, lr=0.1, share=share, damping=DAMPING, **options)
    batches = [FIRST_EPOCH[i % len(FIRST_EPOCH)] for i in range(5)]
    for epoch in range(4):
        optimizer.start_epoch(epoch)
        if epoch % 2 == 0:
            collected: dict[tuple[str, int], list[float]] = {}
        for step, (rows, found) in enumerate(train(optimizer, model, inputs, classes, batches)):
            gamma = gammas(model, inputs[rows])
            if epoch % 2 == 0 and step % 3 == 0:
                for path, values in gamma.items():
                    for place, value in enumerate(values.tolist()):
                        collected.setdefault((path, key_of(share, rows, place)), []).append(value)
            else:
                for path in gamma:
                    seen = [v for (p, _), vs in collected.items() if p == path for v in vs]
                    keys = [key_of(share, rows, place) for place in range(len(rows))]
                    known = [collected.get((path, key), seen) for key in keys]
                    gamma[path] = torch.tensor([sum(v) / len(v) for v in known]).double()
            check(model, inputs[rows], found, gamma)


def test_each_epoch_counts_once_in_the_mean(model: nn.Module, inputs: Tensor) -> None:
    """However often what a batch found is written: with accumulation, and with a checkpoint."""
    optimizer = create_fngd_optimizer(model, lr=0.1, damping=DAMPING, collect_epochs=2)
    epochs: list[Tensor] = []
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        found = []
        for rows in FIRST_EPOCH:
            optimizer.set_batch(rows)
            shares(model, inputs[rows]).sum().backward()
            optimizer.state_dict()
            found.append(torch.stack(list(gammas(model, inputs[rows]).values()), 1))
        epochs.append(torch.cat(found))
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(*epochs, rtol=1e-3)
    expected = (epochs[0] + epochs[1]) / 2
    assert_same({"γ": optimizer.coefficients.store.values().double()}, {"γ": expected}, **STORED)


def test_tempered_weights_are_used_and_stored(
    model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    optimizer = create_fngd_optimizer(
        model, lr=0.0, damping=DAMPING, gamma_scale="one", gamma_max=1.3, gamma_power=0.5
    )
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
            gamma = gammas(model, inputs[rows])
            gamma = {p: (g / g.mean()).clamp(0, 1.3).sqrt() for p, g in gamma.items()}
            assert any((g == 1.3**0.5).any() for g in gamma.values())
            check(model, inputs[rows], found, gamma)


def test_power_zero_is_the_plain_gradient(
    model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=1e-4, gamma_power=0.0)
    for rows, found in train(optimizer, model, inputs, classes, FIRST_EPOCH):
        plain.zero_grad()
        shares(plain, inputs[rows]).sum().backward()
        assert_same(found, gradients(plain), rtol=1e-12, atol=1e-15)


def test_more_collected_epochs_than_there_are_is_refused() -> None:
    with pytest.raises(
        FNGDError, match="refresh_every=2 is less than collect_epochs=3: .*share=none"
    ):
        create_fngd_optimizer(nn.Linear(2, 2), lr=0.1, refresh_every=2, collect_epochs=3)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("share", ["sample", "label"])
def test_batch_must_be_announced(share: str, epoch: int, model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share=share)
    optimizer.start_epoch(epoch)
    with pytest.raises(FNGDError, match=f"share={share} needs set_batch"):
        shares(model, inputs)
    # An announcement is good for one step.
    optimizer.set_batch(range(ROWS), torch.zeros(ROWS, dtype=torch.long))
    shares(model, inputs).sum().backward()
    optimizer.step()
    with pytest.raises(FNGDError, match="set_batch"):
        shares(model, inputs)
    for arguments in ({}, {"labels": inputs} if share == "sample" else {"sample_ids": [1]}):
        with pytest.raises(FNGDError, match=f"share={share} needs"):
            optimizer.set_batch(**arguments)


@pytest.mark.parametrize("share", ["position", "layer", "none"])
def test_batch_need_not_be_announced(share: str, model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    for size in (4, 4, 7, 2):
        shares(model, inputs[:size]).sum().backward()
        check(model, inputs[:size], gradients(model), gammas(model, inputs[:size]))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("share", ["sample", "label", "layer"])
def test_accumulation_equals_one_batch(share: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, classes = torch.randn(32, 5, 4).double(), torch.arange(32) % 5
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    list(train(optimizer, model, x, classes, [list(range(i, i + 8)) for i in range(0, 32, 8)]))
    optimizer.start_epoch(1)
    order = torch.randperm(32)
    found = []
    for size in (32, 8):
        optimizer.zero_grad()
        for rows in order.split(size):
            optimizer.set_batch(rows, classes[rows])
            (shares(model, x[rows]).sum() * size / 32).backward()
        found.append(gradients(model))
    assert_same(*found, rtol=1e-12, atol=1e-12)
    assert optimizer.statistics()["phase"] == "reuse"


@pytest.mark.parametrize("share", SHARES)
def test_start_epoch_is_idempotent(
    share: str, model: nn.Module, inputs: Tensor, classes: Tensor
) -> None:
    twin = copy.deepcopy(model)
    results = []
    for which, times in ((model, 1), (twin, 3)):
        optimizer = create_fngd_optimizer(
            which, lr=0.1, share=share, refresh_every=2, damping=DAMPING
        )
        seen = []
        for epoch in range(4):
            for part in (FIRST_EPOCH[:2], FIRST_EPOCH[2:]):
                for _ in range(times):
                    optimizer.start_epoch(epoch)
                seen += [g for _, g in train(optimizer, which, inputs, classes, part)]
        results.append(seen)
    for first, second in zip(*results, strict=True):
        assert_same(first, second)


def test_two_batches_before_one_backward(model: nn.Module, inputs: Tensor, classes: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share="sample", damping=DAMPING)
    losses = []
    for rows in FIRST_EPOCH[:2]:
        optimizer.set_batch(rows)
        losses.append(shares(model, inputs[rows]).sum())
    sum(losses).backward()
    optimizer.step()
    optimizer.start_epoch(1)
    optimizer.set_batch(sum(FIRST_EPOCH[:2], []))
    assert optimizer.statistics()["reuse_rate"] == 1


def test_short_batch_by_position_stays_finite(model: nn.Module, inputs: Tensor) -> None:
    # Coefficients of single places may be negative, so those of the first two may cancel.
    optimizer = create_fngd_optimizer(model, lr=0.0, share="position")
    for layer in range(2):
        optimizer.coefficients.store.write(
            layer, torch.arange(4), torch.tensor([-0.5, 0.5, 1.0, 1.0])
        )
    optimizer.start_epoch(1)
    shares(model, inputs[:2]).sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())


# ---- labels of tokens ----------------------------------------------------------------------------

SOURCE_SIDE = r"\.encoder\.|encoder_attn\.[kv]_proj"


def translate(model: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    out = model(
        input_ids=source.clamp(min=0),
        attention_mask=(source >= 0).long(),
        decoder_input_ids=target.clamp(min=0),
    )
    return nn.functional.cross_entropy(out.logits.flatten(0, 1), target.flatten())


def token_batch(lengths: list[int]) -> Tensor:
    tokens, mask = padded_tokens(lengths)
    return tokens.masked_fill(mask == 0, -100)


@pytest.mark.parametrize("pad", [-100, 0], ids=["ignored padding", "padding id"])
@pytest.mark.parametrize("unit", ["token", "sample"])
def test_labels_of_an_encoder_decoder(unit: str, pad: int) -> None:
    model = tiny_marian().double().eval()
    plain = copy.deepcopy(model)
    optimizer = create_fngd_optimizer(
        model, lr=0.0, share="label", fisher_unit=unit, damping=DAMPING, momentum=0.0
    )
    seen = {path: watch(plain.get_submodule(path)) for path in optimizer.selection.chosen}
    sums: dict[tuple[str, int], list[float]] = {}
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        source, target = token_batch([5, 2, 7]), token_batch([3, 4, 6])
        for pair in seen.values():
            pair.clear()
        labels = {
            SOURCE_SIDE: source.masked_fill(source < 0, pad),
            "": target.masked_fill(target < 0, pad),
        }
        if unit == "sample":
            labels = target[:, 0]
        optimizer.set_batch(labels=labels)
        model.zero_grad()
        translate(model, source, target).backward()
        plain.zero_grad()
        translate(plain, source, target).backward()
        for path, (a, g) in seen.items():
            keys = (source if re.search(SOURCE_SIDE, path) else target).flatten()
            if unit == "sample":
                keys = target[:, 0]
            gamma = unit_gammas(a, g, unit, 3)
            if epoch == 0:
                # A position without a gradient (padding, a query with one key) is no sample.
                living = (g.abs().sum(1) > 0) if unit == "token" else keys >= 0
                counted = zip(keys.tolist(), gamma.tolist(), living.tolist(), strict=True)
                for key, value, lives in counted:
                    if key >= 0 and lives:
                        sums.setdefault((path, key), []).append(value)
            else:
                everything = [v for (p, _), vs in sums.items() if p == path for v in vs]
                mean = sum(everything) / len(everything)
                means = [sums.get((path, key), [mean]) for key in keys.tolist()]
                gamma = torch.tensor([sum(v) / len(v) for v in means]).double()
            repeated = gamma.repeat_interleave(len(a) // len(gamma))
            layer = model.get_submodule(path)
            torch.testing.assert_close(layer.weight.grad, (g * repeated[:, None]).t() @ a, **STORED)
            torch.testing.assert_close(layer.bias.grad, repeated @ g, **STORED)


def unit_gammas(a: Tensor, g: Tensor, unit: str, count: int) -> Tensor:
    """γ of samples, or of positions that have a gradient, from inputs and output gradients."""
    u = torch.cat([torch.einsum("no,ni->noi", g, a).flatten(1), g], 1)
    if unit == "sample":
        u = u.view(count, -1, u.shape[1]).sum(1)
    alive = u.abs().sum(1) > 0
    gamma = torch.ones(len(u), dtype=u.dtype)
    gamma[alive] = gamma_of(u[alive] @ u[alive].t(), DAMPING)
    return gamma


@pytest.mark.parametrize(
    "labels",
    [
        lambda source, target: target,
        lambda source, target: {r"\.decoder\.": target},
        lambda source, target: {r"\.encoder\.": target, "": source},
    ],
    ids=["no mapping", "no pattern", "wrong side"],
)
def test_labels_of_another_shape_name_the_layer(
    labels: Callable[[Tensor, Tensor], Tensor | dict[str, Tensor]],
) -> None:
    model = tiny_marian().eval()
    optimizer = create_fngd_optimizer(model, lr=0.1, share="label", fisher_unit="token")
    source, target = token_batch([5, 2, 7]), token_batch([3, 4, 6])
    optimizer.set_batch(labels=labels(source, target))
    with pytest.raises(
        FNGDError, match=r"model\.\w+coder\.layers.*needs labels of shape \(3, \d\)"
    ):
        translate(model, source, target).backward()

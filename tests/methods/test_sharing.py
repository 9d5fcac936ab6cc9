"""What one epoch collects, the next reuses under the same key; oracles are loops over samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDError, create_fngd_optimizer
from tests.helpers import assert_same, gamma_of, gradients, sample_gradients

DAMPING = 0.1
ROWS = 11
FIRST_EPOCH = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
LATER_EPOCH = [[10, 0, 5, 7], [3], [9, 1, 2]]
STORED = {"rtol": 1e-5, "atol": 1e-8}  # the store keeps float32
SHARES = ["sample", "layer"]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


@pytest.fixture
def inputs() -> Tensor:
    return (
        torch.randn(ROWS, 2, 4, dtype=torch.float64) * torch.linspace(0.3, 3, ROWS)[:, None, None]
    )


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
    optimizer: FNGD, model: nn.Module, inputs: Tensor, batches: list[list[int]]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Step through batches, and yield the gradients of each before the step."""
    for rows in batches:
        optimizer.set_batch(rows)
        shares(model, inputs[rows]).sum().backward()
        yield rows, gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def check(model: nn.Module, x: Tensor, found: dict[str, Tensor], gamma: dict[str, Tensor]) -> None:
    """Compare gradients with the weighted mean of gradients of single samples."""
    for path, u in per_sample(model, x).items():
        layer = model.get_submodule(path)
        for (kind, _), part in zip(layer.named_parameters(), u, strict=True):
            expected = torch.einsum("n,n...->...", gamma[path], part) / len(x)
            torch.testing.assert_close(found[f"{path}.{kind}"], expected, **STORED)


@pytest.mark.parametrize("share", SHARES)
def test_coefficients_come_back_under_their_key(
    share: str, model: nn.Module, inputs: Tensor
) -> None:
    # lr=0: coefficients of the first epoch are those of the oracle at the same weights.
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    collected: dict[str, dict[int, float]] = {}
    for rows, found in train(optimizer, model, inputs, FIRST_EPOCH):
        gamma = gammas(model, inputs[rows])
        check(model, inputs[rows], found, gamma)
        for path, values in gamma.items():
            collected.setdefault(path, {}).update(zip(rows, values.tolist(), strict=True))
    first = optimizer.statistics()
    assert first["phase"] == "collect" and first["gram_seconds"] > 0
    optimizer.start_epoch(1)
    for rows, found in train(optimizer, model, inputs, LATER_EPOCH):
        expected = {}
        for path, known in collected.items():
            mean = sum(known.values()) / len(known)
            values = [known[row] if share == "sample" else mean for row in rows]
            expected[path] = torch.tensor(values).double()
        check(model, inputs[rows], found, expected)
    later = optimizer.statistics()
    assert later["phase"] == "reuse" and later["epoch"] == 1
    # No Gram matrix was formed, no coefficient computed.
    assert later["gram_seconds"] == first["gram_seconds"] and "gamma_mean" not in later


def test_none_computes_in_every_epoch(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none", damping=DAMPING)
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        for rows, found in train(optimizer, model, inputs, FIRST_EPOCH):
            check(model, inputs[rows], found, gammas(model, inputs[rows]))
        assert optimizer.statistics()["phase"] == "collect"


def test_unknown_rows_make_their_batch_fresh(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share="sample", damping=DAMPING)
    list(train(optimizer, model, inputs, FIRST_EPOCH[:1]))
    optimizer.start_epoch(1)
    before = optimizer.statistics()["gram_seconds"]
    batch = [0, 1, 8]
    ((_, found),) = train(optimizer, model, inputs, [batch])
    fresh = gammas(model, inputs[batch])
    check(model, inputs[batch], found, fresh)
    numbers = optimizer.statistics()
    assert numbers["reuse_rate"] == pytest.approx(2 / 3) and numbers["gram_seconds"] > before
    # Now all three are known.
    ((_, found),) = train(optimizer, model, inputs, [batch[::-1]])
    check(model, inputs[batch[::-1]], found, {k: v.flip(0) for k, v in fresh.items()})
    again = optimizer.statistics()
    assert again["gram_seconds"] == numbers["gram_seconds"]
    assert again["reuse_rate"] == pytest.approx(5 / 6)
    optimizer.start_epoch(2)
    assert "reuse_rate" not in optimizer.statistics()


def test_memory_of_later_epochs(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share="sample")
    list(train(optimizer, model, inputs, FIRST_EPOCH))
    optimizer.start_epoch(1)
    assert optimizer.store.table.untyped_storage().nbytes() == 4 * ROWS * 2


@pytest.mark.parametrize("share", ["sample", "layer"])
def test_refresh_every(share: str, model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(
        model, lr=0.1, share=share, damping=DAMPING, refresh_every=2, momentum=0.0
    )
    gamma: dict[str, Tensor] = {}
    for epoch in range(4):
        optimizer.start_epoch(epoch)
        assert optimizer.statistics()["phase"] == ("reuse" if epoch % 2 else "collect")
        for rows, found in train(optimizer, model, inputs, FIRST_EPOCH[:1]):
            if epoch % 2 == 0:
                gamma = gammas(model, inputs[rows])
            elif share == "layer":
                gamma = {path: value.mean().expand(len(rows)) for path, value in gamma.items()}
            check(model, inputs[rows], found, gamma)


def test_each_sample_counts_once_in_the_mean(model: nn.Module, inputs: Tensor) -> None:
    """However often a batch's coefficients are written: with accumulation and with a checkpoint."""
    optimizer = create_fngd_optimizer(model, lr=0.1, share="layer", damping=DAMPING)
    found = []
    for rows in FIRST_EPOCH:
        optimizer.set_batch(rows)
        shares(model, inputs[rows]).sum().backward()
        optimizer.state_dict()
        found.append(torch.stack(list(gammas(model, inputs[rows]).values()), 1))
    optimizer.step()
    expected = torch.cat(found).mean(0, keepdim=True)
    assert_same({"γ": optimizer.coefficients().double()}, {"γ": expected}, **STORED)


def test_kept_coefficients_can_be_read(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=DAMPING)
    assert optimizer.layer_names == ["0", "2"]
    assert optimizer.coefficients().shape == (0, 2)
    found = {rows[0]: gammas(model, inputs[rows]) for rows in FIRST_EPOCH}
    list(train(optimizer, model, inputs, FIRST_EPOCH[::-1]))
    # Rows in the order in which they came.
    expected = torch.cat([torch.stack(list(found[i].values()), 1) for i in (8, 4, 0)])
    table = optimizer.coefficients()
    assert table.dtype is torch.float32
    assert_same({"γ": table.double()}, {"γ": expected}, **STORED)
    # It is a copy.
    table.zero_()
    assert_same({"γ": optimizer.coefficients().double()}, {"γ": expected}, **STORED)


def test_rows_without_coefficients_are_nan(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=DAMPING)
    optimizer.bind_dataset(ROWS)
    list(train(optimizer, model, inputs, FIRST_EPOCH[1:2]))
    table = optimizer.coefficients()
    known = torch.zeros(ROWS, dtype=torch.bool)
    known[FIRST_EPOCH[1]] = True
    assert torch.equal(table.isfinite(), known.unsqueeze(1).expand(ROWS, 2))
    expected = torch.stack(list(gammas(model, inputs[known]).values()), 1)
    assert_same({"γ": table[known].double()}, {"γ": expected}, **STORED)
    by_layer = create_fngd_optimizer(copy.deepcopy(model), lr=0.0, share="layer")
    assert by_layer.coefficients().shape == (1, 2) and by_layer.coefficients().isnan().all()
    assert create_fngd_optimizer(model, lr=0.0, share="none").coefficients() is None


@pytest.mark.parametrize("epoch", [0, 1])
def test_batch_must_be_announced(epoch: int, model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.1, share="sample")
    optimizer.start_epoch(epoch)
    with pytest.raises(FNGDError, match="share=sample needs set_batch"):
        shares(model, inputs)
    # An announcement is good for one step.
    optimizer.set_batch(range(ROWS))
    shares(model, inputs).sum().backward()
    optimizer.step()
    with pytest.raises(FNGDError, match="set_batch"):
        shares(model, inputs)
    for arguments in ({}, {"lengths": [3] * ROWS}):
        with pytest.raises(FNGDError, match="share=sample needs"):
            optimizer.set_batch(**arguments)


@pytest.mark.parametrize("share", ["layer", "none"])
def test_batch_need_not_be_announced(share: str, model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    for size in (4, 4, 7, 2):
        shares(model, inputs[:size]).sum().backward()
        check(model, inputs[:size], gradients(model), gammas(model, inputs[:size]))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("share", SHARES)
def test_accumulation_equals_one_batch(share: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(32, 5, 4).double()
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    list(train(optimizer, model, x, [list(range(i, i + 8)) for i in range(0, 32, 8)]))
    optimizer.start_epoch(1)
    order = torch.randperm(32)
    found = []
    for size in (32, 8):
        optimizer.zero_grad()
        for rows in order.split(size):
            optimizer.set_batch(rows)
            (shares(model, x[rows]).sum() * size / 32).backward()
        found.append(gradients(model))
    assert_same(*found, rtol=1e-12, atol=1e-12)
    assert optimizer.statistics()["phase"] == "reuse"


@pytest.mark.parametrize("share", SHARES)
def test_start_epoch_is_idempotent(share: str, model: nn.Module, inputs: Tensor) -> None:
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
                seen += [g for _, g in train(optimizer, which, inputs, part)]
        results.append(seen)
    for first, second in zip(*results, strict=True):
        assert_same(first, second)


def test_two_batches_before_one_backward(model: nn.Module, inputs: Tensor) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share="sample", damping=DAMPING)
    losses = []
    for rows in FIRST_EPOCH[:2]:
        optimizer.set_batch(rows)
        losses.append(shares(model, inputs[rows]).sum())
    sum(losses).backward()
    optimizer.step()
    optimizer.start_epoch(1)
    both = sum(FIRST_EPOCH[:2], [])
    optimizer.set_batch(both)
    assert "reuse_rate" not in optimizer.statistics(), "a batch counts once it is used"
    shares(model, inputs[both]).sum().backward()
    assert optimizer.statistics()["reuse_rate"] == 1


@pytest.mark.feature("Gradual unfreezing", "works", "a layer that trains again gets coefficients")
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("share", "announced"), [("sample", True), ("layer", True), ("layer", False)]
)
def test_a_thawed_layer_gets_coefficients(
    model: nn.Module, inputs: Tensor, share: str, announced: bool, resumed: bool
) -> None:
    optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
    thawed = model[2]
    thawed.requires_grad_(False)

    def epoch(number: int, changed: int = -1) -> Iterator[tuple[dict, dict]]:
        optimizer.start_epoch(number)
        for step, rows in enumerate(FIRST_EPOCH):
            if step == changed:
                thawed.requires_grad_(True)
            if announced:
                optimizer.set_batch(rows)
            shares(model, inputs[rows]).sum().backward()
            found = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            yield rows, found

    list(epoch(0))
    if resumed:
        state = optimizer.state_dict()
        # As a script makes it before it freezes the layer.
        thawed.requires_grad_(True)
        optimizer = create_fngd_optimizer(model, lr=0.0, share=share, damping=DAMPING)
        optimizer.load_state_dict(state)
        thawed.requires_grad_(False)
    seen = list(epoch(1, changed=0))
    for rows, found in seen if announced else seen[1:]:
        thawed.requires_grad_(True)
        gamma, u = gammas(model, inputs[rows])["2"], per_sample(model, inputs[rows])["2"][0]
        expected = (gamma.view(-1, 1, 1) * u).mean(0)
        torch.testing.assert_close(found["2.weight"], expected, rtol=1e-9, atol=1e-12)
    assert optimizer.coefficients().isfinite().all()
    assert optimizer.statistics()["phase"] == "collect"
    list(epoch(2))
    assert optimizer.statistics()["phase"] == "reuse"
    if share == "sample":
        for rows, _ in seen:
            expected = gammas(model, inputs[rows])["2"].float()
            torch.testing.assert_close(optimizer.coefficients()[rows, 1], expected)

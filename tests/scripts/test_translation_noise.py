"""Misaligned pairs of scripts/run_translation.py, and how well FNGD's coefficients detect them."""

import sys

import datasets
import pytest
import torch

from hf_fngd import create_fngd_optimizer
from tests.hf.test_runner import ROOT


@pytest.fixture(scope="module")
def noise():
    sys.path.insert(0, str(ROOT / "scripts"))
    from translation import noise

    yield noise
    sys.path.remove(str(ROOT / "scripts"))


def pairs(count):
    texts = [str(i) for i in range(count)]
    return datasets.Dataset.from_dict({"source": texts, "target": [f"t{t}" for t in texts]})


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 2), (0.4, 8), (1.0, 20)])
def test_chosen_pairs_get_the_target_of_another(fraction, count, noise):
    found = noise.misalign(pairs(20), fraction, 3)
    assert found["source"][:] == [str(i) for i in range(20)]
    assert sorted(found["target"]) == sorted(f"t{i}" for i in range(20))
    wrong = [s != t[1:] for s, t in zip(found["source"], found["target"], strict=True)]
    assert wrong == found["misaligned"][:] and sum(wrong) == count
    again, other = (noise.misalign(pairs(20), fraction, seed) for seed in (3, 4))
    assert again["target"][:] == found["target"][:]
    assert count in (0, 20) or other["misaligned"][:] != found["misaligned"][:]


@pytest.mark.parametrize(
    ("fraction", "message"), [(1.5, "must be in .0, 1., not 1.5"), (0.05, "one pair")]
)
def test_bad_fraction(fraction, message, noise):
    from common.arguments import InputError

    with pytest.raises(InputError, match=message):
        noise.misalign(pairs(20), fraction, 0)


def test_auc_counts_ordered_couples(noise):
    larger, smaller = torch.randn(40).round(decimals=1), torch.randn(30).round(decimals=1) - 0.5
    couples = larger[:, None] - smaller[None, :]
    expected = ((couples > 0).double() + 0.5 * (couples == 0)).mean()
    assert noise.auc(larger, smaller) == pytest.approx(float(expected), rel=1e-12)
    assert noise.auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0])) == 1.0


def test_separation_reads_the_store_by_row(noise):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    rows = noise.misalign(pairs(24), 0.25, 0)
    noisy = torch.tensor(rows["misaligned"])
    # Gradients of misaligned rows are made far larger, so their γ is smaller.
    inputs = torch.randn(24, 3) + 1
    targets = model(inputs).detach() + torch.where(noisy, 8.0, 0.5)[:, None]
    optimizer = create_fngd_optimizer(model, lr=0.0, damping=0.01)
    optimizer.bind_dataset(24)
    assert noise.separation(optimizer, rows) is None  # nothing is stored yet
    for batch in torch.randperm(24).split(8):
        optimizer.set_batch(sample_ids=batch)
        torch.nn.functional.mse_loss(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = noise.separation(optimizer, rows)
    assert found["pairs"] == 6 and found["auc"] > 0.8
    assert found["gamma_aligned"] > found["gamma_misaligned"]
    assert list(found["auc_by_layer"]) == ["0", "2"]
    table = optimizer.coefficients()
    assert found["auc_by_layer"]["2"] == noise.auc(table[~noisy, 1], table[noisy, 1])
    assert noise.separation(optimizer, noise.misalign(pairs(24), 0.0, 0)) is None
    optimizer.detach()
    other = create_fngd_optimizer(model, lr=0.0, share="layer")
    assert noise.separation(other, rows) is None
    assert noise.separation(None, rows) is None

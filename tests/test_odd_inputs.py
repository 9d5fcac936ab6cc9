"""Parameters, batches and ids of unusual kinds: trained as by torch, or refused in a sentence."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_fngd import FNGDError, create_fngd_optimizer, create_preconditioned_optimizer
from hf_fngd.methods import METHODS


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def make(model, method, **settings):
    own = {"share": "none"} if method == "fngd" else {}
    return create_preconditioned_optimizer(model, method=method, lr=1e-2, **own | settings)


@pytest.mark.feature("Copies and pickles of an optimizer", "refused", "load its `state_dict`")
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, copy.copy])
@pytest.mark.parametrize("method", METHODS)
def test_copies_are_refused(method, copied):
    optimizer = make(network(), method)
    with pytest.raises(FNGDError, match="load this one's state_dict"):
        copied(optimizer)


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.w = nn.Linear(1, 4), nn.Parameter(torch.randn(4, 5, dtype=torch.cfloat))

    def forward(self, x):
        mixed = torch.einsum("nfc,cf->nfc", torch.fft.rfft(self.up(x), dim=1), self.w)
        return torch.fft.irfft(mixed, n=8, dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_complex_parameters_follow_torchs_adamw(method):
    net = Spectral()
    twin = copy.deepcopy(net)
    optimizer = make(net, method)
    adamw = torch.optim.AdamW([twin.w], lr=1e-2, weight_decay=0.0)
    x = torch.randn(3, 8, 1)
    optimizer.set_batch(range(3))
    for model, one in ((net, optimizer), (twin, adamw)):
        model(x).square().mean().backward()
        one.step()
    torch.testing.assert_close(net.w, twin.w)


@pytest.mark.feature("Sparse gradients", "refused")
@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_are_refused(method):
    net = nn.Sequential(nn.EmbeddingBag(20, 6, sparse=True), nn.Linear(6, 3))
    optimizer = make(net, method)
    optimizer.set_batch(range(4))
    net(torch.randint(0, 20, (4, 3))).sum().backward()
    with pytest.raises(FNGDError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_no_rows_changes_nothing(method):
    net = network()
    before = copy.deepcopy(net.state_dict())
    optimizer = make(net, method)
    optimizer.set_batch([])
    net(torch.randn(0, 6)).sum().backward()
    optimizer.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_default_dtype_does_not_matter():
    start = network().to(torch.bfloat16)
    inputs = torch.randn(8, 6).to(torch.bfloat16)

    def train():
        net = copy.deepcopy(start)
        optimizer = create_fngd_optimizer(net, lr=1e-2)
        optimizer.bind_dataset(8)
        for epoch in range(2):
            optimizer.start_epoch(epoch)
            for ids in (range(4), range(4, 8)):
                optimizer.set_batch(ids)
                net(inputs[list(ids)]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return optimizer.coefficients()

    expected = train()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = train()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ids", [torch.arange(4).unsqueeze(1), torch.tensor(3)], ids=["N1", "0d"])
@pytest.mark.parametrize("share", ["sample", "layer", "none"])
def test_ids_with_one_dimension_too_many_or_too_few(ids, share):
    net = network()
    optimizer = create_fngd_optimizer(net, lr=1e-2, share=share)
    optimizer.set_batch(ids)
    net(torch.randn(ids.numel(), 6)).sum().backward()
    optimizer.step()
    assert optimizer.statistics()["layers"] == 2.0


@pytest.mark.parametrize("ids", [torch.zeros(4, 2).long(), [[1, 2], [3, 4]], torch.zeros(2, 3)])
def test_tables_of_ids_are_refused(ids):
    optimizer = create_fngd_optimizer(network(), lr=1e-2)
    with pytest.raises(FNGDError, match="sample_ids must"):
        optimizer.set_batch(ids)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_without_a_batch_gets_the_plain_gradient(method):
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    twin = copy.deepcopy(net)
    optimizer = make(net, method, momentum=0.0)
    x = torch.randn(3, 8, 8)
    for model in (net, twin):
        model(x).sum().backward()
    assert torch.equal(net[0].weight.grad, twin[0].weight.grad)
    optimizer.step()


@pytest.mark.parametrize("method", ["fngd", "plain"])
def test_a_weight_out_of_use_stands_still(method):
    net = network()
    optimizer = make(net, method, update_scale="rms")

    def step(factor):
        optimizer.set_batch(range(4))
        (factor * net(torch.randn(4, 6)).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for _ in range(3):
        step(1.0)
    before = net[0].weight.detach().clone()
    for _ in range(20):
        step(0.0)
    assert torch.equal(net[0].weight, before)
    step(1.0)
    moved = (net[0].weight - before).square().mean().sqrt()
    torch.testing.assert_close(moved, torch.tensor(0.2 * 1e-2), rtol=1e-4, atol=0)

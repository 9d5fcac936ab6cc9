"""`torch.set_default_device`: what belongs on the CPU stays there, so that training is the same."""

import pytest
import torch
from torch import nn

from hf_fngd import create_preconditioned_optimizer
from tests.helpers import assert_same

SETTINGS = {
    "fngd, sample": {"method": "fngd"},
    "fngd, in a file": {"method": "fngd"},
    "fngd, layer": {"method": "fngd", "share": "layer"},
    "fngd, none": {"method": "fngd", "share": "none"},
    "kfac": {"method": "kfac", "inverse_period": 2},
    "ekfac": {"method": "ekfac", "inverse_period": 2},
    "kfac, sampled": {"method": "kfac", "fisher_labels": "sampled"},
    "eva": {"method": "eva"},
    "tengrad": {"method": "tengrad", "update_period": 2},
    "seng": {"method": "seng", "update_period": 2, "sketch_size": 4},
    "seng, big": {"method": "seng", "sketch_size": 4, "big_layer_size": 50},
    "plain": {"method": "plain", "update_rule": "adamw"},
}


@pytest.fixture(autouse=True)
def cpu_again():
    yield
    torch.set_default_device(None)


def train(device, **settings):
    """Three epochs on a CPU, with a save between them; the default device is another one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    inputs, labels = torch.randn(24, 8), torch.randint(3, (24,))
    batches = torch.randperm(24).split(8)
    torch.set_default_device(device)
    optimizer = create_preconditioned_optimizer(model, lr=0.05, **settings)
    for epoch in range(3):
        optimizer.start_epoch(epoch)
        for rows in batches:
            optimizer.set_batch(rows.tolist())
            nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.statistics()
    torch.set_default_device(None)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_another_default_device_changes_nothing(name, tmp_path):
    settings = dict(SETTINGS[name])
    if name.endswith("file"):
        settings["store_dir"] = str(tmp_path)
    # A tensor that is made on "meta" by mistake has no content.
    assert_same(train("meta", **settings), train(None, **settings))

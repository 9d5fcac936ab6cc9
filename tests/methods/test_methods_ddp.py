"""Two processes: every method agrees with one process, averaged where its paper says so."""

import faulthandler
import gc
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_fngd import create_preconditioned_optimizer
from hf_fngd.methods import preconditioned
from tests.hf.test_ddp import LAUNCHERS, both, on_two_ranks
from tests.hf.test_methods_trainer import SETTINGS as LEARNING
from tests.hf.test_runner import BATCHES, SCRIPT, run
from tests.hf.test_runner import SETTINGS as SCRIPT_SETTINGS

SETTINGS = {
    "kfac": {"kfac_solver": "inverse", "inverse_period": 1},
    "kfac-eigen-reduce": {"kfac_approx": "reduce"},
    "ekfac": {"inverse_period": 1},
    "ekfac-some": {"stat_samples": 2, "inverse_period": 1},
    "ekfac-batch": {"second_moments": "batch"},
    "ekfac-samples": {"second_moments": "samples", "curvature_power": 0.5},
    "eva": {},
    "tengrad": {"fisher_labels": "empirical"},
    "seng": {"sketch_size": 0},
    "seng-outer": {"sketch_size": 0, "big_layer_size": 10, "big_rank": 2},
}


def build():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    data = torch.randn(12, 2, 6, 6, dtype=torch.float64), torch.arange(12) % 3
    return model, *data


def make(name, model):
    method = name.partition("-")[0]
    return create_preconditioned_optimizer(
        model, method=method, lr=0.0, kl_clip=None, damping=0.3, **SETTINGS[name]
    )


def directions(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def main(folder):
    """Run one of the two ranks; a rank that hangs says where and ends both.

    Nothing may outlive the process group: the last owner of one ends its threads, and where that
    is DDP's reducer it holds the interpreter's lock meanwhile, which those threads may wait for.
    """
    faulthandler.dump_traceback_later(120, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    found = {name: directions_of_half(name, slice(6 * rank, 6 * rank + 6)) for name in SETTINGS}
    torch.save(found, f"{folder}/directions{rank}.pt")
    gc.collect()
    dist.destroy_process_group()


def directions_of_half(name, half):
    model, inputs, classes = build()
    optimizer = make(name, model)
    parallel = DistributedDataParallel(model)
    nn.functional.cross_entropy(parallel(inputs[half]), classes[half]).backward()
    optimizer.step()
    return directions(model)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks(
        "tests.methods.test_methods_ddp", tmp_path_factory.mktemp("two_ranks"), "directions"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_directions_of_two_ranks(name, two_ranks):
    found = [of_rank[name] for of_rank in two_ranks]
    assert all(torch.equal(value, found[1][n]) for n, value in found[0].items())
    for key, expected in reference(name).items():
        torch.testing.assert_close(found[0][key], expected, rtol=1e-9, atol=1e-12)


def reference(name):
    """Take two micro-batches in one process, or for block methods the mean of the halves' parts."""
    halves = (slice(0, 6), slice(6, 12))
    if name.startswith(("kfac", "ekfac", "eva")):
        model, inputs, classes = build()
        optimizer = make(name, model)
        optimizer.set_loss_scale(2)
        for half in halves:
            loss = nn.functional.cross_entropy(model(inputs[half]), classes[half]) / 2
            loss.backward()
        optimizer.step()
        return directions(model)
    model, inputs, classes = build()
    nn.functional.cross_entropy(model(inputs), classes).backward()
    total = directions(model)
    parts = []
    for half in halves:
        model, inputs, classes = build()
        optimizer = make(name, model)
        nn.functional.cross_entropy(model(inputs[half]), classes[half]).backward()
        optimizer.step()
        for key, parameter in model.named_parameters():
            parameter.grad = total[key].clone()
        blocks = [layer.join(module, lambda p: p.grad) for module, layer in optimizer.captured]
        pairs = zip(optimizer.layers, blocks, strict=True)
        parts.append([layer.local_parts(m) for layer, m in pairs])
    for (module, layer), m, *mine in zip(optimizer.captured, blocks, *parts, strict=True):
        v, _ = layer.combine(m, [(one + other) / 2 for one, other in zip(*mine, strict=True)])
        preconditioned._write(module, layer, v)
    return directions(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kfac", "tengrad", "muon_soap"])
def test_ranks_agree_in_a_stock_script(name, tmp_path):
    out = run(
        SCRIPT,
        "--output_dir",
        str(tmp_path),
        "--optim",
        name,
        "--optim_args",
        LEARNING[name],
        *SCRIPT_SETTINGS,
        *BATCHES[:2],
        "--gradient_accumulation_steps",
        "2",
        launcher=(*LAUNCHERS["torchrun"], "-m", "hf_fngd"),
    )
    assert out.returncode == 0, out.stderr
    first, second = both(tmp_path, "weights")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert all(value.isfinite().all() for value in first.values())


if __name__ == "__main__":
    main(sys.argv[1])

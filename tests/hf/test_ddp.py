"""Two processes: the same weights and the same coefficients on both, and exact resume."""

import json
import shutil

import pytest
import torch

from tests.hf.test_runner import BATCHES, SCRIPT, SETTINGS, run

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
}


def launch(folder, *options, epochs=2):
    return run(
        SCRIPT,
        "--output_dir",
        str(folder),
        "--optim",
        "fngd",
        *SETTINGS,
        *BATCHES[:2],
        "--num_train_epochs",
        str(epochs),
        *options,
        launcher=(*LAUNCHERS["torchrun"], "-m", "hf_fngd"),
    )


def on_two_ranks(module, folder, name):
    """Run a test module as a script on two ranks; return what each saved under a name."""
    out = run(module, str(folder), launcher=(*LAUNCHERS["torchrun"], "-m"))
    assert out.returncode == 0, out.stderr
    return both(folder, name)


def both(folder, name):
    return [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.feature(
    "DDP, two processes, accumulation (`no_sync`)", "works", "coefficients per rank"
)
@pytest.mark.slow
@pytest.mark.parametrize("share", ["sample", "layer"])
def test_ranks_agree(share, tmp_path):
    settings = f"update_scale=rms,share={share}"
    out = launch(tmp_path, "--optim_args", settings, "--gradient_accumulation_steps", "2")
    assert out.returncode == 0, out.stderr
    first, second = both(tmp_path, "weights")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    stores = both(tmp_path, "store")
    if share == "sample":
        # 30 rows over 2 ranks of 4: the sampler repeats two rows, and still each has one entry.
        tables = [dict(zip(s["ids"].tolist(), s["table"], strict=True)) for s in stores]
        assert len(tables[0]) == 30 and tables[0].keys() == tables[1].keys()
        assert all(torch.equal(row, tables[1][i]) for i, row in tables[0].items())
    else:
        assert torch.equal(stores[0]["total"], stores[1]["total"])
        assert stores[0]["total"].sum() > 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [e["fngd/reuse_rate"] for e in history if "fngd/reuse_rate" in e]
    assert rates == ([1.0] * len(rates) if share == "sample" else [])
    assert (share == "sample") == bool(rates)


@pytest.mark.slow
def test_resume_with_two_processes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--optim_args", "update_scale=rms", "--save_steps", "2", "--seed", "3"]
    # 4 steps an epoch: step 2 lies within the first
    assert launch(whole, *options, epochs=3).returncode == 0
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    resume = ["--resume_from_checkpoint", str(cut / "checkpoint-2")]
    out = launch(cut, *options, *resume, epochs=3)
    assert out.returncode == 0, out.stderr
    expected, found = both(whole, "weights"), both(cut, "weights")
    for rank in (0, 1):
        assert all(torch.equal(v, found[rank][name]) for name, v in expected[rank].items())


@pytest.mark.feature("Resume with another number of processes", "works")
@pytest.mark.slow
def test_one_process_resumes_what_two_began(tmp_path):
    options = ["--optim_args", "update_scale=rms", "--save_steps", "4", "--seed", "3"]
    assert launch(tmp_path, *options, epochs=1).returncode == 0
    checkpoint = tmp_path / "checkpoint-4"
    resume = ["--resume_from_checkpoint", str(checkpoint), "--num_train_epochs", "3"]
    out = in_one(tmp_path, *options, *resume)
    assert out.returncode == 0, out.stderr
    check_reuse_after_the_first_epoch(tmp_path)


@pytest.mark.slow
def test_two_processes_resume_what_one_began(tmp_path):
    options = ["--optim_args", "update_scale=rms", "--save_steps", "4", "--seed", "3"]
    assert in_one(tmp_path, *options, "--num_train_epochs", "1").returncode == 0
    resume = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-4")]
    out = launch(tmp_path, *options, *resume, epochs=3)
    assert out.returncode == 0, out.stderr
    check_reuse_after_the_first_epoch(tmp_path)
    first, second = both(tmp_path, "weights")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def in_one(folder, *options):
    """Run one process with as large a batch as two have, so that epochs are equally long."""
    batch = ["--per_device_train_batch_size", "8"]
    return run(SCRIPT, "--output_dir", str(folder), "--optim", "fngd", *SETTINGS, *batch, *options)


def check_reuse_after_the_first_epoch(tmp_path):
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    later = [e for e in history if e.get("step", 0) > 4 and "fngd/reuse_rate" in e]
    assert later and all(e["fngd/reuse_rate"] == 1.0 and e["fngd/reusing"] == 1.0 for e in later)


@pytest.mark.feature("`accelerate launch`", "works")
@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    out = run(
        SCRIPT,
        "--output_dir",
        str(tmp_path),
        "--optim",
        "fngd_muon",
        *SETTINGS,
        *BATCHES,
        launcher=(*LAUNCHERS["accelerate"], "-m", "hf_fngd"),
    )
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "done0.json").exists()

"""FSDP2 in the Trainer on one GPU: sharded weights, the steps of whole ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_fngd import FNGDTrainer
from tests.capture.test_packing import pad_rows
from tests.cuda.common import CUDA, only_on_gpu, texts
from tests.helpers import tiny_llama
from tests.hf_utils import arguments, weights

pytestmark = [*CUDA, only_on_gpu]
NAMES = ("fngd", "fngd_adamw", "fngd_muon", "plain")


def train(optim: str, folder: Path, **changes):
    args = arguments(
        folder,
        optim=optim,
        optim_args="update_scale=rms" if optim == "plain" else None,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=False,
        **changes,
    )
    # Accelerate cannot shard tied weights.
    trainer = FNGDTrainer(
        model=tiny_llama(), args=args, train_dataset=texts(), data_collator=pad_rows
    )
    trainer.train()
    return trainer


def main(folder: str) -> None:
    found = {}
    for optim in NAMES:
        try:
            options = {
                "fsdp": True,
                "fsdp_config": {
                    "version": 2,
                    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                },
            }
            trainer = train(optim, Path(folder), **options)
            parameters = dict(trainer.model.named_parameters())
            sharded = sum(isinstance(p, DTensor) for p in parameters.values())
            found[optim] = {
                "type": trainer.accelerator.distributed_type.value,
                "sharded": sharded / len(parameters),
                "reuse_rate": trainer.state.log_history[-2].get("fngd/reuse_rate"),
            }
            whole = {
                name.replace("_orig_mod.", ""): (p.full_tensor() if isinstance(p, DTensor) else p)
                .detach()
                .cpu()
                for name, p in parameters.items()
            }
            torch.save(whole, f"{folder}/{optim}.pt")
        except Exception as error:  # told by the test of this name
            found[optim] = {"error": f"{type(error).__name__}: {error}"}
    Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Run this module as the only rank of a job."""
    folder = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NCCL_SOCKET_IFNAME": "lo"}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    out = subprocess.run(
        [sys.executable, "-m", "tests.cuda.test_fsdp", str(folder)],
        env={**os.environ, **place, **ranks},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("optim", NAMES)
def test_sharded_weights_follow_whole_ones(optim, one_rank, tmp_path):
    folder, found = one_rank
    assert "error" not in found[optim], found[optim]["error"]
    assert found[optim]["type"] == "FSDP" and found[optim]["sharded"] == 1.0
    expected = train(optim, tmp_path)
    if optim != "plain":
        assert found[optim]["reuse_rate"] == 1.0
    sharded = torch.load(folder / f"{optim}.pt", weights_only=True)
    start = weights(tiny_llama())
    whole = weights(expected.model)
    # Muon orthogonalises in bfloat16, where the order of a sum shows.
    bound = 0.2 if optim == "fngd_muon" else 1e-2
    flat = [
        torch.cat([(one[name].cpu() - start[name]).flatten() for name in start])
        for one in (sharded, whole)
    ]
    assert (flat[0] - flat[1]).norm() <= bound * flat[1].norm()


if __name__ == "__main__":
    main(sys.argv[1])

"""FSDP2 in the Trainer on one GPU: sharded weights, the steps of whole ones."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from hf_fngd import FNGDTrainer
from tests.capture.test_packing import pad_rows
from tests.cuda.common import CUDA, only_on_gpu, relative_error, texts
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
        except Exception:  # told by the test
            found[optim] = {"error": traceback.format_exc()[-2000:]}
    Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def on_one_rank(folder: Path) -> dict[str, dict]:
    """Run this module as the only rank of a job."""
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
        check=False,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.on_gpu("FSDP2")
def test_sharded_weights_follow_whole_ones(tmp_path):
    found = on_one_rank(tmp_path)
    start = weights(tiny_llama())
    problems = []
    for optim, facts in found.items():
        if "error" in facts:
            problems.append(f"{optim}: {facts['error']}")
            continue
        reused = 1.0 if "fngd" in optim else None
        if facts != {"type": "FSDP", "sharded": 1.0, "reuse_rate": reused}:
            problems.append(f"{optim}: {facts}")
        sharded = torch.load(tmp_path / f"{optim}.pt", weights_only=True)
        error = relative_error(sharded, weights(train(optim, tmp_path).model), start)
        # Muon orthogonalises in bfloat16, where the order of a sum shows.
        if not error <= (0.2 if "muon" in optim else 1e-2):
            problems.append(f"{optim}: relative error {error:.1e}")
    assert found.keys() == set(NAMES) and not problems, "\n".join(problems)


if __name__ == "__main__":
    main(sys.argv[1])

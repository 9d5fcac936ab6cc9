"""A step of a later epoch reads nothing back; `tests/cuda/test_no_waiting.py` asks a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hf_fngd import FNGD, create_fngd_optimizer
from hf_fngd.rules import RULES
from tests.helpers import tiny_marian

# Each of these waits where its input lies on a GPU.
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd rms": {"update_scale": "rms"},
    "muon": {"update_rule": "muon"},
    "layer": {"share": "layer"},
}
ROWS = 4


def batch(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(0)
    source, labels = torch.randint(1, model.config.vocab_size - 1, (2, ROWS, 5))
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}


def reads(function: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    return sum(event.name in READS for event in trace.events())


def make(settings: dict[str, Any]) -> tuple[nn.Module, FNGD]:
    model = tiny_marian()
    optimizer = create_fngd_optimizer(model, lr=1e-3, **settings)
    optimizer.bind_dataset(ROWS)
    return model, optimizer


def loss(model: nn.Module, optimizer: FNGD, inputs: dict[str, Tensor]) -> Tensor:
    optimizer.set_batch(range(ROWS))
    return model(**inputs).loss


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_is_read_back(settings: dict[str, Any]) -> None:
    model, optimizer = make(settings)
    inputs = batch(model)
    plain = tiny_marian()
    plain_loss = plain(**inputs).loss
    first = loss(model, optimizer, inputs)
    in_first_epoch = reads(first.backward)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.start_epoch(1)
    later = loss(model, optimizer, inputs)
    assert reads(later.backward) == reads(plain_loss.backward) < in_first_epoch
    # The step counters of AdamW, which updates the parameters that are not selected, are on the
    # CPU everywhere; without them nothing is left.
    for group in optimizer.param_groups:
        if group["rule"] == "adamw":
            for parameter in group["params"]:
                parameter.grad = None
    assert reads(optimizer.step) == 0


def test_soap_reads_nothing_back_while_its_basis_stays() -> None:
    torch.manual_seed(0)
    param = torch.randn(12, 4)
    group = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    state: dict[str, Any] = {}
    step = lambda: RULES["soap"]([param], [torch.randn(12, 4)], [state], group)
    assert reads(step) > 0
    # AdamW's counter of steps, which is on the GPU there.
    assert [reads(step) for _ in range(9)] == [1] * 9

"""One step in the Trainer is the same however its loss was divided or scaled, and as in a loop."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_fngd import FNGDMixin
from hf_fngd.methods import METHODS
from tests.test_loss_scale import PARTS, WAYS, by_hand, close, problem  # noqa: F401


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x=None, labels=None):
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Mixed(FNGDMixin, Trainer):
    pass


@pytest.mark.parametrize("problem", [torch.float64], indirect=True)
@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
# The mixin only with micro-batches and a scaler together.
@pytest.mark.parametrize(
    ("cls", "parts", "scale"), [*((Trainer, *way) for way in WAYS), (Mixed, *WAYS[-1])]
)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "plain"])
def test_a_trainer_tells_the_scale(problem, method, cls, parts, scale, damping_mode, tmp_path):  # noqa: F811
    start, x, y = problem
    if method == "fngd":
        settings = {"share": "none"}
    else:
        settings = {"fisher_labels": "empirical", "kl_clip": 1e-3}
    settings |= {"damping": 1e-2, "damping_mode": damping_mode}
    base = parts if damping_mode == "relative" else 1
    wanted = by_hand(start, x, y, method, base, 1.0, True, **settings)
    net = copy.deepcopy(start)
    own = {**settings, "momentum": 0.0, "update_scale": "none"}
    trainer = cls(
        model=Net(net),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            optim=method,
            optim_args=",".join(f"{name}={value}" for name, value in own.items()),
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_steps=2,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=len(x) // parts,
            gradient_accumulation_steps=parts,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"x": x[i], "labels": int(y[i])} for i in range(len(x))],
    )
    if scale != 1.0:
        # accelerate makes a scaler on a GPU only.
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.train()
    pairs = zip(net.parameters(), start.parameters(), strict=True)
    close(torch.cat([(p - q).flatten() for p, q in pairs]).to(wanted), wanted)

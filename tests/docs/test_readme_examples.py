"""Examples of the pages run and do what they say."""

import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

import hf_fngd
from hf_fngd.hf.callback import unwrap_optimizer
from tests import helpers
from tests.hf_utils import arguments, pad_collator, tiny_marian, token_pairs
from tests.pages import PAGES


def of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    return {
        "model": tiny_marian(),
        "args": args,
        "train_dataset": token_pairs(30),
        "collator": pad_collator,
    }


def of_the_plain_loop(tmp_path, monkeypatch):
    return {}


def of_accelerate(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    inputs = torch.randn(64, 8)
    targets = inputs.sum(1, keepdim=True)
    data = torch.utils.data.TensorDataset(torch.arange(64), inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    known = {"create_fngd_optimizer": hf_fngd.create_fngd_optimizer, "torch": torch}
    # Its state is that of the process: other tests must find their own.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(PartialState, "_shared_state", {})
    return {**known, "model": model, "loader": loader, "accelerator": Accelerator(cpu=True)} | {
        "all": (inputs, targets)
    }


def of_peft(tmp_path, monkeypatch):
    texts = token_pairs(30).remove_columns("labels")
    texts = texts.map(lambda row: {"input_ids": [i % 24 for i in row["input_ids"]]})
    texts = texts.map(lambda row: {"labels": row["input_ids"]})

    def collator(rows):
        batch = pad_collator(rows)
        return {**batch, "input_ids": batch["input_ids"] * batch["attention_mask"]}

    known = {"FNGDTrainer": hf_fngd.FNGDTrainer, "FNGDConfig": hf_fngd.FNGDConfig}
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    args.label_names = ["labels"]
    model = helpers.tiny_llama()
    return {**known, "model": model, "args": args, "train_dataset": texts, "collator": collator}


@torch.no_grad()
def error(scope):
    inputs, targets = scope.get("all") or (scope["inputs"], scope["targets"])
    return (scope["model"](inputs) - targets).square().mean() / targets.square().mean()


def reused(scope):
    history = scope["trainer"].state.log_history
    return {entry["fngd/reuse_rate"] for entry in history if "fngd/reuse_rate" in entry}


# A line of every python block of the pages, what it is run with, and what holds afterwards.
EXAMPLES = {
    'optim="muon_soap"': (
        of_the_trainer,
        lambda scope: (
            scope["trainer"].state.log_history[-1]["step"] > 0
            and unwrap_optimizer(scope["trainer"].optimizer).series == "muon"
        ),
    ),
    "trainer = FNGDSeq2SeqTrainer(": (of_the_trainer, lambda scope: reused(scope) == {1.0}),
    "for rows in torch.randperm(64)": (of_the_plain_loop, lambda scope: error(scope) < 0.8),
    "accelerator.backward(": (
        of_accelerate,
        lambda scope: error(scope) < 0.8 and scope["fngd"].coefficients().isfinite().all(),
    ),
    "get_peft_model(": (
        of_peft,
        lambda scope: (
            reused(scope) == {1.0}
            and all(
                ".lora_" in p for p in unwrap_optimizer(scope["trainer"].optimizer).selection.chosen
            )
        ),
    ),
}
BLOCKS = re.findall(r"```python\n(.*?)```", "".join(PAGES.values()), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft's own
@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[0][:40])
def test_every_example_runs_and_does_what_it_says(code, tmp_path, monkeypatch):
    ((prepare, holds),) = [found for line, found in EXAMPLES.items() if line in code]
    scope = prepare(tmp_path, monkeypatch)
    exec(compile(code, "README.md", "exec"), scope)
    assert holds(scope)

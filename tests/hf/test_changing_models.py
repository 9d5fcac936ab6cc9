"""What changes on a model while a Trainer trains it is noticed at the next step, or refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_fngd import FNGDError, FNGDTrainer
from tests.helpers import tiny_llama
from tests.hf.test_any_trainer import options

# PEFT still asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
IDS = torch.randint(3, 24, (12, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]
STEPS, EPOCHS = 3, 3
KINDS = pytest.mark.parametrize("kind", [Trainer, FNGDTrainer])


class At(TrainerCallback):
    """Change the model after so many steps; keep its parameters before every step."""

    def __init__(self, changes):
        self.changes, self.seen = changes, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.changes.get(state.global_step, lambda _: None)(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.changes.get("begin", lambda _: None)(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.seen.append((values, {n for n, p in model.named_parameters() if p.requires_grad}))


def train(kind, folder, model, changes, **settings):
    callback = At(changes)
    args = options(folder, num_train_epochs=EPOCHS, **settings)
    trainer = kind(model=model, args=args, train_dataset=ROWS, callbacks=[callback])
    trainer.train()
    return trainer, callback.seen


def lora(**settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **settings)
    return get_peft_model(tiny_llama(), config)


def layers(trainer):
    return [e["fngd/layers"] for e in trainer.state.log_history if "fngd/layers" in e]


def freeze(part):
    return lambda model: model.get_submodule(part).requires_grad_(False)


def thaw(part):
    return lambda model: model.get_submodule(part).requires_grad_(True)


MLP, ATTENTION = "model.layers.0.mlp", "model.layers.0.self_attn"


@KINDS
@pytest.mark.parametrize("share", ["sample", "layer", "none"])
@pytest.mark.parametrize(
    "schedule",
    [
        {"begin": freeze(MLP), 3: thaw(MLP)},
        {"begin": freeze(MLP), 4: thaw(MLP)},
        {"begin": freeze(ATTENTION), 2: thaw(ATTENTION), 6: freeze(MLP)},
        {1: freeze(MLP), 4: thaw(MLP), 5: freeze(ATTENTION), 7: thaw(ATTENTION)},
    ],
    ids=["thawed at an epoch", "within one", "one after the other", "frozen and thawed"],
)
def test_layers_are_frozen_and_thawed(schedule, share, kind, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer, seen = train(kind, tmp_path, tiny_llama(), schedule, optim_args=f"share={share}")
    final = {name: p.detach() for name, p in trainer.model.named_parameters()}
    for (before, trained), (after, _) in zip(seen, [*seen[1:], (final, None)], strict=True):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == trained
    assert set(layers(trainer)) == {7}
    if share != "none":
        optimizer = trainer.optimizer.optimizer
        assert optimizer.coefficients().isfinite().any(0).all(), "a thawed layer has coefficients"
    assert len([r for r in caplog.records if r.name.startswith("hf_fngd")]) == 1


@KINDS
@pytest.mark.parametrize(("further", "count"), [({}, 4), ({"modules_to_save": ["o_proj"]}, 5)])
def test_adapters_train_and_their_base_does_not(further, count, kind, tmp_path):
    trainer, seen = train(kind, tmp_path, lora(**further), {})
    (first, trained), last = seen[0], dict(trainer.model.named_parameters())
    assert {n for n in first if not torch.equal(first[n], last[n])} == trained
    assert len(trained) == count and set(layers(trainer)) == {count}
    merged = trainer.model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def replace(model):
    model.model.layers[0].mlp.up_proj = nn.Linear(8, 12, bias=False)


def add_bias(model):
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.zeros(12))


def wrap(model):
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))


def frozen_at_first():
    model = tiny_llama()
    freeze(MLP)(model)
    return model


@KINDS
@pytest.mark.parametrize(
    ("make", "change", "name"),
    [
        (tiny_llama, replace, "mlp.up_proj.weight"),
        (tiny_llama, add_bias, "mlp.up_proj.bias"),
        (tiny_llama, wrap, "q_proj.lora_A"),
        (frozen_at_first, thaw(MLP), "mlp.gate_proj.weight"),
    ],
    ids=["replaced", "bias added", "wrapped by PEFT", "frozen when the optimizer was made"],
)
def test_parameters_that_the_optimizer_does_not_have_are_named(
    make, change, name, kind, tmp_path, caplog
):
    caplog.set_level("WARNING")
    trainer, _ = train(kind, tmp_path, make(), {4: change})
    assert trainer.state.global_step == STEPS * EPOCHS
    _, warning = [r.getMessage() for r in caplog.records if r.name.startswith("hf_fngd")]
    assert "that the optimizer does not have" in warning and name in warning


@pytest.mark.feature(
    "Layers replaced, thawed or wrapped by PEFT while a Trainer trains", "works", "with a warning"
)
@KINDS
def test_an_unloaded_adapter_is_refused(kind, tmp_path):
    with pytest.raises(FNGDError, match="no parameter of the model trains any more"):
        train(kind, tmp_path, lora(), {4: lambda model: model.merge_and_unload()})

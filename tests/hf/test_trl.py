"""Trainers of trl, as they are with `--optim fngd` and with the mixin."""

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_fngd import FNGDError, FNGDMixin
from tests.helpers import assert_same, tiny_llama
from tests.hf_utils import tiny_texts, tiny_tokenizer, weights

# trl still sets it under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
ROWS = 12
TEXTS = datasets.Dataset.from_dict({"text": tiny_texts(ROWS, 3, 7)})
ASKED, CHOSEN, REJECTED = (tiny_texts(ROWS, low, low + 1, seed=low) for low in (2, 4, 3))


def said(role, text):
    return [{"role": role, "content": text}]


PAIRS = datasets.Dataset.from_list(
    [
        {
            "prompt": said("user", asked),
            "chosen": said("assistant", chosen),
            "rejected": said("assistant", rejected),
        }
        for asked, chosen, rejected in zip(ASKED, CHOSEN, REJECTED, strict=True)
    ]
)
RANKED = PAIRS.map(
    lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
).remove_columns("prompt")
PROMPTS = datasets.Dataset.from_dict({"prompt": ASKED[:4]})


def tiny_reward_model():
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"num_labels": 1})
    return LlamaForSequenceClassification(config)


def different_letters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


# Trainer, its config, model, data, further arguments, selected layers and samples of an epoch.
CASES = {
    "sft": (SFTTrainer, SFTConfig, tiny_llama, TEXTS, {}, 7, ROWS),
    "sft-packing": (SFTTrainer, SFTConfig, tiny_llama, TEXTS, {"packing": True}, 7, ROWS),
    "dpo": (DPOTrainer, DPOConfig, tiny_llama, PAIRS, {}, 7, 2 * ROWS),
    "reward": (RewardTrainer, RewardConfig, tiny_reward_model, RANKED, {}, 8, 2 * ROWS),
}
GENERATION = {"num_generations": 4, "max_completion_length": 4}
GRPO = (GRPOTrainer, GRPOConfig, tiny_llama, PROMPTS, GENERATION, 7, None)


def train(folder, case, mixed, optim="fngd", optim_args=None, **changes):
    kind, config, model, data, further, *_ = GRPO if case == "grpo" else CASES[case]
    if mixed:
        kind = type(kind.__name__, (FNGDMixin, kind), {})
    settings = {
        "output_dir": str(folder),
        "max_length": 16,
        "optim": optim,
        "optim_args": optim_args,
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    if case == "grpo":
        del settings["max_length"]
    args = config(**settings | further | changes)
    reward = {"reward_funcs": different_letters} if case == "grpo" else {}
    reference = {"ref_model": tiny_llama()} if case == "dpo" else {}
    trainer = kind(
        model=model(),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        **reward,
        **reference,
    )
    trainer.train()
    return trainer


def series(trainer, name):
    return [entry[f"fngd/{name}"] for entry in trainer.state.log_history if f"fngd/{name}" in entry]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("hf_fngd")]


@pytest.mark.feature("trl: SFT (packed too), DPO, Reward", "works", "stock or with `FNGDMixin`")
@pytest.mark.parametrize("mixed", [False, True], ids=["stock", "mixin"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_weighted_and_every_sample_found_again(case, mixed, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = train(tmp_path, case, mixed)
    *_, layers, samples = CASES[case]
    optimizer = trainer.optimizer.optimizer
    assert set(series(trainer, "layers")) == {layers} and set(
        series(trainer, "layers_dropped")
    ) == {0}
    assert set(series(trainer, "reuse_rate")) == {1.0}
    assert optimizer.coefficients().shape == (samples, layers)
    assert optimizer.coefficients().isfinite().all()
    assert (optimizer.store.rows is None) == (mixed and case == "sft"), "row numbers or hashes"
    (only,) = warnings_of(caplog)
    assert f"{layers} layers selected" in only


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_large_damping_is_the_plain_rule(case, tmp_path):
    plain = "update_rule=sgd,update_scale=rms"
    expected = weights(train(tmp_path, case, False, optim="plain", optim_args=plain).model)
    for mixed in (False, True):
        found = weights(train(tmp_path, case, mixed, optim_args="damping=1e9").model)
        assert_same(found, expected, rtol=1e-4, atol=1e-6)
    natural = weights(train(tmp_path, case, True, optim_args="damping=0.1").model)
    assert any((natural[name] - value).abs().max() > 1e-4 for name, value in expected.items())


@pytest.mark.feature("trl: GRPO", "works", "`share=none` or `share=layer`: all rows are new")
@pytest.mark.parametrize("mixed", [False, True], ids=["stock", "mixin"])
@pytest.mark.parametrize("share", ["none", "layer", "sample"])
def test_generated_rows_are_weighted_and_never_found_again(share, mixed, tmp_path, caplog):
    caplog.set_level("WARNING")
    trainer = train(tmp_path, "grpo", mixed, optim_args=f"share={share}")
    assert set(series(trainer, "layers")) == {7} and set(series(trainer, "layers_dropped")) == {0}
    assert min(series(trainer, "gamma_min")) < 0.9 and trainer.state.global_step == 8
    first, *others = warnings_of(caplog)
    assert "layers selected" in first
    if share != "sample":
        assert not others
        return
    assert max(series(trainer, "reuse_rate")) < 0.5
    (advice,) = others
    assert "generat" in advice and "share=" in advice


@pytest.mark.parametrize("mixed", [False, True], ids=["stock", "mixin"])
def test_a_method_that_cannot_tell_packed_samples_apart_says_so(mixed, tmp_path):
    with pytest.raises(FNGDError, match="KFAC cannot tell apart: turn packing or padding_free off"):
        train(tmp_path, "sft-packing", mixed, "kfac", per_device_train_batch_size=1)


@pytest.mark.parametrize("mixed", [False, True], ids=["stock", "mixin"])
def test_labels_of_generated_rows_cannot_be_drawn(mixed, tmp_path):
    with pytest.raises(FNGDError, match="set fisher_labels=empirical"):
        train(tmp_path, "grpo", mixed, "tengrad")
    trainer = train(tmp_path, "grpo", mixed, "tengrad", "fisher_labels=empirical")
    assert trainer.state.global_step == 8

"""FNGD runs in `FNGDTrainer` and, by name, in a stock Trainer; both find every sample again."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_fngd import (
    FNGD,
    FNGDConfig,
    FNGDError,
    FNGDMixin,
    FNGDSeq2SeqTrainer,
    FNGDTrainer,
)
from hf_fngd.hf.callback import unwrap_optimizer
from tests.hf_utils import (
    arguments,
    make_trainer,
    pad_collator,
    same,
    tiny_marian,
    token_pairs,
    weights,
)

# Renamed late in transformers 5.
NEW_NAME = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation" if NEW_NAME else "gradient"
BOTH = pytest.mark.parametrize("cls", [FNGDSeq2SeqTrainer, Seq2SeqTrainer], ids=["ours", "stock"])
SETTINGS = [
    "share=sample",
    "share=layer",
    "share=none",
]


@BOTH
@pytest.mark.parametrize("settings", SETTINGS)
def test_three_epochs_lower_the_loss(cls, settings, tmp_path):
    args = arguments(
        tmp_path,
        optim_args=f"update_scale=rms,{settings}",
        learning_rate=2e-2,
        num_train_epochs=6,
        lr_scheduler_type="constant",
    )
    trainer = make_trainer(cls, args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])


@BOTH
def test_every_row_finds_its_coefficients_again(cls, tmp_path):
    trainer = make_trainer(cls, arguments(tmp_path))
    trainer.train()
    rates = [e["fngd/reuse_rate"] for e in trainer.state.log_history if "fngd/reuse_rate" in e]
    assert rates and all(rate == 1.0 for rate in rates)
    table = unwrap_optimizer(trainer.optimizer).coefficients()
    assert len(table) == 30 and table.isfinite().all()


def test_stock_and_ours_find_the_same_coefficients(tmp_path):
    runs = {}
    for cls in (FNGDSeq2SeqTrainer, Seq2SeqTrainer):
        trainer = make_trainer(cls, arguments(tmp_path))
        trainer.train()
        runs[cls] = weights(trainer.model)
    assert same(*runs.values())


@pytest.mark.feature("`group_by_length`, DataLoader workers, NEFTune", "works")
def test_group_by_length_workers_and_neftune(tmp_path):
    args = arguments(
        tmp_path,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=1,
        neftune_noise_alpha=1.0,
        num_train_epochs=2,
    )
    trainer = make_trainer(FNGDSeq2SeqTrainer, args)
    trainer.train()
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


@pytest.mark.feature("Label smoothing", "works")
def test_label_smoothing_keeps_the_rows(tmp_path):
    for cls in (FNGDSeq2SeqTrainer, Seq2SeqTrainer):
        model = tiny_marian()

        def collator(features, model=model):
            batch = pad_collator(features)
            shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
            return {**batch, "decoder_input_ids": shifted}

        args = arguments(tmp_path, label_smoothing_factor=0.1, num_train_epochs=2)
        trainer = make_trainer(cls, args, model=model, data_collator=collator)
        trainer.train()
        assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


def test_model_is_left_without_a_trace(tmp_path):
    model = tiny_marian()
    kinds = [type(m) for m in model.modules()]
    dicts = [set(m.__dict__) for m in model.modules()]
    trainer = make_trainer(Seq2SeqTrainer, arguments(tmp_path, num_train_epochs=1), model=model)
    trainer.train()
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_pre_hooks for m in model.modules())
    # accelerate keeps the original forward of the root
    root, *others = model.modules()
    assert [set(m.__dict__) for m in others] == dicts[1:]


@pytest.mark.feature("`train()` twice", "works")
def test_training_twice_works_and_starts_with_new_coefficients(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, num_train_epochs=2))
    trainer.train()
    trainer.train()
    phases = [e["fngd/reusing"] for e in trainer.state.log_history if "fngd/reusing" in e]
    assert phases == [0.0] * 4 + [1.0] * 4


def test_transform_that_drops_columns_keeps_row_numbers(tmp_path):
    data = token_pairs(16)
    data.set_transform(lambda rows: {k: rows[k] for k in ("input_ids", "attention_mask", "labels")})
    args = arguments(tmp_path, num_train_epochs=2, remove_unused_columns=False)
    trainer = make_trainer(FNGDSeq2SeqTrainer, args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


@pytest.mark.feature("Random augmentation", "works", "in `FNGDTrainer`; a stock Trainer warns")
def test_random_inputs_keep_row_numbers_and_warn_in_a_stock_trainer(tmp_path, caplog):
    def noisy(features):
        batch = pad_collator(features)
        batch["input_ids"][:, 0] = torch.randint(1, 58, (len(features),))
        return batch

    args = arguments(tmp_path, num_train_epochs=2)
    ours = make_trainer(FNGDSeq2SeqTrainer, args, data_collator=noisy)
    ours.train()
    assert ours.state.log_history[-2]["fngd/reuse_rate"] == 1.0
    stock = make_trainer(Seq2SeqTrainer, args, data_collator=noisy)
    stock.train()
    assert stock.state.log_history[-2]["fngd/reuse_rate"] < 0.9
    assert "have stored coefficients" in caplog.text


def test_documented_api_of_the_stock_trainer(tmp_path):
    model = tiny_marian()
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, num_train_epochs=2)
    config = FNGDConfig(update_scale="rms")
    kwargs = {"lr": 1e-3, "module": model, "config": config}
    trainer = make_trainer(Trainer, args, model=model, optimizer_cls_and_kwargs=(FNGD, kwargs))
    trainer.train()
    assert isinstance(unwrap_optimizer(trainer.optimizer), FNGD)
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


def test_mixin_works_with_any_trainer_and_config_object(tmp_path):
    class Mine(FNGDMixin, Trainer):
        pass

    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, num_train_epochs=1)
    config = FNGDConfig(update_rule="adamw", target_modules=["q_proj"])
    trainer = make_trainer(Mine, args, fngd_config=config)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert set(optimizer.selection.chosen) == {
        "model.encoder.layers.0.self_attn.q_proj",
        "model.decoder.layers.0.self_attn.q_proj",
        "model.decoder.layers.0.encoder_attn.q_proj",
    }


def test_weight_decay_groups_and_learning_rates(tmp_path):
    args = arguments(tmp_path, weight_decay=0.1, optim_args="other_lr=1e-4")
    trainer = make_trainer(FNGDSeq2SeqTrainer, args)
    groups = trainer.create_optimizer().param_groups
    assert [(g["rule"], g["weight_decay"], g["lr"]) for g in groups] == [
        ("sgd", 0.1, 3e-3),
        ("sgd", 0.0, 3e-3),
        ("adamw", 0.1, 1e-4),
        ("adamw", 0.0, 1e-4),
    ]
    held = sum(len(g["params"]) for g in groups)
    assert held == sum(p.requires_grad for p in trainer.model.parameters())


def test_one_callback_before_the_reporters(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, report_to=["tensorboard"]))
    kinds = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    assert kinds.count("FNGDCallback") == 1
    assert kinds.index("FNGDCallback") < kinds.index("TensorBoardCallback")


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(FNGDError, match="names adafactor"):
        make_trainer(FNGDTrainer, arguments(tmp_path, optim="adafactor", optim_args=None))


def test_other_optimizers_are_untouched(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None, num_train_epochs=1)
    trainer = make_trainer(Seq2SeqTrainer, args)
    trainer.train()
    assert not any("fngd" in key for entry in trainer.state.log_history for key in entry)


@pytest.mark.feature("Activation checkpointing, both modes", "works")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_weights(reentrant, tmp_path):
    runs = []
    for checkpointing in (False, True):
        args = arguments(
            tmp_path,
            num_train_epochs=2,
            **{
                f"{CHECKPOINTING}_checkpointing": checkpointing,
                f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": reentrant},
            },
        )
        trainer = make_trainer(FNGDSeq2SeqTrainer, args, model=tiny_marian(dropout=0.0))
        trainer.train()
        runs.append(weights(trainer.model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, msg=name)


@pytest.mark.feature(
    "`torch.compile`",
    "works",
    "no break of the graph; KFAC, Eva, TENGraD and SENG: one at every selected layer",
)
@pytest.mark.slow
@BOTH
def test_compiled_model_trains_the_same(cls, tmp_path):
    runs = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        args = arguments(
            tmp_path,
            num_train_epochs=2,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        trainer = make_trainer(cls, args, model=tiny_marian(dropout=0.0))
        trainer.train()
        assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0
        runs.append(weights(trainer.model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


@pytest.mark.feature("bf16 autocast", "works")
def test_bf16_autocast(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, bf16=True))
    trainer.train()
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.feature("Evaluation and `generate` between steps", "works")
def test_generation_between_steps_changes_nothing(tmp_path):
    runs = []
    for strategy in ("no", "steps"):
        args = arguments(
            tmp_path,
            num_train_epochs=2,
            eval_strategy=strategy,
            eval_steps=1,
            predict_with_generate=True,
            generation_max_length=8,
        )
        trainer = make_trainer(
            FNGDSeq2SeqTrainer,
            args,
            eval_dataset=token_pairs(5, seed=1),
            model=tiny_marian(dropout=0.0),
        )
        trainer.train()
        runs.append(weights(trainer.model))
    assert same(*runs)


@pytest.mark.feature("`auto_find_batch_size`", "works")
@pytest.mark.slow
def test_auto_find_batch_size_after_out_of_memory(tmp_path):
    class Hungry(FNGDSeq2SeqTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            if len(inputs["input_ids"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

    args = arguments(tmp_path, auto_find_batch_size=True, num_train_epochs=2)
    trainer = make_trainer(Hungry, args, rows=16)
    trainer.train()
    assert trainer._train_batch_size <= 4
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0

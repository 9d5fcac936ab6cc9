"""Set-ups of the Trainer on a GPU: checkpointed activations, adapters, packed rows, evaluation."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, Seq2SeqTrainer, Trainer, TrainingArguments

from hf_fngd import FNGDSeq2SeqTrainer, FNGDTrainer
from hf_fngd.hf.callback import unwrap_optimizer
from tests.capture.test_packing import pad_rows
from tests.cuda.common import CUDA, DEVICE, ON_GPU, relative_error, texts
from tests.helpers import tiny_llama
from tests.hf.test_trainer import CHECKPOINTING
from tests.hf_utils import arguments, make_trainer, tiny_marian, token_pairs, weights

pytestmark = CUDA


def on_device(folder, **changes) -> TrainingArguments:
    return arguments(folder, use_cpu=not ON_GPU, **changes)


@pytest.mark.parametrize("optim", ["fngd", "fngd_muon", "kfac", "eva"])
def test_the_loss_falls_and_every_row_is_found_again(optim, tmp_path):
    args = on_device(
        tmp_path,
        optim=optim,
        optim_args="update_scale=rms",
        learning_rate=2e-2,
        num_train_epochs=6,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        predict_with_generate=True,
        generation_max_length=8,
    )
    trainer = make_trainer(FNGDSeq2SeqTrainer, args, eval_dataset=token_pairs(5, seed=1))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert all(p.device.type == DEVICE.type for p in trainer.model.parameters())
    seconds = "gram_seconds" if "fngd" in optim else "curvature_seconds"
    series = unwrap_optimizer(trainer.optimizer).series
    assert history[-1][f"{series}/{seconds}"] > 0
    if "fngd" in optim:
        assert history[-1]["fngd/reuse_rate"] == 1.0


@pytest.mark.on_gpu("Activation checkpointing, both modes")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("optim", ["fngd", "fngd_adamw", "kfac"])
def test_activation_checkpointing(optim, reentrant, tmp_path):
    if optim == "kfac" and reentrant:
        pytest.skip("each segment would be observed by itself")
    runs = []
    for checkpointing in (False, True):
        args = on_device(
            tmp_path,
            optim=optim,
            optim_args=None,
            num_train_epochs=2,
            learning_rate=1e-3,
            **{
                f"{CHECKPOINTING}_checkpointing": checkpointing,
                f"{CHECKPOINTING}_checkpointing_kwargs": {"use_reentrant": reentrant},
            },
        )
        trainer = make_trainer(FNGDSeq2SeqTrainer, args, model=tiny_marian(dropout=0.0))
        trainer.train()
        runs.append(weights(trainer.model))
    assert relative_error(*runs, weights(tiny_marian())) < 1e-2


# peft asks for a name that transformers is going to take away.
@pytest.mark.on_gpu("PEFT/LoRA")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("optim", ["fngd", "fngd_adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_adapters_of_peft(optim, precision, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(tiny_llama(), config)
    before = weights(model)
    args = on_device(
        tmp_path,
        optim=optim,
        optim_args=None,
        learning_rate=1e-2,
        num_train_epochs=4,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        bf16=precision == "bf16",
    )
    trainer = FNGDTrainer(model=model, args=args, train_dataset=texts(), data_collator=pad_rows)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(e["loss"] for e in history[-3:]) < sum(e["loss"] for e in history[:3])
    after = weights(model)
    changed = {name for name, p in after.items() if not torch.equal(p.cpu(), before[name])}
    assert changed == {name for name in after if "lora_" in name}
    if optim != "muon":
        assert history[-1]["fngd/layers"] == len(changed)
        assert history[-1]["fngd/reuse_rate"] == 1.0


@pytest.mark.on_gpu("Packed or padding-free rows")
@pytest.mark.parametrize("share", ["sample", "layer", "none"])
@pytest.mark.parametrize("kind", [FNGDTrainer, Trainer], ids=["ours", "stock"])
def test_packed_rows_train_as_padded_ones(kind, share, tmp_path):
    runs = []
    for collator in (pad_rows, DataCollatorWithFlattening()):
        model = tiny_llama()
        model.config.use_cache = False  # with a cache, samples of a row would see each other
        args = on_device(
            tmp_path,
            optim_args=f"share={share}",
            learning_rate=0.05,
            per_device_train_batch_size=4,
        )
        trainer = kind(model=model, args=args, train_dataset=texts(), data_collator=collator)
        trainer.train()
        last = trainer.state.log_history[-2]
        assert last.get("fngd/reuse_rate", 1.0) == 1.0
        assert last["fngd/layers_dropped"] == 0 and last["fngd/nonfinite"] == 0
        runs.append(weights(model))
    assert relative_error(*runs, weights(tiny_llama())) < 1e-2


@pytest.mark.on_gpu("`max_grad_norm`")
def test_accumulation_and_clipping(tmp_path):
    """Stored coefficients: one batch of 8 and two micro-batches of 4 clip the same gradient."""
    runs = []
    for parts in (1, 2):
        args = on_device(
            tmp_path,
            optim_args="share=layer",
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.1,
        )
        trainer = make_trainer(FNGDSeq2SeqTrainer, args, model=tiny_marian(dropout=0.0), rows=32)
        trainer.train()
        runs.append(trainer.state.log_history[-2])
    assert all(0.0 <= run["fngd/clipped"] <= 1.0 for run in runs)
    assert runs[0]["fngd/clipped"] == runs[1]["fngd/clipped"] == 1.0


def test_a_stock_trainer_finds_the_coefficients_of_ours(tmp_path):
    runs = []
    for kind in (FNGDSeq2SeqTrainer, Seq2SeqTrainer):
        trainer = make_trainer(kind, on_device(tmp_path), model=tiny_marian(dropout=0.0))
        trainer.train()
        assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0
        runs.append(weights(trainer.model))
    assert relative_error(*runs, weights(tiny_marian())) < 1e-2

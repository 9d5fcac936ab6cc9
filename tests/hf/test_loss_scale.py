"""Accumulation: 1x32 and 4x8 give the same gradient, also for models with the wrong loss scale."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Seq2SeqTrainer, set_seed

from hf_fngd import FNGDCallback, FNGDMixin, FNGDSeq2SeqTrainer, FNGDTrainer
from hf_fngd.hf.trainer import LossScaleMixin
from tests.hf_utils import VOCAB, arguments, make_trainer, tiny_marian, weights


class Baseline(LossScaleMixin, Seq2SeqTrainer):
    """A first-order baseline with the corrected loss."""


def llama():
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


def first_gradients(cls, folder, model, accumulation, *, rows=32, **changes):
    """Return the gradient of the first update over the same 32 rows, however they are split."""
    found = {}

    class Spy(cls):
        def _clip_grad_norm(self, model):
            if not found:
                grads = {n: p.grad for n, p in model.named_parameters()}
                found.update({n: g.clone() for n, g in grads.items() if g is not None})
            return super()._clip_grad_norm(model)

    args = arguments(
        folder,
        per_device_train_batch_size=rows // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **changes,
    )
    trainer = make_trainer(Spy, args, model=model.double(), rows=rows)
    trainer.train()
    return found, trainer


@pytest.mark.parametrize(
    "build", [lambda: tiny_marian(dropout=0.0), llama], ids=["marian", "llama"]
)
def test_accumulated_baseline_gradient_is_that_of_one_batch(build, tmp_path):
    plain = {"optim": "adamw_torch", "optim_args": None}
    whole, _ = first_gradients(Baseline, tmp_path, build(), 1, **plain)
    split, _ = first_gradients(Baseline, tmp_path, build(), 4, **plain)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_accumulated_natural_gradient_with_stored_coefficients(tmp_path, monkeypatch):
    """Stored coefficients make the split irrelevant; fresh ones are per micro-batch by design."""

    class Filled(FNGDSeq2SeqTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            rows = optimizer.store.locate(range(32), create=True)
            generator = torch.Generator().manual_seed(3)
            table = torch.rand(32, len(optimizer.layer_names), generator=generator)
            optimizer.store.write(rows, table)
            optimizer.start_epoch(1)
            return optimizer

    # The first epoch of this run is to be one that reuses.
    monkeypatch.setattr(FNGDCallback, "on_epoch_begin", lambda self, *args, **kwargs: None)
    options = {"optim_args": "share=sample"}
    whole, _ = first_gradients(Filled, tmp_path, tiny_marian(dropout=0.0), 1, **options)
    split, _ = first_gradients(Filled, tmp_path, tiny_marian(dropout=0.0), 4, **options)
    plain, _ = first_gradients(Baseline, tmp_path, tiny_marian(dropout=0.0), 1, optim="sgd")
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    name = "model.encoder.layers.0.fc1.weight"
    assert not torch.allclose(whole[name], plain[name], rtol=0.1)


def test_stock_trainer_has_the_flaw_that_is_corrected(tmp_path):
    """If this fails, transformers has repaired its models and the mixin can go."""
    plain = {"optim": "adamw_torch", "optim_args": None, "average_tokens_across_devices": False}
    build = lambda: tiny_marian(dropout=0.0)  # noqa: E731
    whole, _ = first_gradients(Seq2SeqTrainer, tmp_path, build(), 1, **plain)
    split, _ = first_gradients(Seq2SeqTrainer, tmp_path, build(), 4, **plain)
    name = "model.encoder.layers.0.fc1.weight"
    ratio = split[name].norm() / whole[name].norm()
    assert 3 < ratio < 5


def test_flawed_model_is_named_once_and_a_right_one_is_left_alone(tmp_path, caplog):
    _, trainer = first_gradients(FNGDSeq2SeqTrainer, tmp_path, tiny_marian(), 4)
    assert trainer._ignores_num_items
    assert caplog.text.count("MarianMTModel ignores num_items_in_batch") == 1
    _, trainer = first_gradients(FNGDTrainer, tmp_path, llama(), 4)
    assert trainer._ignores_num_items is False


def test_probe_draws_no_random_numbers(tmp_path):
    """A model without the flaw trains as if there were no mixin."""
    runs = []
    for cls in (Seq2SeqTrainer, Baseline):
        args = arguments(tmp_path, optim="adamw_torch", optim_args=None, max_steps=3)
        trainer = make_trainer(cls, args, model=llama())
        trainer.train()
        runs.append(weights(trainer.model))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name])


class SumOverUpdate(Seq2SeqTrainer):
    """Divides by the tokens of the whole update."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits.flatten(0, 1)
        labels = inputs["labels"].flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


class MeanOfBatch(Seq2SeqTrainer):
    """A mean, which the Trainer divides by the micro-batches."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs).logits.flatten(0, 1)
        return nn.functional.cross_entropy(logits, inputs["labels"].flatten())


class ToldByUser(Seq2SeqTrainer):
    """Transformers' own loss, whose scale the user corrects."""

    loss_is_scaled_for_ga = False


@pytest.mark.parametrize("own", [SumOverUpdate, MeanOfBatch, ToldByUser])
@pytest.mark.slow
def test_a_loss_of_the_user_keeps_its_scale(own, tmp_path):
    mixed = type("Mixed", (FNGDMixin, own), {})
    options = {"optim_args": "share=none,damping=1e9"}
    for parts in (1, 4):
        plain, _ = first_gradients(
            own, tmp_path, tiny_marian(dropout=0.0), parts, optim="adamw_torch", optim_args=None
        )
        found, _ = first_gradients(mixed, tmp_path, tiny_marian(dropout=0.0), parts, **options)
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


class Pair(nn.Module):
    """Returns a tuple, and takes the number of items only to ignore it."""

    def __init__(self, training_only=False):
        super().__init__()
        self.layer, self.training_only = nn.Linear(6, 3), training_only

    def forward(self, x=None, labels=None, **kwargs):
        logits = self.layer(x)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.training_only:
            return {"loss": loss, "logits": logits} if self.training else {"logits": logits}
        return loss, logits


@pytest.mark.parametrize("training_only", [False, True])
def test_a_model_that_cannot_be_probed_trains(training_only, tmp_path):
    rows = [{"x": torch.randn(6), "labels": i % 3} for i in range(12)]
    args = arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=4)
    trainer = FNGDTrainer(model=Pair(training_only), args=args, train_dataset=rows)
    assert trainer.train().global_step == 3

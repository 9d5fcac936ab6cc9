"""Several rows for one row of the data set: pairs, choices, columns; every one is a sample."""

import pytest
import torch
from transformers import BertConfig, BertForMultipleChoice, Trainer

from hf_fngd import FNGDTrainer, create_fngd_optimizer
from hf_fngd.hf.samples import announce
from tests.helpers import natural_gradient, sample_gradients, tiny_llama
from tests.hf.test_any_trainer import options

QUESTIONS, CHOICES = 12, 3
LETTERS = torch.Generator().manual_seed(0)
ASKED = torch.randint(3, 24, (QUESTIONS, CHOICES, 6), generator=LETTERS)
LENGTHS = torch.randint(3, 7, (QUESTIONS, CHOICES), generator=LETTERS)
MASK = (torch.arange(6) < LENGTHS.unsqueeze(-1)).long()


def tiny_choices():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMultipleChoice(config)


def questions(rows):
    return {
        "input_ids": ASKED[rows] * MASK[rows],
        "attention_mask": MASK[rows],
        "labels": torch.as_tensor(rows) % CHOICES,
    }


def data():
    return [{key: value[0] for key, value in questions([row]).items()} for row in range(QUESTIONS)]


@pytest.mark.feature("Multiple choice", "works", "each choice is a sample")
@pytest.mark.parametrize("optim", ["fngd", "kfac", "ekfac", "eva", "seng", "tengrad"])
@pytest.mark.parametrize("kind", [Trainer, FNGDTrainer])
def test_every_choice_is_weighted(kind, optim, tmp_path, caplog):
    caplog.set_level("WARNING")
    args = options(tmp_path, optim=optim)
    trainer = kind(model=tiny_choices(), args=args, train_dataset=data())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if f"{optim}/layers" in entry]
    assert {(e[f"{optim}/layers"], e[f"{optim}/layers_dropped"]) for e in logs} == {(8.0, 0.0)}
    if optim == "fngd":
        optimizer = trainer.optimizer.optimizer
        assert optimizer.coefficients().isfinite().all()
        assert {e["fngd/reuse_rate"] for e in logs if "fngd/reuse_rate" in e} == {1.0}
        numbers = {row + (choice << 40) for row in range(QUESTIONS) for choice in range(CHOICES)}
        assert len(optimizer.store.rows) == len(numbers)
        assert (set(optimizer.store.rows) == numbers) == (kind is FNGDTrainer)
    for complaint in ("left out", "stored coefficients", "announce"):
        assert complaint not in caplog.text


def rows_of_the_classifier(model, batch):
    """Gradients of the classifier by rows, from a loop: with one row's hidden states at a time."""
    hidden = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(**batch)
    handle.remove()
    states, shape = hidden[0].detach(), batch["labels"].shape

    def share(row):
        # Only this row depends on the weights; the others' scores are constants.
        kept = torch.arange(len(states)).unsqueeze(1) == row
        scores = model.classifier(states)
        scores = torch.where(kept, scores, scores.detach()).view(*shape, -1)
        return torch.nn.functional.cross_entropy(scores, batch["labels"])

    weights = [model.classifier.weight, model.classifier.bias]
    return sample_gradients(share, weights, len(states))


def test_weights_of_choices_are_those_of_rows():
    model = tiny_choices().double()
    batch = questions([4, 0, 7, 2])
    u = rows_of_the_classifier(model, batch)
    expected = natural_gradient(u, 0.1, relative=True)
    optimizer = create_fngd_optimizer(
        model, lr=0.0, share="sample", damping=0.1, target_modules=["classifier"]
    )
    assert announce(optimizer, model, batch) == 4 * CHOICES
    model(**batch).loss.backward()
    torch.testing.assert_close(model.classifier.weight.grad, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.classifier.bias.grad, expected[1], rtol=1e-9, atol=1e-12)


def test_the_same_choice_under_another_label_is_another_sample():
    optimizer = create_fngd_optimizer(tiny_choices(), lr=0.0, share="sample")
    batch = questions([0, 0])
    batch["labels"] = torch.tensor([0, 1])
    announce(optimizer, tiny_choices(), batch)
    assert len(optimizer.store.rows) == 2 * CHOICES


def test_inputs_of_three_dimensions_elsewhere_are_one_row_a_sample():
    optimizer = create_fngd_optimizer(tiny_llama(), lr=0.0, share="sample")
    assert announce(optimizer, tiny_llama(), {"input_ids": ASKED[:4]}) == 4

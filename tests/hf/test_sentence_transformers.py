"""Trainers of sentence-transformers, as they are with `--optim fngd` and with the mixin."""

import datasets
import pytest
import torch
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import DistilBertConfig, DistilBertModel

from hf_fngd import FNGDConfig, FNGDMixin
from tests.helpers import assert_same
from tests.hf.test_trl import series, warnings_of
from tests.hf_utils import tiny_texts, tiny_tokenizer, weights

ROWS = 12
ANCHORS, POSITIVES, NEGATIVES = (tiny_texts(ROWS, low, low + 2, seed=low) for low in (3, 5, 4))
PAIRS = datasets.Dataset.from_dict({"anchor": ANCHORS, "positive": POSITIVES})
TRIPLETS = PAIRS.add_column("negative", NEGATIVES)
CLASSES = PAIRS.add_column("label", [row % 3 for row in range(ROWS)])
SCORES = PAIRS.add_column("score", [row / ROWS for row in range(ROWS)])
RANKING = losses.MultipleNegativesRankingLoss
# Data, loss of a model, selected layers, and samples without and with the mixin: a row of texts is
# one sample where each forward pass has one text of each row.
CASES = {
    "ranking": (PAIRS, RANKING, 6, 2 * ROWS, ROWS),
    "matryoshka": (
        PAIRS,
        lambda m: losses.MatryoshkaLoss(m, RANKING(m), [8, 4]),
        6,
        2 * ROWS,
        ROWS,
    ),
    "two-data-sets": (
        datasets.DatasetDict({"pairs": PAIRS, "scores": SCORES}),
        lambda m: {"pairs": RANKING(m), "scores": losses.CosineSimilarityLoss(m)},
        6,
        2 * ROWS,
        2 * ROWS,
    ),
    # The two candidates of a row share one forward pass.
    "triplets": (TRIPLETS, losses.TripletLoss, 6, 3 * ROWS, 3 * ROWS),
    # Each forward pass has a part of the batch; with the mixin the rows keep their places.
    "cached": (
        PAIRS,
        lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2),
        6,
        2 * ROWS,
        3 * ROWS,
    ),
    # The loss has a layer of its own.
    "classes": (CLASSES, lambda m: losses.SoftmaxLoss(m, 8, 3), 7, 2 * ROWS, ROWS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DistilBertModel(
        DistilBertConfig(
            vocab_size=24,
            dim=8,
            hidden_dim=12,
            n_layers=1,
            n_heads=2,
            max_position_embeddings=16,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def train(folder, output, case, mixed, optim="fngd", optim_args=None, **further):
    data, loss, *_ = CASES[case]
    kind = SentenceTransformerTrainer
    if mixed:
        kind = type(kind.__name__, (FNGDMixin, kind), {})
    modules = [Transformer(folder, max_seq_length=16), Pooling(8)]
    model = SentenceTransformer(modules=modules, device="cpu")
    torch.manual_seed(0)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        optim=optim,
        optim_args=optim_args,
        learning_rate=3e-3,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = kind(model=model, args=args, train_dataset=data, loss=loss(model), **further)
    trainer.train()
    return trainer


@pytest.mark.feature(
    "sentence-transformers (cached losses, Matryoshka, several data sets)",
    "works",
    "stock or with `FNGDMixin`",
)
@pytest.mark.parametrize("mixed", [False, True], ids=["stock", "mixin"])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_weighted_and_every_sample_found_again(
    case, mixed, folder, tmp_path, caplog
):
    caplog.set_level("WARNING")
    trainer = train(folder, tmp_path, case, mixed)
    *_, layers, of_stock, of_mixin = CASES[case]
    optimizer = trainer.optimizer.optimizer
    assert set(series(trainer, "layers")) == {layers}
    assert set(series(trainer, "layers_dropped")) == {0}
    assert set(series(trainer, "reuse_rate")) == {1.0}
    found = optimizer.coefficients()
    assert found.shape == (of_mixin if mixed else of_stock, layers)
    assert found.isfinite().any(0).all()
    # Without the mixin the loss's own layer belongs to the text that came last.
    if (case, mixed) not in {("cached", True), ("triplets", True), ("classes", False)}:
        assert found.isfinite().all()
    (only,) = warnings_of(caplog)
    assert f"{layers} layers selected" in only


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ranking", "matryoshka", "classes"])
def test_large_damping_is_the_plain_rule(case, folder, tmp_path):
    def trained(mixed, optim, optim_args):
        trainer = train(folder, tmp_path, case, mixed, optim=optim, optim_args=optim_args)
        found = weights(trainer.loss)
        # Attention does not depend on it: its gradient is rounding, which update_scale=rms scales.
        (name,) = (name for name in found if name.endswith("k_lin.bias"))
        del found[name]
        return found

    expected = trained(False, "plain", "update_rule=sgd,update_scale=rms")
    for mixed in (False, True):
        assert_same(trained(mixed, "fngd", "damping=1e9"), expected, rtol=1e-4, atol=1e-6)
    natural = trained(True, "fngd", "damping=0.1")
    assert any((natural[name] - value).abs().max() > 1e-4 for name, value in expected.items())


def test_a_config_makes_the_optimizer_of_the_loss(folder, tmp_path):
    config = FNGDConfig(damping=1e9)
    given = train(folder, tmp_path, "classes", True, optim="adamw_torch", fngd_config=config)
    named = train(folder, tmp_path, "classes", True, optim_args="damping=1e9")
    assert "classifier" in given.optimizer.optimizer.layer_names
    assert_same(weights(given.loss), weights(named.loss))

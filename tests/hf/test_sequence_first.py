"""FSMT, a family of translation models whose layers see `[T, N, d]`, in the Trainer."""

import pytest
from transformers import FSMTConfig, FSMTForConditionalGeneration, set_seed

from hf_fngd import FNGDSeq2SeqTrainer
from tests.hf_utils import VOCAB, arguments, make_trainer


def tiny_fsmt():
    set_seed(0)
    return FSMTForConditionalGeneration(
        FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=VOCAB,
            tgt_vocab_size=VOCAB,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=VOCAB - 1,
            eos_token_id=0,
            bos_token_id=1,
            dropout=0.0,
        )
    )


@pytest.mark.parametrize("batch", [8, 5], ids=["T = N", "T and N differ"])
def test_layers_are_left_out_and_keep_nothing(batch, tmp_path, caplog):
    # Sentences of the test data have 8 tokens.
    own = {"per_device_train_batch_size": batch, "num_train_epochs": 2, "optim_args": None}
    trainer = make_trainer(
        FNGDSeq2SeqTrainer, arguments(tmp_path, **own), model=tiny_fsmt(), rows=64
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    names = dict(zip(optimizer.layer_names, optimizer.layers, strict=True))
    # The projection to the vocabulary sees `[N, T, d]` again.
    wrong = names.keys() - {"model.decoder.output_projection"}
    assert len(wrong) == 16
    assert wrong == {name for name, layer in names.items() if layer.left_out}
    kept = optimizer.coefficients().isfinite().any(0).tolist()
    assert {name for name, layer in names.items() if not kept[layer.number]} == wrong
    assert "is left out" in caplog.text

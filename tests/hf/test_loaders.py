"""Ways to load data: the rows of a batch are known, and ranks agree, whoever reads them."""

import faulthandler
import sys

import datasets
import pytest
import torch
from transformers import Seq2SeqTrainer

from hf_fngd import FNGDSeq2SeqTrainer
from hf_fngd.hf.row_numbers import rows_of
from tests.hf.test_ddp import on_two_ranks
from tests.hf_utils import PAD, arguments, make_trainer, same, token_pairs, weights

ROWS = 30
DISPATCHED = {"dispatch_batches": True}
CASES = {
    "dispatched": {"accelerator_config": DISPATCHED},
    "dispatched-split": {"accelerator_config": {**DISPATCHED, "split_batches": True}},
    "uneven": {"accelerator_config": {"even_batches": False}},
    "stream": {"optim_args": "update_scale=rms,share=layer", "max_steps": 12},
}


class Checked(FNGDSeq2SeqTrainer):
    """Compare every row of a batch with that of its number."""

    def training_step(self, model, inputs, *args):
        rows = rows_of(inputs)
        assert (rows is None) == isinstance(self.train_dataset, datasets.IterableDataset)
        if rows is not None:
            wanted = pad_to_eight([token_pairs(ROWS)[row] for row in rows])
            assert torch.equal(inputs["input_ids"], wanted["input_ids"])
        return super().training_step(model, inputs, *args)


TRAINERS = {"ours": Checked, "stock": Seq2SeqTrainer}


def pad_to_eight(features):
    """Pad to one length, without which one process could not join the batches of several."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([f[key] + [value] * (8 - len(f[key])) for f in features])
        for key, value in fill.items()
    }


def train(cls, folder, case, **changes):
    data = token_pairs(ROWS)
    if case == "stream":
        data = data.to_iterable_dataset()
    settings = {"per_device_train_batch_size": 4, **CASES.get(case, {}), **changes}
    trainer = make_trainer(
        cls, arguments(folder, **settings), train_dataset=data, data_collator=pad_to_eight
    )
    trainer.train()
    return trainer


def main(folder):
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        for kind, cls in TRAINERS.items():
            try:
                trainer = train(cls, f"{folder}/run", case)
            except Exception as error:  # told by the test of this case
                found[f"{case} {kind}"] = f"{type(error).__name__}: {error}"
                continue
            history, optimizer = trainer.state.log_history, trainer.optimizer.optimizer
            found[f"{case} {kind}"] = {
                "weights": weights(trainer.model),
                "store": optimizer.coefficients(),
                "by number": getattr(optimizer.store, "rows", 0) is None,
                "rates": {e["fngd/reuse_rate"] for e in history if "fngd/reuse_rate" in e},
            }
    torch.save(found, f"{folder}/found{trainer.args.process_index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return on_two_ranks("tests.hf.test_loaders", tmp_path_factory.mktemp("loaders"), "found")


def agreeing(two_ranks, case):
    first, second = (found[case] for found in two_ranks)
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    start = weights(make_trainer(Seq2SeqTrainer, arguments("unused", optim="adamw_torch")).model)
    assert same(first["weights"], second["weights"]) and not same(first["weights"], start)
    return first, second


@pytest.mark.feature("DDP, one process reads for all (`dispatch_batches`)", "works")
@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case", ["dispatched", "dispatched-split"])
def test_batches_that_one_process_reads(case, kind, two_ranks):
    for found in agreeing(two_ranks, f"{case} {kind}"):
        assert found["store"].isfinite().all() and len(found["store"]) == ROWS
        assert found["rates"] == {1.0}
        assert found["by number"] == (kind == "ours")


@pytest.mark.feature(
    "DDP, ranks whose last batches differ in size (`even_batches: false`)", "works"
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_last_batches_of_different_size(kind, two_ranks):
    for found in agreeing(two_ranks, f"uneven {kind}"):
        assert found["store"].isfinite().all() and len(found["store"]) == ROWS
        assert found["rates"] == {1.0}
        assert found["by number"] == (kind == "ours")


@pytest.mark.feature("DDP, IterableDataset with `share=layer`", "works")
@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_stream_on_two_ranks(kind, two_ranks):
    first, second = agreeing(two_ranks, f"stream {kind}")
    assert torch.equal(first["store"], second["store"]) and first["store"].isfinite().all()


@pytest.mark.feature("DataLoader workers, forked or spawned", "works")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_change_nothing(start, tmp_path):
    plain = train(FNGDSeq2SeqTrainer, tmp_path, "")
    workers = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": start}
    other = train(FNGDSeq2SeqTrainer, tmp_path, "", **workers)
    assert same(weights(plain.model), weights(other.model))
    first, second = (trainer.optimizer.optimizer for trainer in (plain, other))
    assert second.store.rows is None, "row numbers, not hashes"
    assert torch.equal(first.coefficients(), second.coefficients())


if __name__ == "__main__":
    main(sys.argv[1])

"""Row numbers travel beside the batch: what the user meets is what a plain Trainer shows."""

import collections
import gc
import weakref

import accelerate
import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from transformers import BatchEncoding, BatchFeature, Trainer, TrainerCallback

from hf_fngd import FNGDTrainer
from hf_fngd.hf.row_numbers import number, rows_of
from tests.hf.test_any_trainer import Net, options

ROWS = 11
Pair = collections.namedtuple("Pair", "x row")


class Own(Dataset):
    """A data set with an attribute, which a batch reads in one piece."""

    name = "own"

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return {"x": torch.full((6,), float(row)), "labels": row % 3, "row": row}

    def __getitems__(self, rows):
        return tuple(self[row] for row in rows)


def table():
    return datasets.Dataset.from_dict(
        {"x": [[float(row)] * 6 for row in range(ROWS)], "row": range(ROWS)}
    )


DATASETS = {
    "own": Own(),
    "list": [Own()[row] for row in range(ROWS)],
    "table": table(),
    "transformed": table().with_transform(
        lambda rows: {"x": [torch.tensor(x) for x in rows["x"]], "row": rows["row"]}
    ),
    "subset": Subset(ConcatDataset([Own(), Own()]), range(ROWS)),
    "pairs": TensorDataset(torch.arange(ROWS).float().unsqueeze(1).expand(ROWS, 6)),
}


def stacked(items):
    if not isinstance(items[0], dict):
        x = torch.stack([item[0] for item in items])
        return {"x": x, "row": x[:, 0].long()}
    x = torch.stack([torch.as_tensor(item["x"]) for item in items])
    return {"x": x, "row": torch.tensor([item["row"] for item in items])}


BATCHES = {
    "dict": dict,
    "encoding": BatchEncoding,
    "feature": BatchFeature,
    "userdict": collections.UserDict,
    "nested": lambda batch: {"constant": CONSTANT, "inner": [batch, "text"]},
    "list": lambda batch: [batch["x"], batch["row"]],
    "tuple": lambda batch: (batch["x"], batch["row"]),
    "named": lambda batch: Pair(**batch),
}
CONSTANT = torch.arange(3)


class Collator:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, items):
        assert isinstance(items, list | tuple), "the items as the data set gives them"
        return BATCHES[self.kind](stacked(items))


def true_rows(batch):
    while not isinstance(batch, torch.Tensor):
        if "inner" in batch:
            batch = batch["inner"][0]
        batch = batch["row"] if hasattr(batch, "keys") else batch[1]
    return batch.tolist()


def loader_of(kind, folder, batch="dict", data="own", **changes):
    args = options(folder, remove_unused_columns=False, **changes)
    trainer = kind(
        model=Net(), args=args, train_dataset=DATASETS[data], data_collator=Collator(batch)
    )
    return trainer.get_train_dataloader(), trainer


def same_batches(first, second):
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif hasattr(first, "keys"):
        assert list(first.keys()) == list(second.keys())
        for key in first.keys():
            same_batches(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same_batches(one, other)
    else:
        assert first == second


@pytest.mark.feature("Batches of any type, with their row numbers beside them", "works")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("batch", "data"), [*((b, "own") for b in BATCHES), *(("dict", d) for d in DATASETS)], ids=str
)
def test_a_loader_is_that_of_a_plain_trainer(batch, data, workers, tmp_path):
    found = []
    for kind in (Trainer, FNGDTrainer):
        torch.manual_seed(0)
        changes = {"optim": "adamw_torch"} if kind is Trainer else {}
        loader, _ = loader_of(
            kind, tmp_path, batch, data, dataloader_num_workers=workers, **changes
        )
        found.append((loader, list(loader)))
    (plain, expected), (ours, obtained) = found
    same_batches(expected, obtained)
    assert all(rows_of(one) is None for one in expected)
    assert [rows_of(one) for one in obtained] == [true_rows(one) for one in obtained]
    assert sorted(row for one in obtained for row in rows_of(one)) == list(range(ROWS))
    assert len(ours) == len(plain) and type(ours).__name__ == type(plain).__name__
    assert isinstance(ours, type(plain)) and isinstance(ours, DataLoader)
    assert ours.collate_fn is not None and type(ours.collate_fn) is type(plain.collate_fn)
    assert type(ours.dataset) is type(plain.dataset)
    if data != "table":
        assert ours.dataset is plain.dataset


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_loops_over_one_loader_never_mix_their_numbers(tmp_path_factory, data):
    """Iterators advance in any order, batches are kept, copied and emptied in between."""
    kind = data.draw(st.sampled_from(sorted(BATCHES)))
    loader, trainer = loader_of(FNGDTrainer, tmp_path_factory.mktemp("run"), kind)
    others = trainer.get_test_dataloader(Own())
    loops = [iter(loader), iter(loader), iter(others)]
    kept = []
    for which in data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=12)):
        if which < 3:
            batch = next(loops[which], None)
            if batch is not None:
                kept.append((batch, true_rows(batch) if which < 2 else None))
        elif kept:
            kept.pop(data.draw(st.integers(0, len(kept) - 1)))
        for batch, rows in kept:
            assert rows_of(batch) == rows
            copied = dict(batch) if hasattr(batch, "keys") else list(batch)
            assert rows_of(copied) == rows


def test_a_part_of_a_loader_hands_out_plain_batches(tmp_path):
    loader, trainer = loader_of(FNGDTrainer, tmp_path, train_sampling_strategy="sequential")
    rest = list(accelerate.skip_first_batches(loader, 2))
    assert [true_rows(batch) for batch in rest] == [[8, 9, 10]]
    assert type(rest[0]) is dict
    assert number(loader) is loader and [rows_of(b) for b in loader][2] == [8, 9, 10]


@pytest.mark.parametrize("changes", [{"batch_size": None}, {"dataset": "stream"}])
def test_loaders_without_numbered_batches_stay_as_they_are(changes):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(DATASETS["list"])

    data = Stream() if "dataset" in changes else Own()
    plain = DataLoader(data, **{k: v for k, v in changes.items() if k != "dataset"})
    loader = accelerate.Accelerator(cpu=True).prepare(plain)
    kind = type(loader)
    for one in (plain, loader):
        assert number(one) is one and type(one) in (DataLoader, kind)
        assert all(rows_of(batch) is None for batch in one)


def test_samplers_of_keys_have_no_row_numbers(tmp_path):
    class Keys(Own):
        def __getitem__(self, key):
            return super().__getitem__(int(key[1:]))

    plain = DataLoader(Keys(), sampler=[f"k{row}" for row in range(ROWS)], batch_size=4)
    loader = number(accelerate.Accelerator(cpu=True).prepare(plain))
    batches = list(loader)
    assert [true_rows(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert all(rows_of(batch) is None for batch in batches)


class Read(TrainerCallback):
    """Read the training data once more, with the model, as a debugging user does."""

    def on_epoch_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        with torch.no_grad():
            for batch in train_dataloader:
                model(**batch)


class OwnStep(FNGDTrainer):
    """A training step that calls nobody else's, and checks the numbers."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert set(inputs) == {"x", "labels"}
        assert [int(x[0]) for x in inputs["x"]] == rows_of(inputs)
        self.seen = getattr(self, "seen", []) + rows_of(inputs)
        inputs = self._prepare_inputs(dict(inputs))
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
        return loss.detach()


def numbered_rows():
    return [{"x": torch.full((6,), float(row)), "labels": row % 3} for row in range(12)]


@pytest.mark.feature("A `training_step` of one's own, without the Trainer's", "works")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [FNGDTrainer, OwnStep])
def test_batches_go_to_model_callbacks_and_training_steps(kind, accumulation, tmp_path):
    args = options(tmp_path, optim_args="share=sample", gradient_accumulation_steps=accumulation)
    trainer = kind(model=Net(), args=args, train_dataset=numbered_rows(), callbacks=[Read()])
    assert trainer.model(**next(iter(trainer.get_train_dataloader())))["loss"].isfinite()
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.store.rows is None, "row numbers, not hashes"
    assert optimizer.coefficients().shape == (12, 2) and optimizer.coefficients().isfinite().all()
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


def test_a_resumed_epoch_knows_its_rows(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3}
    args = options(tmp_path, optim_args="share=sample", **settings)
    whole = OwnStep(model=Net(), args=args, train_dataset=numbered_rows())
    whole.train()
    resumed = OwnStep(model=Net(), args=args, train_dataset=numbered_rows())
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
    assert resumed.seen == whole.seen[16:]
    first, second = (one.optimizer.optimizer.coefficients() for one in (whole, resumed))
    assert torch.equal(first, second)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


class OwnLoader(OwnStep):
    def get_train_dataloader(self):
        plain = DataLoader(self.train_dataset, batch_size=4, shuffle=True)
        return self.accelerator.prepare(plain)


def test_a_loader_of_the_users_own_is_numbered(tmp_path):
    args = options(tmp_path, optim_args="share=sample")
    trainer = OwnLoader(model=Net(), args=args, train_dataset=numbered_rows())
    trainer.train()
    assert trainer.optimizer.optimizer.store.rows is None
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


class Unprepared(FNGDTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, shuffle=True)


def test_a_loader_that_is_not_prepared_is_hashed(tmp_path):
    args = options(tmp_path, optim_args="share=sample")
    trainer = Unprepared(model=Net(), args=args, train_dataset=numbered_rows())
    trainer.train()
    assert len(trainer.optimizer.optimizer.store.rows) == 12
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


def test_a_trainer_that_is_gone_leaves_nothing_behind(tmp_path):
    gc.collect()
    gc.disable()
    try:
        args = options(tmp_path, optim_args="share=sample")
        trainer = FNGDTrainer(model=Net(), args=args, train_dataset=numbered_rows())
        trainer.train()
        gone = weakref.ref(trainer), weakref.ref(trainer.model)
        del trainer
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()

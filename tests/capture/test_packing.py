"""Packed rows: several samples in one row weigh as if each were alone in a row."""

import copy
import re

import datasets
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_fngd import (
    FNGDError,
    FNGDTrainer,
    create_fngd_optimizer,
    create_preconditioned_optimizer,
)
from hf_fngd.hf.samples import announce, packed_lengths, unpacked
from tests.helpers import (
    assert_same,
    gradients,
    gram_route,
    natural_gradient,
    sample_gradients,
    tiny_llama,
)
from tests.hf_utils import weights

LENGTHS = [[3, 1, 5], [2, 6, 2]]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Net(nn.Module):
    """Layers that look at one position at a time, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(self.twice(self.twice(x).tanh()).tanh())


def net():
    torch.manual_seed(0)
    return Net().double()


def samples(number):
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in LENGTHS[number]]


def loss_of(out, mask):
    return (out.square().sum(-1) * mask).sum() / mask.sum()


def backward(model, optimizer, number, packed, call=None):
    parts = samples(number)
    ids = range(3 * number, 3 * number + 3)
    if packed:
        optimizer.set_batch(ids, lengths=LENGTHS[number])
        x, mask = torch.cat(parts).unsqueeze(0), torch.ones(1, sum(LENGTHS[number]))
    else:
        optimizer.set_batch(ids)
        x = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        mask = (torch.arange(x.shape[1]) < torch.tensor(LENGTHS[number]).unsqueeze(1)).double()
    loss_of((call or model)(x), mask).backward()


def train(packed, **settings):
    model = net()
    optimizer = create_fngd_optimizer(model, lr=0.1, damping=0.05, **settings)
    found = []
    for epoch in range(3):
        optimizer.start_epoch(epoch)
        for number in range(2):
            backward(model, optimizer, number, packed)
            found.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
    state = optimizer.method_state()["store"] or {}
    stored = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return found, stored


@pytest.mark.parametrize("route", ["auto", "direct", "hadamard"])
@pytest.mark.parametrize("share", ["sample", "layer", "none"])
def test_same_path_as_with_a_row_for_each_sample(share, route):
    with gram_route(route):
        rows, packed = (train(p, share=share) for p in (False, True))
    for first, second in zip(rows[0], packed[0], strict=True):
        assert_same(first, second, **CLOSE)
    assert_same(rows[1], packed[1], rtol=1e-6, atol=1e-7)


def test_against_a_dense_solve():
    model = net()
    plain = copy.deepcopy(model)
    backward(model, create_fngd_optimizer(model, lr=0.1, damping=0.05), 0, True)
    parts, total = samples(0), sum(LENGTHS[0])

    def share(i):
        return plain(parts[i]).square().sum() / total

    for path in ("first", "twice", "last"):
        parameters = list(plain.get_submodule(path).parameters())
        expected = natural_gradient(sample_gradients(share, parameters, 3), 0.05, relative=True)
        mine = list(model.get_submodule(path).parameters())
        for parameter, wanted in zip(mine, expected, strict=True):
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


def test_compiled():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    found = []
    for packed in (False, True):
        one = copy.deepcopy(model)
        optimizer = create_fngd_optimizer(one, lr=0.0, damping=0.05)
        call = torch.compile(one, backend="aot_eager", fullgraph=True)
        for epoch in range(2):
            optimizer.start_epoch(epoch)
            for number in range(2):
                backward(one, optimizer, number, packed, call)
                found.append(gradients(one))
                optimizer.step()
                optimizer.zero_grad()
    for first, second in zip(found[:4], found[4:], strict=True):
        assert_same(first, second, **CLOSE)


@pytest.mark.parametrize(
    ("ids", "lengths"), [(range(3), [2, 3]), (range(2), [5, 0])], ids=["count", "empty sample"]
)
def test_lengths_that_do_not_fit_the_samples_are_refused(ids, lengths):
    optimizer = create_fngd_optimizer(net(), lr=0.1)
    message = (
        f"{len(ids)} samples and lengths {lengths}: give each sample of a packed row its length"
    )
    with pytest.raises(FNGDError, match=re.escape(message)):
        optimizer.set_batch(ids, lengths)


@pytest.mark.parametrize("share", ["none", "layer"])
def test_layer_that_does_not_see_the_whole_row_is_refused(share):
    model = net()
    optimizer = create_fngd_optimizer(model, lr=0.1, share=share)
    for epoch in range(2):
        optimizer.start_epoch(epoch)
        optimizer.set_batch(None, lengths=[3, 2])
        out = model(torch.randn(1, 4, 4, dtype=torch.float64))
        with pytest.raises(
            FNGDError, match="last sees 4 positions of a packed row of 5: exclude the layer"
        ):
            out.sum().backward()


# ---- in a Trainer --------------------------------------------------------------------------------

PACKINGS = {
    "position_ids": {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]])},
    "cu_seq_lens": {"cu_seq_lens_q": torch.tensor([0, 3, 5, 7])},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2]])},
}


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_samples_of_a_packed_row(packing):
    inputs = {"input_ids": torch.arange(1, 8).unsqueeze(0), **packing}
    assert packed_lengths(inputs) == [3, 2, 2]
    assert unpacked(inputs, [3, 2, 2])["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0]]
    assert packed_lengths({**inputs, "input_ids": torch.ones(2, 7, dtype=torch.long)}) is None
    optimizer = create_preconditioned_optimizer(net(), method="kfac", lr=0.1)
    with pytest.raises(FNGDError, match="packed row .* KFAC cannot tell apart: turn packing or"):
        announce(optimizer, nn.Linear(1, 1), inputs)


def test_one_plain_row_is_not_a_packed_row():
    ids = torch.ones(1, 7, dtype=torch.long)
    assert packed_lengths({"input_ids": ids, "position_ids": torch.arange(7).unsqueeze(0)}) is None
    padded = torch.tensor([[1, 1, 0, 1, 2, 3, 4]])  # as generation numbers a padded row
    assert packed_lengths({"input_ids": ids, "position_ids": padded}) is None
    with pytest.raises(FNGDError, match="cu_seq_lens_q end at 5 and the packed row at 7"):
        packed_lengths({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 3, 5])})
    embedded = {"inputs_embeds": torch.zeros(1, 7, 2), "cu_seq_lens_q": torch.tensor([0, 3, 7])}
    assert packed_lengths(embedded) == [3, 4]


def pad_rows(features):
    """Return the batch of the flattening collator with a row for each sample."""
    tokens = [torch.tensor(feature["input_ids"]) for feature in features]
    pad = nn.utils.rnn.pad_sequence
    labels = pad(tokens, batch_first=True, padding_value=-100)
    labels[:, 0] = -100
    ones = [torch.ones_like(part) for part in tokens]
    return {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad(ones, batch_first=True),
        "labels": labels,
    }


@pytest.mark.feature(
    "Packed or padding-free rows",
    "works",
    "each sample weighs by itself; KFAC, Eva, TENGraD and SENG refuse them",
)
@pytest.mark.parametrize("share", ["sample", "layer"])
@pytest.mark.parametrize("cls", [FNGDTrainer, Trainer], ids=["ours", "stock"])
def test_flattened_batches_train_as_padded_ones(cls, share, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(3, 24, (int(n),), generator=generator).tolist()
        for n in torch.randint(2, 9, (12,), generator=generator)
    ]
    runs = []
    for collator in (pad_rows, DataCollatorWithFlattening()):
        model = tiny_llama()
        model.config.use_cache = False  # with a cache, samples of a row would see each other
        args = TrainingArguments(
            output_dir=str(tmp_path),
            optim="fngd",
            optim_args=f"share={share}",
            learning_rate=0.05,
            num_train_epochs=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        data = datasets.Dataset.from_dict({"input_ids": rows})
        trainer = cls(model=model, args=args, train_dataset=data, data_collator=collator)
        trainer.train()
        last = trainer.state.log_history[-2]
        assert last.get("fngd/reuse_rate", 1.0) == 1.0 and last["fngd/reusing"] == 1.0
        runs.append(weights(model))
    start = weights(tiny_llama())
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.allclose(value, start[name], atol=1e-3) for name, value in runs[0].items())

"""Streams, nested batches, epochs cut short and interrupts: a Trainer trains as with AdamW."""

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import ChainDataset, IterableDataset
from transformers import Trainer, TrainerCallback

from hf_fngd import FNGDConfig, FNGDError, FNGDTrainer
from tests.hf_utils import arguments


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x=None, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def rows():
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(12)]


def options(folder, **changes):
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "optim_args": None}
    return arguments(folder, **settings | changes)


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


@pytest.mark.feature("Training interrupted or ended by an exception", "works", "the model is free")
@pytest.mark.parametrize(
    "optim_args", ["share=layer", "share=sample", "fisher_labels=sampled"], ids=str
)
@pytest.mark.parametrize(
    ("kind", "error"),
    [(Trainer, RuntimeError("CUDA out of memory")), (FNGDTrainer, KeyboardInterrupt)],
)
def test_after_an_interrupt_another_optimizer_gets_plain_gradients(
    kind, optim_args, error, tmp_path
):
    net = Net()
    optim = "kfac" if "fisher" in optim_args else "fngd"
    args = options(tmp_path, optim=optim, optim_args=optim_args)
    trainer = kind(model=net, args=args, train_dataset=rows(), callbacks=[Stop(error)])
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        trainer.train()
    assert type(net.a) is nn.Linear
    assert not net._forward_pre_hooks and not net._forward_hooks
    clean = Net()
    clean.load_state_dict(net.state_dict())
    for one in (net, clean):
        args = options(tmp_path, optim="adamw_torch", learning_rate=1e-2)
        Trainer(model=one, args=args, train_dataset=rows()).train()
    for name, value in net.state_dict().items():
        assert torch.equal(value, clean.state_dict()[name]), name


def test_training_goes_on_after_an_interrupt(tmp_path):
    args = options(tmp_path, optim_args="share=layer")
    trainer = FNGDTrainer(
        model=Net(), args=args, train_dataset=rows(), callbacks=[Stop(KeyboardInterrupt)]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    assert trainer.train().global_step == 6
    assert trainer.state.log_history[-2]["fngd/layers"] == 2.0
    assert type(trainer.model.a) is nn.Linear


class TwoSteps(TrainerCallback):
    def on_epoch_begin(self, *args, **kwargs):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        control.should_epoch_stop = self.steps == 2


def test_epochs_that_end_early_are_counted(tmp_path):
    args = options(tmp_path, num_train_epochs=4, per_device_train_batch_size=2)
    trainer = FNGDTrainer(model=Net(), args=args, train_dataset=rows(), callbacks=[TwoSteps()])
    trainer.train()
    epochs = [entry["fngd/epoch"] for entry in trainer.state.log_history if "fngd/epoch" in entry]
    assert epochs == [0, 0, 1, 1, 2, 2, 3, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


class SizedStream(Stream):
    def __len__(self):
        return 12


@pytest.mark.parametrize(
    "data",
    [
        Stream(),
        SizedStream(),
        ChainDataset([Stream(), Stream()]),
        ChainDataset([SizedStream(), SizedStream()]),
        datasets.Dataset.from_list(rows()).with_format("torch").to_iterable_dataset(),
    ],
    ids=["stream", "sized", "chain", "sized chain", "datasets"],
)
@pytest.mark.parametrize("kind", [Trainer, FNGDTrainer])
def test_streams_with_and_without_a_length_train(kind, data, tmp_path):
    args = options(tmp_path, optim_args="share=layer", max_steps=4)
    assert kind(model=Net(), args=args, train_dataset=data).train().global_step == 4
    args = options(tmp_path, optim_args="share=sample", max_steps=4)
    with pytest.raises(FNGDError, match="needs a data set with a length .* share=layer"):
        kind(model=Net(), args=args, train_dataset=data).train()


def test_two_optimizers_are_refused(tmp_path):
    net = Net()
    with pytest.raises(FNGDError, match="has an optimizer already .* give one of them"):
        FNGDTrainer(
            model=net,
            args=options(tmp_path, optim="adamw_torch"),
            train_dataset=rows(),
            fngd_config=FNGDConfig(),
            optimizers=(torch.optim.AdamW(net.parameters()), None),
        )


class Nested(Net):
    def forward(self, feats=None, target=None):
        return super().forward(feats["x"], target["y"])


def nest(features):
    return {
        "feats": {"x": torch.stack([one["x"] for one in features])},
        "target": {"y": torch.tensor([one["labels"] for one in features])},
    }


@pytest.mark.feature("Batches that are nested, lists or tuples", "works")
@pytest.mark.parametrize("kind", [Trainer, FNGDTrainer])
def test_nested_batches_train(kind, tmp_path):
    args = options(tmp_path, optim_args="share=sample", remove_unused_columns=False)
    trainer = kind(model=Nested(), args=args, train_dataset=rows(), data_collator=nest)
    assert trainer.train().global_step == 6
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0


class Tensors(Net):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("kind", [Trainer, FNGDTrainer])
def test_batches_that_are_lists_train(kind, as_tuple, tmp_path):
    class Own(kind):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return nn.functional.cross_entropy(model(inputs[0]), inputs[1])

    def collate(features):
        batch = torch.utils.data.default_collate(features)
        return tuple(batch) if as_tuple else batch

    data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.arange(12) % 3)
    args = options(tmp_path, optim_args="share=sample")
    trainer = Own(model=Tensors(), args=args, train_dataset=data, data_collator=collate)
    assert trainer.train().global_step == 6
    assert trainer.state.log_history[-2]["fngd/reuse_rate"] == 1.0

"""A case that cannot work is refused in one sentence that says what to do."""

import datasets
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Seq2SeqTrainer

from hf_fngd import FNGD, KFAC, FNGDConfig, FNGDError, FNGDSeq2SeqTrainer
from hf_fngd.hf import callback
from tests.hf_utils import arguments, make_trainer, token_pairs

BOTH = pytest.mark.parametrize("cls", [FNGDSeq2SeqTrainer, Seq2SeqTrainer], ids=["ours", "stock"])


class Plugin:
    def __init__(self, version):
        self.fsdp_version = version


@pytest.fixture
def launch(monkeypatch):
    """Pretend a launch in accelerate's shared state."""

    def pretend(kind, plugin=None):
        shared = {"distributed_type": kind, "fsdp_plugin": plugin}
        monkeypatch.setattr(callback.AcceleratorState, "_shared_state", shared)

    return pretend


@pytest.mark.feature("`torch.nn.DataParallel`", "refused", "start with torchrun")
@BOTH
def test_data_parallel(cls, tmp_path):
    args = arguments(tmp_path)
    trainer = make_trainer(cls, args)
    args._n_gpu = 2
    with pytest.raises(FNGDError, match="DataParallel: start with torchrun"):
        trainer.create_optimizer()


@pytest.mark.feature("DeepSpeed", "refused", "use DDP")
def test_deepspeed(launch, tmp_path):
    args = arguments(tmp_path)
    launch(DistributedType.DEEPSPEED)
    with pytest.raises(FNGDError, match=r"DeepSpeed.*use DDP \(torchrun\) or FSDP2"):
        callback.refuse_unsupported(args, FNGD)
    with pytest.raises(FNGDError, match=r"KFAC.*DeepSpeed.*use DDP \(torchrun\)$"):
        callback.refuse_unsupported(args, KFAC)


def test_deepspeed_by_argument(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(FNGDError, match="DeepSpeed.*use DDP"):
        callback.refuse_unsupported(args, FNGD)


@pytest.mark.feature("FSDP1", "refused", "use `fsdp_version: 2`")
def test_fsdp1_is_refused_and_fsdp2_is_not(launch, tmp_path):
    args = arguments(tmp_path)
    launch(DistributedType.FSDP, Plugin(1))
    with pytest.raises(FNGDError, match="FSDP1.*fsdp_version: 2"):
        callback.refuse_unsupported(args, FNGD)
    launch(DistributedType.FSDP, Plugin(2))
    callback.refuse_unsupported(args, FNGD)
    with pytest.raises(FNGDError, match="KFAC does not work with FSDP.*use DDP"):
        callback.refuse_unsupported(args, KFAC)


@pytest.mark.feature(
    "IterableDataset with `share=sample`", "refused", "use `share=layer` or `none`"
)
@BOTH
def test_dataset_without_length(cls, tmp_path):
    stream = token_pairs(16).to_iterable_dataset()
    assert isinstance(stream, datasets.IterableDataset)
    args = arguments(tmp_path, max_steps=4)
    trainer = make_trainer(cls, args, train_dataset=stream)
    with pytest.raises(FNGDError, match="needs a data set with a length.*set share=layer"):
        trainer.train()


@pytest.mark.feature("IterableDataset with `share=layer` or `none`", "works")
@BOTH
@pytest.mark.parametrize("share", ["layer", "none"])
def test_dataset_without_length_works_where_no_rows_are_needed(cls, share, tmp_path):
    stream = token_pairs(16).to_iterable_dataset()
    args = arguments(tmp_path, max_steps=6, optim_args=f"update_scale=rms,share={share}")
    trainer = make_trainer(cls, args, train_dataset=stream)
    trainer.train()
    phases = [e["fngd/reusing"] for e in trainer.state.log_history if "fngd/reusing" in e]
    # two steps an epoch
    assert phases == ([0.0] * 2 + [1.0] * 4 if share == "layer" else [0.0] * 6)


def layer():
    return torch.nn.Sequential(torch.nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda o: o.set_batch(["a", "b"]),
            "sample_ids must be whole numbers of 64 bits.*give the",
        ),
        (
            lambda o: o.set_batch([2**70, 1]),
            "sample_ids must be whole numbers of 64 bits.*give the",
        ),
        (lambda o: o.set_batch(torch.tensor([1.0, 2.5])), r"64 bits.*\(not 2.5\)"),
        (lambda o: o.start_epoch(-1), "epochs are counted from 0, there is no epoch -1"),
        (lambda o: o.load_state_dict({"fngd": 3}), "is not FNGD's: resume with the optimizer that"),
        (lambda o: o.load_state_dict({}), "is not FNGD's: resume with the optimizer that wrote it"),
        (lambda o: FNGD(layer().parameters(), -1, module=layer()), "lr must be a finite number at"),
        (lambda o: FNGD([], module=layer(), config=3), "FNGD takes config=FNGDConfig.*not a int"),
        (
            lambda o: FNGD([], module=torch.nn.ReLU()),
            r"none can be chosen \(the model has no parameters\)",
        ),
        (lambda o: FNGDConfig(target_modules=3), "target_modules=3: give names of layers, or one"),
        (lambda o: FNGDConfig(momentum=None), "momentum must be a finite number at least 0"),
        (
            lambda o: FNGD([], module=layer(), exclude_modules="("),
            r"exclude_modules: '\(' is not a regular expression .*: give one, or names of layers",
        ),
    ],
)
def test_plain_loop(function, message):
    model = layer()
    with pytest.raises(FNGDError, match=message):
        function(FNGD(model.parameters(), module=model))


@pytest.mark.parametrize("missing", ["store", "epoch", "data"])
def test_state_without_a_part(missing):
    model = layer()
    optimizer = FNGD(model.parameters(), module=model)
    state = optimizer.state_dict()
    del state["fngd"][missing]
    with pytest.raises(
        FNGDError, match=f"has no '{missing}'.*: resume with that version, or start"
    ):
        optimizer.load_state_dict(state)


def test_wrong_number_of_samples_is_told_once(caplog):
    model = layer()
    optimizer = FNGD(model.parameters(), module=model)
    for _ in range(2):
        optimizer.set_batch(range(3))
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
    assert caplog.text.count("all layers have the plain gradient") == 1
    assert "announce as many samples as the batch has rows" in caplog.text


@BOTH
def test_layer_whose_first_dimension_is_not_the_batch(cls, tmp_path, caplog):
    from tests.hf_utils import tiny_marian

    class Folding(torch.nn.Module):
        """A feed-forward block that folds positions into the batch, as expert layers do."""

        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.inner(x.reshape(-1, 16)).view_as(x)

    model = tiny_marian()
    layer = model.model.encoder.layers[0]
    layer.activation_fn = torch.nn.Identity()
    layer.fc1 = torch.nn.Sequential(Folding(), layer.fc1)
    trainer = make_trainer(cls, arguments(tmp_path, num_train_epochs=2), model=model)
    trainer.train()
    assert caplog.text.count("is not the batch 8") == 1
    assert "encoder.layers.0.fc1.0.inner" in caplog.text
    assert trainer.state.log_history[-2]["fngd/layers_dropped"] == 1.0

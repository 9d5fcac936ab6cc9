"""A run with `AveragingCallback` ends with torch's own averages of its weights."""

import logging
import random
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerState

from hf_fngd import AveragingCallback, FNGDError, FNGDSeq2SeqTrainer, FNGDTrainer
from tests.helpers import tiny_resnet
from tests.hf.test_resume import StopAfter
from tests.hf_utils import arguments, make_trainer, same, tiny_marian, token_pairs, weights

STEPS = 12


class Reference(TrainerCallback):
    """Average by torch's AveragedModel, as a loop would."""

    def __init__(self, start, every, decay):
        self.start, self.every, self.decay = start, every, decay
        self.averaged = self.last = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        since = state.global_step - int(self.start * state.max_steps)
        if since > 0 and since % self.every == 0:
            if self.averaged is None:
                update = get_ema_multi_avg_fn(self.decay) if self.decay else None
                self.averaged = AveragedModel(model, multi_avg_fn=update)
            self.averaged.update_parameters(model)
        self.last = weights(model)


def run(folder, *callbacks, cls=Seq2SeqTrainer, resume=None, optim="adamw_torch", **changes):
    changes = {"optim": optim, "optim_args": None, "seed": 3, **changes}
    model = changes.pop("model", None)
    options = {"model": model, "eval_dataset": changes.pop("eval_dataset", None)}
    trainer = make_trainer(cls, arguments(folder, **changes), callbacks=list(callbacks), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.feature("Average of the weights", "works", "torch's bits, uniform or exponential")
@pytest.mark.parametrize("start", [0.0, 0.4])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("decay", [None, 0.8])
def test_average_is_torchs(start, every, decay, tmp_path):
    reference = Reference(start, every, decay)
    averaging = AveragingCallback(start, every, decay)
    trainer = run(tmp_path, reference, averaging)
    expected = weights(reference.averaged.module)
    found = weights(trainer.model)
    assert averaging.replaced and averaging.count == int(reference.averaged.n_averaged)
    assert same(expected, found) and not same(found, reference.last)
    # The last weights are still there.
    averaging.swap(trainer.model)
    assert same(weights(trainer.model), reference.last) and not averaging.replaced
    averaging.swap(trainer.model)
    assert same(weights(trainer.model), found)


def test_training_is_the_same_with_and_without(tmp_path):
    averaging = AveragingCallback(0.5)
    trainer = run(tmp_path / "with", averaging)
    averaging.swap(trainer.model)
    assert same(weights(trainer.model), weights(run(tmp_path / "without").model))


@pytest.mark.parametrize("optim", ["fngd", "muon_soap", "sgd"])
def test_any_optimizer(optim, tmp_path):
    kind = Seq2SeqTrainer if optim == "sgd" else FNGDSeq2SeqTrainer
    reference = Reference(0.5, 1, None)
    trainer = run(tmp_path, reference, AveragingCallback(0.5), cls=kind, optim=optim)
    assert same(weights(trainer.model), weights(reference.averaged.module))


def test_last_evaluation_and_save_have_the_average(tmp_path):
    averaging = AveragingCallback(0.5)
    strategies = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = run(tmp_path, averaging, eval_dataset=token_pairs(8, 1), **strategies)
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert losses[-1] == trainer.evaluate()["eval_loss"]
    saved = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert same(weights(saved), weights(trainer.model))
    averaging.swap(trainer.model)
    assert losses[-1] != trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("decay", [None, pytest.param(0.7, marks=pytest.mark.slow)])
def test_resumed_run_ends_with_the_same_average(decay, tmp_path):
    whole = run(tmp_path / "whole", AveragingCallback(0.3, 2, decay))
    # before averaging, before its second point, within it
    for stop in (2, 6, 9):
        folder = tmp_path / f"cut{stop}"
        run(folder, AveragingCallback(0.3, 2, decay), StopAfter(stop))
        again = run(
            folder, AveragingCallback(0.3, 2, decay), resume=str(folder / f"checkpoint-{stop}")
        )
        assert again.state.global_step == STEPS
        assert same(weights(whole.model), weights(again.model)), f"stopped after step {stop}"


def test_stopped_run_ends_with_the_average_and_can_go_on(tmp_path):
    reference = Reference(0.3, 1, None)
    trainer = run(tmp_path, reference, AveragingCallback(0.3), StopAfter(7))
    assert same(weights(trainer.model), weights(reference.averaged.module))
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-7")
    assert same(weights(saved), reference.last)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters(tmp_path):
    model = get_peft_model(tiny_marian(), LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    reference = Reference(0.5, 1, None)
    averaging = AveragingCallback(0.5)
    trainer = run(tmp_path, reference, averaging, model=model, label_names=["labels"])
    assert same(weights(trainer.model), weights(reference.averaged.module))
    assert all(torch.equal(p, dict(trainer.model.named_parameters())[n]) for n, p in base.items())


def test_bf16_weights_are_averaged_in_float32(tmp_path):
    points = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            points.append(weights(model))

    trainer = run(tmp_path, Keep(), AveragingCallback(0.5), model=tiny_marian().bfloat16())
    for name, weight in weights(trainer.model).items():
        if trainer.model.get_parameter(name).requires_grad:
            mean = torch.stack([one[name].double() for one in points[6:]]).mean(0)
            torch.testing.assert_close(weight.double(), mean, rtol=5e-3, atol=1e-6)
            assert weight.dtype == torch.bfloat16


class Images(torch.utils.data.Dataset):
    def __init__(self, rows=24):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 3, 16, 16, generator=generator)
        self.y = torch.randint(0, 3, (rows,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


@pytest.mark.parametrize("optim", ["adamw_torch", "fngd"])
def test_statistics_of_batch_norm_belong_to_the_average(optim, tmp_path):
    torch.manual_seed(0)
    args = arguments(tmp_path, optim=optim, optim_args=None)
    data, averaging = Images(), AveragingCallback(0.5)
    kind = FNGDTrainer if optim == "fngd" else Trainer
    trainer = kind(tiny_resnet(), args, train_dataset=data, callbacks=[averaging])
    trainer.train()
    model = trainer.model
    found = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert found
    expected = tiny_resnet()
    expected.load_state_dict(model.state_dict())
    loader = [data.x[i : i + 8] for i in range(0, 24, 8)]
    update_bn(loader, expected)
    for name, one in expected.named_buffers():
        if "running_mean" in name:
            # Other batches of the same images: their means have the same mean.
            torch.testing.assert_close(found[name], one, rtol=0.2, atol=0.05)
    averaging.swap(model)
    before = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert any(not torch.equal(found[n], before[n]) for n in found)
    averaging.swap(model)
    assert all(torch.equal(found[n], dict(model.named_buffers())[n]) for n in found)


def test_average_that_is_not_finite_leaves_the_model_alone(tmp_path, caplog):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weight = model.model.encoder.layers[0].fc1.weight
            if state.global_step == 8:
                self.kept = weight.detach().clone()
                weight.data.fill_(float("nan"))

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 8:
                model.model.encoder.layers[0].fc1.weight.data.copy_(self.kept)

    averaging = AveragingCallback(0.5)
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, Break(), averaging)
    assert "not finite: the model keeps the last ones" in caplog.text
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert not averaging.replaced


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 1.0}, "start must be a finite number at least 0 and below 1, not 1.0"),
        ({"start": -0.1}, "start must be"),
        ({"start": "half"}, "start must be"),
        ({"every": 0}, "every must be a whole number at least 1"),
        ({"every": 1.5}, "every must be a whole number"),
        ({"decay": 1.0}, "decay must be a finite number above 0 and below 1"),
        ({"decay": 0}, "decay must be"),
        ({"decay": float("nan")}, "decay must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(FNGDError, match=message):
        AveragingCallback(**settings)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_divided_weights_are_refused(kind, tmp_path):
    args = arguments(tmp_path)
    with (
        mock.patch.dict(AcceleratorState._shared_state, {"distributed_type": kind}),
        pytest.raises(FNGDError, match=r"FSDP and DeepSpeed divide: use DDP \(torchrun\)"),
    ):
        AveragingCallback().on_train_begin(args, TrainerState(), None, model=tiny_marian())


@pytest.mark.parametrize("seed", range(20))
def test_average_has_a_point_or_is_refused(seed, tmp_path):
    draw = random.Random(seed)
    steps, every = draw.randint(1, 12), draw.randint(1, 12)
    start = draw.choice([0.0, draw.random(), 0.99])
    model, averaging = nn.Linear(1, 1), AveragingCallback(start, every)
    args, state = arguments(tmp_path), TrainerState(max_steps=steps)
    points = [step for step in range(1, steps + 1) if step > int(start * steps)][every - 1 :: every]
    if not points:
        with pytest.raises(FNGDError, match="the average has no point: .* lower every"):
            averaging.on_train_begin(args, state, None, model=model)
        return
    averaging.on_train_begin(args, state, None, model=model)
    for state.global_step in range(1, steps + 1):
        averaging.on_step_end(args, state, None, model=model)
    assert averaging.replaced
    assert averaging.count == len(points)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(FNGDError, match="load_best_model_at_end replaces the average"):
        run(
            tmp_path / "best",
            AveragingCallback(),
            eval_dataset=token_pairs(8, 1),
            load_best_model_at_end=True,
            eval_strategy="epoch",
            save_strategy="epoch",
        )
    run(tmp_path / "cut", StopAfter(9))
    with pytest.raises(FNGDError, match=r"there is no averaging.pt in .*checkpoint-9"):
        run(tmp_path / "cut", AveragingCallback(), resume=str(tmp_path / "cut/checkpoint-9"))
    run(tmp_path / "other", AveragingCallback(0.5), StopAfter(9))
    with pytest.raises(FNGDError, match="resume with the same settings"):
        run(tmp_path / "other", AveragingCallback(0.6), resume=str(tmp_path / "other/checkpoint-9"))

    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 8:
                model.model.encoder.layers[0].fc1.weight.requires_grad_(False)

    with pytest.raises(FNGDError, match="other parameters train than when averaging began"):
        run(tmp_path / "freeze", AveragingCallback(0.5), Freeze())

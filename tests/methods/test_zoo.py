"""Architectures of transformers: right layers, exact natural gradient in each, every row reused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGDTrainer, create_fngd_optimizer
from tests.helpers import natural_gradient, sample_gradients
from tests.methods.zoo import ZOO


def share(model: nn.Module, rows: dict[str, Tensor], part: slice) -> Tensor:
    """Return the part of some samples in the mean loss of all."""
    labels = rows["labels"]
    some = {name: value[part] for name, value in rows.items()}
    if labels.dim() > 1 and not model.config.is_encoder_decoder:
        labels = labels[:, 1:].contiguous()
        logits = model(**some).logits[:, :-1]
    else:
        logits = model(**some).logits
    loss = nn.functional.cross_entropy(
        logits.flatten(0, -2), labels[part].flatten(), reduction="sum"
    )
    return loss / (labels != -100).sum()


def expected_layers(name: str, model: nn.Module) -> set[str]:
    never = re.compile(ZOO[name].left_out)
    return {
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d, Conv1D) and not never.fullmatch(path)
    }


@pytest.mark.feature(
    "Marian, BART, mBART, M2M100, NLLB-MoE, T5, GPT-2, Llama, BERT, ViT, ConvNeXt, ResNet, "
    "Swin, Whisper",
    "works",
    "experts, and attention in several windows, are left out",
)
@pytest.mark.parametrize("name", ZOO)
def test_every_selected_layer_has_its_natural_gradient(name: str) -> None:
    model = ZOO[name].build().double().eval()
    rows = {k: v.double() if v.is_floating_point() else v for k, v in ZOO[name].rows().items()}
    count = len(rows["labels"])
    plain = copy.deepcopy(model)
    wanted = expected_layers(name, model)
    optimizer = create_fngd_optimizer(model, lr=1.0, damping=0.1, share="none", momentum=0.0)
    assert set(optimizer.selection.chosen) == wanted and len(wanted) >= 4
    optimizer.set_batch(range(count))
    share(model, rows, slice(None)).backward()
    odd = {path for path in wanted if re.fullmatch(ZOO[name].odd, path)}
    optimizer.batches.close()
    assert optimizer.batches.left_out == odd
    share(plain, rows, slice(None)).backward()
    for path in wanted - odd:
        layer = plain.get_submodule(path)
        parameters = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
        u = sample_gradients(lambda i: share(plain, rows, slice(i, i + 1)), parameters, count)
        attached = model.get_submodule(path)
        found = [attached.weight.grad] + ([attached.bias.grad] if layer.bias is not None else [])
        for first, second in zip(found, natural_gradient(u, 0.1, relative=True), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11, msg=path)
    for path, parameter in plain.named_parameters():
        if path.rpartition(".")[0] not in wanted - odd and parameter.grad is not None:
            torch.testing.assert_close(
                model.get_parameter(path).grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=path
            )


@pytest.mark.parametrize("name", ZOO)
def test_two_epochs_in_the_trainer(name: str, tmp_path) -> None:
    model, rows = ZOO[name].build(), ZOO[name].rows()
    trainer = FNGDTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            optim="fngd",
            optim_args="update_scale=rms",
            learning_rate=3e-3,
            num_train_epochs=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{k: v[i] for k, v in rows.items()} for i in range(len(rows["labels"]))],
        data_collator=default_data_collator,
    )
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["fngd/reusing"] for entry in history] == [0, 0, 1, 1]
    assert [entry["fngd/reuse_rate"] for entry in history[2:]] == [1.0, 1.0]
    assert all(entry["fngd/nonfinite"] == 0 for entry in history)
    for path in expected_layers(name, model):
        weight = model.get_parameter(f"{path}.weight")
        assert weight.isfinite().all() and not torch.equal(weight, before[f"{path}.weight"]), path

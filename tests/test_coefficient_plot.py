"""The picture of what the store holds: groups of layers, numbers by group, and the reuse rate."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from hf_fngd import FNGDSeq2SeqTrainer
from hf_fngd.hf.callback import unwrap_fngd
from hf_fngd.report.plots import kept_coefficients, layer_groups, plot_coefficients, summary
from hf_fngd.selection import select_layers
from tests import helpers
from tests.hf_utils import arguments, make_trainer


def groups(model):
    return layer_groups(list(select_layers(model).chosen))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            helpers.tiny_marian,
            {"encoder.layers.self_attn", "encoder.layers.fc1", "encoder.layers.fc2",
             "decoder.layers.self_attn", "decoder.layers.encoder_attn", "decoder.layers.fc1",
             "decoder.layers.fc2"},
        ),
        (helpers.tiny_gpt2, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        (lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), {"0", "1"}),
        (lambda: torch.nn.Linear(2, 2), {""}),
    ],
    ids=["marian", "gpt2", "sequential", "one layer"],
)  # fmt: skip
def test_layers_of_one_role_are_one_group(model, expected):
    found = groups(model())
    assert found.keys() == expected
    count = len(select_layers(model()).chosen)
    assert sorted(number for layers in found.values() for number in layers) == list(range(count))


def test_layers_of_one_name_are_told_apart_by_their_numbers():
    names = [f"net.stages.{i}.blocks.{j}.conv" for i in range(4) for j in range(3)]
    found = layer_groups(names)
    assert found.keys() == {"0", "1", "2", "3"}
    assert found["1"] == [3, 4, 5]
    assert layer_groups([]) == {}


@pytest.fixture
def drawn(monkeypatch):
    """Keeps figures open, to look at what is on them."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


@pytest.mark.parametrize("share", ["sample", "layer", "position", "none"])
def test_picture_after_a_training(share, tmp_path, drawn):
    args = arguments(tmp_path, optim_args=f"update_scale=rms,share={share}")
    trainer = make_trainer(FNGDSeq2SeqTrainer, args)
    trainer.train()
    optimizer = unwrap_fngd(trainer.optimizer)
    kept = kept_coefficients(optimizer)
    if share == "none":
        assert kept == {}
        return
    state = optimizer.coefficients
    keys = {"sample": 30, "layer": 1, "position": 8}[share]
    assert sum(gamma.size for gamma in kept.values()) == keys * len(state.names)
    numbers = summary(kept)["decoder.layers.encoder_attn"]
    layers = [i for i, name in enumerate(state.names) if "encoder_attn" in name]
    values = state.store.values()[:, layers]
    assert values.shape == (keys, 4) and values.std() > 0
    assert numbers == pytest.approx(
        {"count": values.numel(), "mean": values.mean().item(), "min": values.min().item(),
         "max": values.max().item(), "median": np.median(values.numpy())}
    )  # fmt: skip
    plot_coefficients(tmp_path / "c.png", kept, trainer.state.log_history)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    left, *right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(kept)
    if share == "sample":
        # Two of the three epochs look coefficients up.
        assert right[0].lines[0].get_xydata().tolist() == [[step, 1.0] for step in range(5, 13)]
    else:
        assert not right


def test_what_was_never_stored_is_not_drawn(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, max_steps=2))
    trainer.train()
    kept = kept_coefficients(unwrap_fngd(trainer.optimizer))
    # Two batches of eight rows, of thirty.
    layers = sum(map(len, layer_groups(unwrap_fngd(trainer.optimizer).coefficients.names).values()))
    assert sum(gamma.size for gamma in kept.values()) == 16 * layers


def test_equal_coefficients_and_no_training_log_can_be_drawn(tmp_path):
    plot_coefficients(tmp_path / "c.png", {"": np.ones(5, dtype=np.float32)}, [{"step": 1}])
    assert (tmp_path / "c.png").stat().st_size > 0

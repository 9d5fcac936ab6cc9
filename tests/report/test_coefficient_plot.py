"""The picture of the stored coefficients, by group of layers, and the other pictures of a run."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_fngd import FNGDSeq2SeqTrainer
from hf_fngd.hf.callback import unwrap_optimizer
from hf_fngd.layers.selection import select_layers
from hf_fngd.report import plots
from hf_fngd.report.plots import kept_coefficients, layer_groups, plot_coefficients, summary
from tests import helpers
from tests.hf.test_runner import ROOT
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
    """The figures that are saved."""
    figures, save = [], plots._save

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


@pytest.mark.parametrize("share", ["sample", "layer", "none"])
def test_picture_after_a_training(share, tmp_path, drawn):
    args = arguments(tmp_path, optim_args=f"update_scale=rms,share={share}")
    trainer = make_trainer(FNGDSeq2SeqTrainer, args)
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    kept = kept_coefficients(optimizer)
    if share == "none":
        assert kept == {}
        return
    names, stored = optimizer.layer_names, optimizer.coefficients()
    keys = {"sample": 30, "layer": 1}[share]
    assert sum(gamma.size for gamma in kept.values()) == keys * len(names)
    numbers = summary(kept)["decoder.layers.encoder_attn"]
    values = stored[:, [i for i, name in enumerate(names) if "encoder_attn" in name]]
    assert values.shape == (keys, 4) and values.std() > 0
    assert numbers == pytest.approx(
        {"count": values.numel(), "mean": values.mean().item(), "min": values.min().item(),
         "max": values.max().item(), "median": np.median(values.numpy())}
    )  # fmt: skip
    plot_coefficients(tmp_path / "c.png", kept, trainer.state.log_history)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(kept)
    assert axes.get_title() == ("100% of samples found a stored γ" if share == "sample" else "")


def test_reuse_rate_that_varies_has_a_panel(tmp_path, drawn):
    rates = [{"step": 5, "fngd/reuse_rate": 0.5}, {"step": 10, "fngd/reuse_rate": 0.75}]
    plot_coefficients(tmp_path / "c.png", {"fc1": np.arange(5.0)}, rates)
    left, right = drawn[0].axes
    assert right.lines[0].get_xydata().tolist() == [[5.0, 0.5], [10.0, 0.75]]
    assert left.get_title() == "" and "share of the epoch's samples" in right.get_ylabel()


def test_what_was_never_stored_is_not_drawn(tmp_path):
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(tmp_path, max_steps=2))
    trainer.train()
    kept = kept_coefficients(unwrap_optimizer(trainer.optimizer))
    # Two batches of eight rows, of thirty.
    chosen = unwrap_optimizer(trainer.optimizer).selection.chosen
    assert sum(gamma.size for gamma in kept.values()) == 16 * len(chosen)


def test_equal_coefficients_and_no_training_log_can_be_drawn(tmp_path):
    plot_coefficients(tmp_path / "c.png", {"": np.ones(5, dtype=np.float32)}, [{"step": 1}])
    assert (tmp_path / "c.png").stat().st_size > 0


DRAW = """
import sys
import matplotlib
matplotlib.use("pdf")
from pathlib import Path
import numpy as np
from hf_fngd.report import plots
history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5, "eval_meteor": 0.5}]
run = {"history": history, "seconds_per_step": 1.0}
folder = Path(sys.argv[1])
plots.plot_history(folder / "a.png", history, "title", "meteor", "loss")
plots.plot(folder / "b.png", {"run": [run]}, "eval_loss")
plots.plot_coefficients(folder / "c.png", {"": np.ones(3)}, [])
assert matplotlib.get_backend() == "pdf" and "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.slow
def test_drawing_leaves_the_backend_of_a_notebook_alone(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    heads = [path.read_bytes()[:4] for path in sorted(tmp_path.iterdir())]
    assert heads == [b"\x89PNG"] * 3


def test_curves_of_a_metric_that_has_no_name_of_its_own(tmp_path, drawn):
    history = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5, "eval_meteor": 0.5}]
    plots.plot_history(tmp_path / "a.png", history, "title", "meteor", "loss a token")
    left, right = drawn[0].axes
    assert [line.get_label() for line in left.lines] == ["training loss", "validation loss"]
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss a token", "meteor")

"""`python -m hf_fngd explain`: layers, positions and costs from a config alone."""

import json
import re

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, TrainingArguments

from hf_fngd import FNGDConfig, FNGDError, create_fngd_optimizer
from hf_fngd.hf.registry import config_from_args
from hf_fngd.layers.selection import select_layers
from hf_fngd.report.explain import count_positions, layer_cost, load_model, main
from hf_fngd.solve import gram
from tests.helpers import tiny_gpt2, tiny_llama, tiny_resnet, tiny_vit
from tests.hf.test_runner import run
from tests.hf_utils import tiny_marian

MODELS = [tiny_marian, tiny_gpt2, tiny_llama, tiny_vit, tiny_resnet]


def config_of(model, folder):
    """A folder with the config and no weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("make", MODELS)
def test_layers_are_those_of_the_loaded_model(make, tmp_path):
    model = make()
    bare = load_model(config_of(model, tmp_path))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert select_layers(bare).rows() == select_layers(model).rows()


def test_tied_head_is_seen_without_weights(tmp_path):
    bare = load_model(config_of(tiny_llama(tied=True), tmp_path))
    assert "tied to" in select_layers(bare).left_out["lm_head"][1]


@pytest.mark.parametrize("make", MODELS)
def test_positions_are_those_of_a_real_batch(make, tmp_path):
    """What the optimizer's own Gram matrices are computed from in a step."""
    model = make()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    optimizer.detach()
    seen = {}
    for path, (module, adapter) in optimizer.selection.chosen.items():
        module.register_forward_hook(
            lambda m, x, out, path=path, adapter=adapter: seen.update(
                {path: adapter.canonical(adapter.prepare(x[0]), out)[0].shape[2]}
            )
        )
    tokens = torch.ones(3, 7, dtype=torch.long)
    if make in (tiny_vit, tiny_resnet):
        model(pixel_values=torch.zeros(3, 3, 8, 8))
    else:
        model(input_ids=tokens, **{"labels": tokens} if make is tiny_marian else {})
    bare = load_model(config_of(model, tmp_path))
    found, failure = count_positions(bare, select_layers(bare), 3, 7, 8)
    assert failure == "" and found == seen


def test_costs_follow_the_rule_of_the_gram_matrices(tmp_path):
    bare = load_model(config_of(tiny_resnet(), tmp_path))
    selection = select_layers(bare)
    path = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    cost = layer_cost(selection, path, batch=5, positions=16)
    d_in, d_out = 4 * 9, 4
    assert cost.training == 3 * 5 * 16 * d_in * d_out
    assert cost.route == gram.choose_route(5, 16, d_in, d_out) == "direct"
    assert cost.gram == d_in * d_out * (5 * 16 + 3 * 3 + 2 * 5)
    few = layer_cost(selection, path, batch=5, positions=1)
    assert few.route == "hadamard" and few.gram == (3 * 3 + 2 * 5) * (d_in + d_out)
    assert layer_cost(selection, path, batch=5, positions=0).gram == 0


def test_table_totals_and_settings(tmp_path, capsys):
    folder = config_of(tiny_marian(), tmp_path)
    main([folder, "--batch_size", "4", "--length", "5", "--rows", "262144"])
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "decoder.layers.0.encoder_attn.k_proj" in line]
    assert row.split()[1:7] == ["Linear", "16x16", "chosen", "1.00", "5", "direct"]
    assert re.search(r"lm_head +Linear +left out: vocabulary head, tied to", out)
    assert "16 layers chosen, 11 left out." in out
    assert "262144 rows need 16.0 MiB of main memory (8.0 MiB with store_dtype=float16)" in out
    assert "pass without weights failed" not in out
    # Every layer is direct: d_in·d_out·(N·T + ¾N²) against 3·N·T·d_in·d_out.
    assert f"the Gram matrices need {(4 * 5 + 12) / (3 * 4 * 5):.2f} times" in out
    assert settings(out).to_dict() == FNGDConfig().to_dict()


def settings(out):
    name, text = re.search(r'--optim (\w+) --optim_args "(.*)"', out).groups()
    return config_from_args(TrainingArguments("unused", optim=name, optim_args=text, use_cpu=True))


def test_big_store_is_halved_and_layers_are_repeated(tmp_path, capsys):
    folder = config_of(tiny_marian(), tmp_path)
    main([folder, "--rows", "20000000", "--target_modules", "fc1|fc2"])
    out = capsys.readouterr().out
    assert "4 layers chosen" in out and "left out: not in target_modules" in out
    config = settings(out)
    assert config.store_dtype == "float32", "4 layers: 305 MiB"
    assert config.target_modules == ["fc1", "fc2"]
    main([folder, "--rows", "20000000"])
    assert settings(capsys.readouterr().out).store_dtype == "float16"


def test_other_methods_have_no_gram_matrices_to_count(tmp_path, capsys):
    folder = config_of(tiny_resnet(), tmp_path)
    main([folder, "--method", "kfac"])
    out = capsys.readouterr().out
    assert "7 layers chosen" in out and "Gram" not in out and settings(out).title == "KFAC"


def test_model_that_needs_values_is_assumed_to_see_the_whole_length(tmp_path):
    bare = load_model(config_of(tiny_vit(), tmp_path))
    bare.main_input_name = "input_values"
    found, failure = count_positions(bare, select_layers(bare), 2, 9, None)
    assert failure == "its input is input_values" and set(found.values()) == {9}


def test_layer_whose_rows_are_no_samples_is_left_alone():
    class Windows(torch.nn.Module):
        main_input_name = "pixel_values"

        def __init__(self):
            super().__init__()
            self.config = tiny_vit().config
            self.inner, self.unused = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
            self.twice = torch.nn.Linear(4, 4)

        def forward(self, pixel_values):
            windows = self.inner(pixel_values.flatten(0, 1))
            rows = windows.view(len(pixel_values), -1, 4)
            return self.twice(self.twice(rows))

    with torch.device("meta"):
        model = Windows()
    found, failure = count_positions(model, select_layers(model), 2, 9, 8)
    assert failure == "" and found == {"inner": 0, "unused": 0, "twice": 2 * 24}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/folder"], "cannot read the config of 'no/such/folder'"),
        (["someone/nothing"], "cannot read the config of 'someone/nothing'"),
        (["{folder}", "--target_modules", "nothing"], "no layer matches target_modules"),
        (["{folder}", "--method", "tengard"], "--method: 'tengard' is unknown: did you mean 'ten"),
        (["{folder}", "--method", "plain"], "--method: 'plain' is unknown: choose from fngd, kf"),
    ],
)
def test_errors_are_those_of_a_command_line(words, message, tmp_path, capsys):
    config_of(tiny_vit(), tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([word.format(folder=tmp_path) for word in words])
    usage, last = capsys.readouterr().err.rstrip("\n").rsplit("\n", 1)
    assert caught.value.code == 2 and usage.startswith("usage: python -m hf_fngd explain")
    assert last.startswith(f"python -m hf_fngd explain: error: {message}")


def test_config_with_code_of_its_own_is_refused(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(FNGDError, match="cannot read the config"):
        load_model(str(tmp_path))


def test_architecture_that_is_no_model_is_not_called(tmp_path):
    config = tiny_vit().config
    config.architectures = ["logging"]
    config.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))).__name__ == "ViTModel"


@pytest.mark.slow
def test_command_and_a_script_of_the_same_name(tmp_path):
    out = run("explain", "someone/nothing", cwd=tmp_path)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert "error: cannot read the config" in out.stderr.splitlines()[-1]
    (tmp_path / "explain").write_text("print('the script')\n")
    assert "the script" not in run("explain", "--help", cwd=tmp_path).stdout
    assert run("./explain", cwd=tmp_path).stdout == "the script\n"


def test_pretrained_weights_are_not_read(tmp_path):
    folder = config_of(tiny_marian(), tmp_path)
    with pytest.raises(OSError):
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    main([folder])

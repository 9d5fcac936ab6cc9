"""--lora_rank_pattern: each layer's adapter has the rank that the file gives it, or one line."""

import json

import pytest

from tests.hf.test_runner import ROOT
from tests.hf_utils import tiny_marian
from tests.scripts.script_utils import script

# Of PEFT, while it makes an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
FIRST, SECOND = "model.encoder.layers.0.fc1", "model.decoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def names():
    """A script that has all that adapters need."""
    with script(ROOT / "scripts" / "run_summarization.py") as module:
        yield module


def adapted(names, path, alpha=None):
    args = names.PretrainedArguments(
        "a", lora_rank=4, lora_alpha=alpha, lora_rank_pattern=str(path)
    )
    return names.with_adapters(tiny_marian(), args, "SEQ_2_SEQ_LM")


@pytest.mark.parametrize("alpha", [None, 6])
def test_layers_have_their_ranks_and_the_same_scale(names, alpha, tmp_path):
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps({FIRST: 7, SECOND: 1}))
    model = adapted(names, path, alpha)
    layers = dict(model.base_model.model.named_modules())
    ranks = {name: len(layers[name].lora_A["default"].weight) for name in (FIRST, SECOND)}
    assert ranks == {FIRST: 7, SECOND: 1}
    adapters = {n: m for n, m in layers.items() if hasattr(m, "lora_A") and len(m.lora_A)}
    others = [len(m.lora_A["default"].weight) for n, m in adapters.items() if n not in ranks]
    assert others and set(others) == {4}
    assert {m.scaling["default"] for m in adapters.values()} == {2 if alpha is None else 1.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read --lora_rank_pattern"),
        ("{", "cannot read --lora_rank_pattern"),
        ("[1]", "must hold a rank of at least 1 by layer"),
        ('{"a": 0}', "must hold a rank of at least 1 by layer"),
        ('{"a": 1.5}', "must hold a rank of at least 1 by layer"),
        ('{"a": true}', "must hold a rank of at least 1 by layer"),
        ('{"model.encoder.layers.7.fc1": 2}', "names model.encoder.layers.7.fc1, which the model"),
    ],
)
def test_a_bad_file_is_refused(names, text, message, tmp_path):
    path = tmp_path / "ranks.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(names.InputError, match=message):
        adapted(names, path)


def test_ranks_need_a_rank_for_the_other_layers(names):
    with pytest.raises(ValueError, match="--lora_rank_pattern needs --lora_rank"):
        names.PretrainedArguments("a", lora_rank_pattern="ranks.json")

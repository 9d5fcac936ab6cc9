"""Which layers are chosen, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from transformers.pytorch_utils import Conv1D

from hf_fngd import FNGD, FNGDError, create_fngd_optimizer
from hf_fngd.layers.selection import Selection, select_layers
from tests.helpers import tiny_gpt2, tiny_llama, tiny_marian, tiny_resnet, tiny_vit


def names(selection: Selection) -> set[str]:
    """Return the last parts of the chosen paths."""
    return {path.rpartition(".")[2] for path in selection.chosen}


def reason(selection: Selection, path: str) -> str:
    return selection.left_out[path][1]


ATTENTION = {"q_proj", "k_proj", "v_proj"}
DEFAULTS: dict[str, tuple[Callable[[], nn.Module], set[str], int, dict[str, str]]] = {
    "marian": (
        tiny_marian,
        ATTENTION | {"out_proj", "fc1", "fc2"},
        3 * 4 + 2 * 2,
        {
            "model.shared": "embedding",
            "model.encoder.layers.0.self_attn_layer_norm": "not one of Linear",
            "lm_head": "vocabulary head, tied to",
        },
    ),
    "gpt2": (
        tiny_gpt2,
        {"c_attn", "c_proj", "c_fc"},
        2 * 4,
        {
            "transformer.wte": "embedding",
            "transformer.wpe": "embedding",
            "transformer.h.0.ln_1": "not one of Linear",
            "lm_head": "vocabulary head, tied to transformer.wte",
        },
    ),
    "llama": (
        tiny_llama,
        ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj"},
        7,
        {
            "model.embed_tokens": "embedding",
            "model.norm": "not one of Linear",
            "lm_head": "vocabulary head",
        },
    ),
    "llama tied": (
        lambda: tiny_llama(tied=True),
        ATTENTION | {"o_proj", "gate_proj", "up_proj", "down_proj"},
        7,
        {"lm_head": "vocabulary head, tied to model.embed_tokens"},
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_of_language_models(name: str) -> None:
    build, chosen, count, reasons = DEFAULTS[name]
    model = build()
    selection = select_layers(model)
    assert names(selection) == chosen and len(selection.chosen) == count
    for path, why in reasons.items():
        assert reason(selection, path).startswith(why)
    with_parameters = {
        path for path, m in model.named_modules() if list(m.parameters(recurse=False))
    }
    assert set(selection.chosen) | set(selection.left_out) == with_parameters
    assert not set(selection.chosen) & set(selection.left_out)


@pytest.mark.parametrize(
    ("build", "norm"), [(tiny_vit, nn.LayerNorm), (tiny_resnet, nn.BatchNorm2d)]
)
def test_default_of_image_models(build: Callable[[], nn.Module], norm: type) -> None:
    model = build()
    selection = select_layers(model)
    layers = {p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(selection.chosen) == layers and len(layers) > 5
    norms = [path for path, m in model.named_modules() if isinstance(m, norm)]
    assert norms and all(path in selection.left_out for path in norms)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["fc1"], {"fc1"}),
        (["fc1", "q_proj"], {"fc1", "q_proj"}),
        (("fc1", "fc2"), {"fc1", "fc2"}),
        (["self_attn"], ATTENTION | {"out_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["decoder.layers.0.fc1"], {"fc1"}),
        ([r".*\.fc\d"], {"fc1", "fc2"}),
        (["_proj"], ATTENTION | {"out_proj"}),
        (r".*fc[12]", {"fc1", "fc2"}),
        (r"model\.decoder\..*", ATTENTION | {"out_proj", "fc1", "fc2"}),
        ("all-linear", ATTENTION | {"out_proj", "fc1", "fc2"}),
        ("all_linear", ATTENTION | {"out_proj", "fc1", "fc2"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_targets(target: str | list[str], expected: set[str]) -> None:
    selection = select_layers(tiny_marian(), target)
    assert names(selection) == expected
    assert "lm_head" not in selection.chosen


def test_parts_are_no_substrings() -> None:
    model = nn.ModuleDict(
        {"fc1": nn.Linear(2, 2), "fc10": nn.Linear(2, 2), "my_fc1": nn.Linear(2, 2)}
    )
    assert set(select_layers(model, ["fc1"]).chosen) == {"fc1"}
    # Only what matches nothing else is looked for inside the paths.
    assert set(select_layers(model, ["fc"]).chosen) == {"fc1", "fc10", "my_fc1"}
    # One string is a pattern for the whole path.
    assert set(select_layers(model, "fc1").chosen) == {"fc1"}
    assert set(select_layers(model, "fc1.*").chosen) == {"fc1", "fc10"}


@pytest.mark.parametrize(
    "exclude", [["decoder"], r".*\.decoder\..*", ["self_attn", "encoder_attn", "decoder"]], ids=str
)
def test_exclude(exclude: str | list[str]) -> None:
    selection = select_layers(tiny_marian(), exclude_modules(exclude), exclude)
    assert names(selection) == {"fc1", "fc2"}
    assert all("decoder" not in path for path in selection.chosen)
    assert reason(selection, "model.decoder.layers.0.fc1") == "in exclude_modules"


def exclude_modules(exclude: str | list[str]) -> list[str] | None:
    return None if "self_attn" in exclude else ["fc1", "fc2"]


def test_all_linear_leaves_convolutions() -> None:
    selection = select_layers(tiny_vit(), "all-linear")
    convolutions = [p for p, (kind, _) in selection.left_out.items() if kind == "Conv2d"]
    assert convolutions and reason(selection, convolutions[0]) == "not a linear layer"
    assert all(isinstance(m, nn.Linear) for m, _ in selection.chosen.values())


@pytest.mark.parametrize(
    ("target", "exclude"),
    [(["nothing"], None), ("fc", None), ([], None), (["fc1"], ["fc1"]), (["lm_head"], None)],
    ids=str,
)
def test_no_match_names_the_candidates(target: object, exclude: object) -> None:
    with pytest.raises(FNGDError) as error:
        create_fngd_optimizer(tiny_marian(), lr=0.1, target_modules=target, exclude_modules=exclude)
    message = str(error.value)
    assert f"target_modules={target!r}" in message
    assert "fc1, fc2, k_proj, out_proj, q_proj, v_proj" in message


def test_model_without_layers() -> None:
    with pytest.raises(FNGDError, match=r"none can be chosen \("):
        select_layers(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)))


@pytest.mark.parametrize("target", ["fc(", ["fc1", "[z-a]"]], ids=str)
def test_broken_pattern(target: str | list[str]) -> None:
    with pytest.raises(
        FNGDError, match="is not a regular expression .*: give one, or names of layers"
    ):
        select_layers(tiny_marian(), target)


def test_layers_whose_forward_is_not_called_are_left_out() -> None:
    # MultiheadAttention reads out_proj's weight and never calls it.
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    selection = select_layers(model)
    assert set(selection.chosen) == {"linear1", "linear2"}
    assert "Linear subclass" in reason(selection, "self_attn.out_proj")
    assert "not one of Linear" in reason(selection, "self_attn")


def test_subclasses_are_left_out() -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).relu()

    selection = select_layers(nn.Sequential(Other(2, 2), nn.Linear(2, 2)))
    assert set(selection.chosen) == {"1"} and "Linear subclass" in reason(selection, "0")


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.spectral_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["spectral_norm", "parametrised spectral_norm", "weight_norm", "pruned"],
)
def test_weights_that_are_no_parameters_are_left_out(
    change: Callable[[nn.Module], nn.Module],
) -> None:
    model = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 4))
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none")
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    assert set(optimizer.selection.chosen) == {"1"}


def test_frozen_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    selection = select_layers(model)
    assert set(selection.chosen) == {"1", "2"} and reason(selection, "0") == "frozen"


def test_tied_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    selection = select_layers(model)
    assert set(selection.chosen) == {"1"}
    assert reason(selection, "0") == "weight shared with 2"
    assert reason(selection, "2") == "weight shared with 0"


def test_one_module_under_two_names_is_chosen_once() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "again": layer, "other": nn.Linear(2, 2)})
    assert list(select_layers(model).chosen) == ["first", "other"]


@pytest.mark.feature("PEFT/LoRA", "works", "adapters are chosen, the base is left alone")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    selection = select_layers(model)
    assert len(selection.chosen) == 4
    assert all(".lora_A." in path or ".lora_B." in path for path in selection.chosen)
    base = [path for path in selection.left_out if path.endswith("q_proj.base_layer")]
    assert base and reason(selection, base[0]) == "frozen"
    # And it trains: only the adapters move.
    optimizer = create_fngd_optimizer(model, lr=0.1, share="none", update_scale="rms")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.randint(3, 24, (4, 6))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # lora_B starts at zero, so lora_A's first gradient is zero.
    assert moved and all("lora_B" in name for name in moved)
    assert optimizer.statistics()["gram_seconds"] > 0


@pytest.mark.parametrize("attached", [False, True])
def test_table(attached: bool) -> None:
    model = tiny_gpt2()
    optimizer = create_fngd_optimizer(model, lr=0.1)
    if not attached:
        optimizer.detach()
    assert (type(model.transformer.h[0].attn.c_attn) is not Conv1D) == attached
    selection = select_layers(model)
    lines = str(selection).splitlines()
    assert len(lines) == 1 + len(selection.chosen) + len(selection.left_out)
    assert lines[0].split() == ["layer", "type", "weight", "decision"]
    (row,) = (line for line in lines if line.startswith("transformer.h.0.attn.c_attn"))
    assert row.split() == ["transformer.h.0.attn.c_attn", "Conv1D", "8x24", "chosen"]
    (row,) = (line for line in lines if line.startswith("lm_head"))
    assert row.split()[:2] == ["lm_head", "Linear"]
    assert row.endswith("left out: vocabulary head, tied to transformer.wte")


@pytest.mark.parametrize("rule", ["sgd", "muon"])
def test_named_parameters_make_the_same_groups(rule: str) -> None:
    def groups(params, net) -> list:
        optimizer = FNGD(params, 1e-2, module=net, update_rule=rule)
        return [
            (group["rule"], [p.shape for p in group["params"]]) for group in optimizer.param_groups
        ]

    net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    expected = groups(net.parameters(), net)
    assert {rule, "adamw"} == {name for name, _ in expected}
    assert groups(net.named_parameters(), net) == expected
    assert groups([{"params": list(net.named_parameters())}], net) == expected
    optimizer = FNGD(net.named_parameters(), 1e-2, module=net)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert net.get_parameter(name) is parameter


def test_a_model_under_two_names_is_one_model() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
            self.loss = nn.ModuleDict({"model": self.model})

    assert list(select_layers(Wrapped()).chosen) == ["model.0", "model.1"]


def test_a_model_without_a_layer_to_choose_says_why() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(FNGDError, match="0: embedding; 1: frozen"):
        select_layers(net)

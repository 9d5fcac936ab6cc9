"""Every wrong setting is refused with its name, what is allowed, and the nearest valid name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_fngd import FNGD, FNGDConfig, FNGDError, create_fngd_optimizer

FIELDS = [item.name for item in dataclasses.fields(FNGDConfig)]
CHOICES = {
    item.name: item.metadata["choices"]
    for item in dataclasses.fields(FNGDConfig)
    if item.metadata["choices"]
}
NAN, INF = float("nan"), float("inf")
REFUSED = {
    "damping": [0, 0.0, -1, NAN, INF, True, "0.1", None],
    "momentum": [-0.1, 1, 1.0, NAN, True, "0.9"],
    "adam_beta1": [-0.1, 1.0, NAN, None],
    "adam_beta2": [-0.1, 1.0, NAN, None],
    "adam_epsilon": [-1e-9, INF, None],
    "refresh_every": [-1, 1.5, True, None],
    "num_landmarks": [0, -5, 2.5, None],
    "gram_memory_mb": [0, -1, 0.5, None],
    "gram_outputs": [0, -1, 0.5],
    "gram_inputs": [0, -1, 0.5],
    "collect_every": [0, -1, 0.5],
    "other_lr": [-1e-3, NAN, INF],
    "num_samples": [0, -1, 10.5],
    "store_dir": ["", 3, True],
    "nesterov": ["yes"],
    "seed": [1.5, "a", None],
}
TYPOS = [
    ("update_rule", "adam", "adamw"),
    ("share", "samples", "sample"),
    ("damping_mode", "relativ", "relative"),
    ("store_dtype", "float23", "float32"),
    ("gram_dtype", "bf16", "bfloat16"),
]


def test_defaults_are_the_documented_ones() -> None:
    config = FNGDConfig()
    assert (config.damping, config.damping_mode, config.share) == (1.0, "relative", "sample")
    assert (config.fisher_unit, config.update_rule) == ("sample", "sgd")
    assert FNGDConfig(**config.to_dict()) == config


def test_updates_have_the_size_of_adamws_where_the_rule_has_none_of_its_own() -> None:
    found = {rule: FNGDConfig(update_rule=rule).update_scale for rule in ("sgd", "adamw", "muon")}
    assert found == {"sgd": "rms", "adamw": "none", "muon": "none"}
    assert FNGDConfig(update_scale="none").update_scale == "none"
    assert FNGDConfig(update_rule="muon", update_scale="rms").update_scale == "rms"
    assert FNGDConfig.from_strings({"update_scale": "auto"}).update_scale == "rms"
    assert FNGDConfig.from_strings({"update_scale": "auto"}, update_rule="muon").update_scale == (
        "none"
    )


@pytest.mark.parametrize("item", dataclasses.fields(FNGDConfig), ids=lambda item: item.name)
def test_every_field_has_a_help_text(item: dataclasses.Field[Any]) -> None:
    assert len(item.metadata["help"]) > 15 and item.metadata["help"].endswith(".")


@pytest.mark.parametrize(("name", "choices"), CHOICES.items(), ids=CHOICES)
def test_choices(name: str, choices: tuple[str, ...]) -> None:
    for wrong in ("nonsense", None, 3, choices[0].upper()):
        with pytest.raises(FNGDError) as error:
            FNGDConfig(**{name: wrong})
        assert all(word in str(error.value) for word in (name, repr(wrong), *choices))


@pytest.mark.parametrize(("name", "typo", "meant"), TYPOS)
def test_nearest_choice_is_named(name: str, typo: str, meant: str) -> None:
    with pytest.raises(FNGDError, match=f"did you mean '{meant}'"):
        FNGDConfig(**{name: typo})


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values]
)
def test_ranges(name: str, value: object) -> None:
    with pytest.raises(FNGDError) as error:
        FNGDConfig(**{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"damping": 1e-30},
        {"damping": 10},
        {"momentum": 0},
        {"adam_epsilon": 0},
        {"other_lr": 0.0},
        {"num_samples": 1},
        {"num_landmarks": 1},
        {"nesterov": False},
        {"fisher_unit": "token", "share": "none", "gram_route": "nystrom"},
        {"fisher_unit": "token", "share": "label", "gram_route": "exact"},
        {"gram_route": "hadamard"},
    ],
    ids=str,
)
def test_allowed(values: dict[str, Any]) -> None:
    config = FNGDConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fisher_unit": "token"}, ["share=sample", "fisher_unit=token", "label"]),
        ({"fisher_unit": "token", "share": "position"}, ["share=position", "none"]),
        ({"fisher_unit": "token", "share": "layer"}, ["share=layer", "none"]),
        (
            {"fisher_unit": "token", "share": "none", "gram_inputs": 8},
            ["gram_inputs", "fisher_unit=sample", "nystrom"],
        ),
        (
            {"fisher_unit": "token", "share": "none", "gram_outputs": 8},
            ["gram_outputs", "fisher_unit=sample", "nystrom"],
        ),
        ({"collect_every": 2}, ["collect_every=2", "share=sample", "layer"]),
        ({"collect_every": 2, "share": "none"}, ["collect_every=2", "share=none", "layer"]),
        ({"gram_route": "nystrom"}, ["gram_route=nystrom", "fisher_unit=sample", "direct"]),
        ({"gram_route": "exact"}, ["gram_route=exact", "hadamard"]),
        (
            {"fisher_unit": "token", "share": "none", "gram_route": "direct"},
            ["gram_route=direct", "fisher_unit=token", "nystrom"],
        ),
    ],
    ids=str,
)
def test_incompatible_pairs(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(FNGDError) as error:
        FNGDConfig(**values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("damping", "0.01", 0.01),
        ("damping", "1e-3", 1e-3),
        ("share", "layer", "layer"),
        ("refresh_every", "5", 5),
        ("num_samples", "29000", 29000),
        ("num_samples", "none", None),
        ("num_samples", "None", None),
        ("other_lr", "none", None),
        ("other_lr", "5e-3", 5e-3),
        ("nesterov", "true", True),
        ("nesterov", "False", False),
        ("nesterov", "1", True),
        ("nesterov", "0", False),
        ("nesterov", "none", None),
        ("target_modules", "q_proj|fc1", ["q_proj", "fc1"]),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", ".*fc[12]", ".*fc[12]"),
        ("target_modules", "none", None),
        ("exclude_modules", "fc1|fc2", ["fc1", "fc2"]),
        ("seed", "-3", -3),
    ],
)
def test_text_becomes_the_fields_type(name: str, text: str, value: object) -> None:
    found = getattr(FNGDConfig.from_strings({name: text}), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("damping", "small"),
        ("damping", ""),
        ("damping", "none"),
        ("refresh_every", "1.5"),
        ("refresh_every", "none"),
        ("nesterov", "maybe"),
        ("num_samples", "many"),
    ],
)
def test_unreadable_text_is_named(name: str, text: str) -> None:
    with pytest.raises(FNGDError) as error:
        FNGDConfig.from_strings({name: text})
    assert name in str(error.value) and repr(text) in str(error.value)


def test_unknown_name_names_the_nearest() -> None:
    with pytest.raises(FNGDError) as error:
        FNGDConfig.from_strings({"dampin": "0.1"})
    message = str(error.value)
    assert "'dampin'" in message and "did you mean 'damping'" in message
    assert all(name in message for name in FIELDS)


def test_overrides_yield_to_text() -> None:
    config = FNGDConfig.from_strings({"damping": "0.5"}, damping=0.25, update_rule="muon")
    assert (config.damping, config.update_rule) == (0.5, "muon")
    with pytest.raises(FNGDError, match="update_rule"):
        FNGDConfig.from_strings({}, update_rule="lion")


def test_keyword_arguments_of_the_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(FNGDError, match="dampin: not a setting.*damping, damping_mode"):
        create_fngd_optimizer(model, lr=0.1, dampin=0.1)
    with pytest.raises(FNGDError, match="not both"):
        FNGD(model.parameters(), module=model, config=FNGDConfig(), damping=0.2)


WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([c for choices in CHOICES.values() for c in choices]),
    st.sampled_from(["none", "true", "nan", "inf", "-inf", "1e999", "|", "a|b", "٣", "1_0"]),
    st.floats().map(str),
    st.integers().map(str),
)
NAMES = st.one_of(st.sampled_from(FIELDS), st.text(max_size=12))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, WORDS, max_size=4))
@example({"num_landmarks": "1" + "0" * 400})
@example({"refresh_every": "9" * 5000})
@example({"damping": "1e-400"})
def test_any_text_is_read_or_refused(values: dict[str, str]) -> None:
    try:
        config = FNGDConfig.from_strings(values)
    except FNGDError as error:
        assert str(error)
    else:
        assert config.damping > 0 and config.num_landmarks >= 1

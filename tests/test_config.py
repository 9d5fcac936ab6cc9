"""Every wrong setting is refused with its name, and what to set instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_fngd import (
    FNGD,
    EvaConfig,
    FNGDConfig,
    FNGDError,
    KFACConfig,
    PlainConfig,
    SENGConfig,
    TENGraDConfig,
    create_fngd_optimizer,
)
from hf_fngd.config import OptimizerConfig

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
    "gram_memory_mb": [0, -1, 0.5, None],
    "other_lr": [-1e-3, NAN, INF],
    "store_dir": ["", 3, True],
    "leave_one_out": ["yes", 1, None],
    "target_modules": [3, [3]],
}
TYPOS = [
    ("update_rule", "adam", "adamw"),
    ("share", "samples", "sample"),
    ("damping_mode", "relativ", "relative"),
    ("store_dtype", "float23", "float32"),
    ("gram_dtype", "bf16", "bfloat16"),
]
# Settings of earlier versions, and what the refusal says about each.
REMOVED = [
    (FNGDConfig, "collect_from", "refresh_every"),
    (FNGDConfig, "collect_epochs", "refresh_every"),
    (FNGDConfig, "collect_every", "refresh_every"),
    (FNGDConfig, "gamma_scale", "set damping"),
    (FNGDConfig, "gamma_max", "set damping"),
    (FNGDConfig, "gamma_power", "set damping"),
    (FNGDConfig, "fisher_unit", "a sample is a sequence or an image"),
    (FNGDConfig, "num_landmarks", "a sample is a sequence or an image"),
    (FNGDConfig, "gram_inputs", "always exact"),
    (FNGDConfig, "gram_outputs", "always exact"),
    (FNGDConfig, "gram_route", "fewer operations"),
    (FNGDConfig, "num_samples", "bind_dataset"),
    (FNGDConfig, "seed", "nothing at random"),
    (FNGDConfig, "nesterov", "update_rule=muon"),
    (KFACConfig, "nesterov", "update_rule=muon"),
    (KFACConfig, "loss_terms", "set damping"),
    (KFACConfig, "step_control", "kl_clip"),
    (EvaConfig, "step_control", "kl_clip"),
    (TENGraDConfig, "rank_threshold", "exact"),
    (SENGConfig, "reference_sketch", "unbiased"),
    (SENGConfig, "big_product", "product of sums"),
    (SENGConfig, "batch_norm", "AdamW"),
    (PlainConfig, "damping", "no curvature"),
]


def test_defaults_are_the_documented_ones() -> None:
    config = FNGDConfig()
    assert (config.damping, config.damping_mode, config.share) == (1.0, "relative", "sample")
    assert (config.refresh_every, config.leave_one_out, config.update_rule) == (0, False, "sgd")
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
        message = str(error.value)
        assert message.startswith(f"{name}={wrong!r} is not allowed: ")
        nearest = [one for one in choices if message.endswith(f"did you mean {one!r}?")]
        assert nearest or message.endswith(f"choose from {', '.join(choices)}")


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
        {"refresh_every": 0},
        {"gram_memory_mb": 1},
        {"share": "none", "leave_one_out": True},
        {"target_modules": ["fc1", "fc2"], "exclude_modules": ".*decoder.*"},
    ],
    ids=str,
)
def test_allowed(values: dict[str, Any]) -> None:
    config = FNGDConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())


@pytest.mark.parametrize(("kind", "name", "words"), REMOVED)
def test_settings_of_earlier_versions_are_refused(
    kind: type[OptimizerConfig], name: str, words: str
) -> None:
    for make in (kind.from_settings, kind.from_strings):
        with pytest.raises(FNGDError) as error:
            make({name: "1"})
        message = str(error.value)
        assert f"{name} is not a setting of {kind.title}: " in message and words in message
        assert "did you mean" not in message


@pytest.mark.parametrize(
    ("share", "words"), [("label", "sample, layer or none"), ("position", "share=layer")]
)
def test_keys_of_earlier_versions_are_refused(share: str, words: str) -> None:
    for make in (FNGDConfig.from_settings, FNGDConfig.from_strings):
        with pytest.raises(FNGDError, match=f"share={share} was removed: .*{words}"):
            make({"share": share})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("damping", "0.01", 0.01),
        ("damping", "1e-3", 1e-3),
        ("share", "layer", "layer"),
        ("refresh_every", "5", 5),
        ("gram_memory_mb", "64", 64),
        ("store_dir", "/data", "/data"),
        ("store_dir", "none", None),
        ("store_dir", "None", None),
        ("other_lr", "none", None),
        ("other_lr", "5e-3", 5e-3),
        ("leave_one_out", "true", True),
        ("leave_one_out", "False", False),
        ("leave_one_out", "1", True),
        ("leave_one_out", "0", False),
        ("target_modules", "q_proj|fc1", ["q_proj", "fc1"]),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", ".*fc[12]", ".*fc[12]"),
        ("target_modules", "none", None),
        ("exclude_modules", "fc1|fc2", ["fc1", "fc2"]),
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
        ("leave_one_out", "maybe"),
        ("leave_one_out", "none"),
        ("gram_memory_mb", "much"),
        ("other_lr", "some"),
    ],
)
def test_unreadable_text_is_named(name: str, text: str) -> None:
    with pytest.raises(FNGDError) as error:
        FNGDConfig.from_strings({name: text})
    assert name in str(error.value) and repr(text) in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(FNGDError, match="^optim_args: 'dampin' is not .* mean 'damping'"):
        FNGDConfig.from_strings({"dampin": "0.1"})
    with pytest.raises(FNGDError) as error:
        FNGDConfig.from_strings({"zzz": "0.1"})
    assert str(error.value).endswith(f"choose from {', '.join(FIELDS)}")
    for name in ("lr", "learning_rate"):
        with pytest.raises(FNGDError, match="use the Trainer's --learning_rate"):
            FNGDConfig.from_strings({name: "0.1"})


def test_overrides_yield_to_text() -> None:
    config = FNGDConfig.from_strings({"damping": "0.5"}, damping=0.25, update_rule="muon")
    assert (config.damping, config.update_rule) == (0.5, "muon")
    with pytest.raises(FNGDError, match="update_rule"):
        FNGDConfig.from_strings({}, update_rule="lion")


def test_keyword_arguments_of_the_optimizer() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(FNGDError, match="'dampin' is not a setting.* mean 'damping'"):
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
@example({"gram_memory_mb": "1" + "0" * 400})
@example({"refresh_every": "9" * 5000})
@example({"damping": "1e-400"})
def test_any_text_is_read_or_refused(values: dict[str, str]) -> None:
    try:
        config = FNGDConfig.from_strings(values)
    except FNGDError as error:
        assert str(error)
    else:
        assert config.damping > 0 and config.gram_memory_mb >= 1

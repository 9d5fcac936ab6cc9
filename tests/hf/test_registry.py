"""The optimizer names are known to transformers, and their settings are checked."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers import trainer as trainer_module
from transformers.training_args import OptimizerNames

from hf_fngd import FNGDCallback, FNGDConfig, FNGDError, register
from hf_fngd.hf import registry
from hf_fngd.layers.selection import select_layers
from hf_fngd.methods import OPTIMIZERS
from tests.hf_utils import arguments, make_trainer, tiny_marian

NAMES = pytest.mark.parametrize("name", list(OPTIMIZERS))


@NAMES
def test_names_parse_print_and_copy(name, tmp_path):
    parser = HfArgumentParser(Seq2SeqTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
    assert args.optim == name and args.optim is OptimizerNames(name)
    assert json.loads(args.to_json_string())["optim"] == name
    assert args.to_sanitized_dict()["optim"] == name
    assert copy.deepcopy(args).optim is args.optim
    assert dataclasses.replace(args, seed=3).optim is args.optim
    assert name in parser.format_help()


@NAMES
def test_training_arguments_are_reloaded(name, tmp_path):
    buffer = io.BytesIO()
    torch.save(TrainingArguments(output_dir=str(tmp_path), optim=name), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).optim is OptimizerNames(name)


def test_registering_again_changes_nothing():
    before = len(OptimizerNames), list(trainer_module.DEFAULT_CALLBACKS)
    dispatch = trainer_module.Trainer.get_optimizer_cls_and_kwargs
    check = TrainingArguments.__post_init__
    register()
    assert (len(OptimizerNames), trainer_module.DEFAULT_CALLBACKS) == before
    assert trainer_module.Trainer.get_optimizer_cls_and_kwargs is dispatch
    assert TrainingArguments.__post_init__ is check
    assert trainer_module.DEFAULT_CALLBACKS.count(FNGDCallback) == 1


def test_missing_private_name_is_refused(monkeypatch):
    monkeypatch.delattr(trainer_module, "DEFAULT_CALLBACKS")
    with pytest.raises(FNGDError, match=r"is not supported by --optim.*use FNGDTrainer"):
        register()


def test_settings_reach_the_optimizer(tmp_path):
    args = arguments(
        tmp_path,
        optim="fngd_adamw",
        optim_args="damping=0.01, share=layer, refresh_every=3, other_lr=none",
        optim_target_modules="all-linear",
        adam_beta2=0.98,
        adam_epsilon=1e-9,
    )
    config = registry.config_from_args(args)
    assert (config.damping, config.share, config.refresh_every) == (0.01, "layer", 3)
    assert config.update_rule == "adamw" and config.target_modules == "all-linear"
    assert (config.adam_beta2, config.adam_epsilon, config.other_lr) == (0.98, 1e-9, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dampng=0.1", r"'dampng' is not a setting of FNGD: did you mean 'damping'\?"),
        ("lr=0.1", r"'lr' is not a setting of FNGD: use the Trainer's --learning_rate"),
        ("damping=0.1,,share=layer,", None),
        ("damping", r"'damping' is not name=value"),
        ("damping=0.1=2", r"is not name=value"),
        ("=0.1", r"is not name=value"),
        ("damping=", r"is not name=value"),
        ("damping=0.1,damping=0.2", r"damping is given twice: leave one out"),
        ("damping=zero", r"damping='zero' must be a number"),
        ("damping=0", r"damping must be a finite number above 0"),
        ("damping=-1", r"damping must be a finite number above 0"),
        ("damping=nan", r"damping must be a finite number above 0"),
        ("damping=inf", r"damping must be a finite number above 0"),
        ("refresh_every=1.5", r"refresh_every='1.5' must be a whole number"),
        ("momentum=1", r"momentum must be a finite number at least 0 and below 1"),
        ("share=samples", r"share='samples' is not allowed: did you mean 'sample'\?"),
        ("leave_one_out=perhaps", r"leave_one_out='perhaps' must be true or false"),
        ("other_lr=low", r"other_lr='low' must be a number or none"),
        ("fisher_unit=token", r"fisher_unit is not a setting of FNGD: a sample is a sequence or"),
        ("share=label", r"share=label was removed: set share=sample, layer or none"),
        ("target_modules=nothing_like_it", r"no layer matches target_modules='nothing_like_it'"),
    ],
)
def test_bad_settings_are_named(text, message, tmp_path):
    def create():
        args = arguments(tmp_path, optim_args=text)
        trainer_module.Trainer.get_optimizer_cls_and_kwargs(args, tiny_marian())
        make_trainer(trainer_module.Trainer, args).create_optimizer()

    if message is None:
        create()
    else:
        with pytest.raises(FNGDError, match=message):
            create()


def test_bad_settings_are_refused_when_arguments_are_parsed(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    words = ["--output_dir", str(tmp_path), "--optim_args", "dampng=0.1", "--optim"]
    with pytest.raises(FNGDError, match=r"optim_args: 'dampng' .*: did you mean 'damping'\?"):
        parser.parse_args_into_dataclasses([*words, "fngd"])
    # Other optimizers have settings that are not ours to judge.
    (args,) = parser.parse_args_into_dataclasses([*words, "adamw_torch"])
    assert args.optim_args == "dampng=0.1"


PIECES = st.one_of(
    st.sampled_from([item.name for item in dataclasses.fields(FNGDConfig)]),
    st.sampled_from(["=", ",", "|", "==", ",,", " ", "=,", "none", "true", "0.5", "1e999", "-1"]),
    st.sampled_from(["sample", "all-linear", "muon", "(", "[", "(?:a){9999999999}", "\\d\\", "2"]),
    st.text(max_size=6),
)


@NAMES
def test_any_optim_args_are_read_or_refused(name, tmp_path):
    args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    outcomes = set()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(PIECES, max_size=9).map("".join))
    @example("damping=0.5")
    @example("target_modules=(?:a){9999999999}")
    def check(text):
        args.optim_args = text
        try:
            config = registry.config_from_args(args)
            select_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), config.target_modules)
            outcomes.add("read")
        except FNGDError as error:
            assert len(str(error).splitlines()) == 1
            outcomes.add("refused")

    check()
    assert outcomes == {"read", "refused"}


def test_rule_and_layers_are_given_once(tmp_path):
    with pytest.raises(
        FNGDError, match="fngd_muon stands for update_rule=muon, and update_rule=sgd"
    ):
        registry.config_from_args(
            arguments(tmp_path, optim="fngd_muon", optim_args="update_rule=sgd")
        )
    with pytest.raises(FNGDError, match="other_rule=soap, and other_rule=adamw is given: leave"):
        registry.config_from_args(
            arguments(tmp_path, optim="muon_soap", optim_args="other_rule=adamw")
        )
    with pytest.raises(FNGDError, match="not both"):
        registry.config_from_args(
            arguments(tmp_path, optim_args="target_modules=fc1", optim_target_modules="fc2")
        )


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("muon", ("muon", "none", "adamw")),
        ("muon_soap", ("muon", "rms", "soap")),
        ("soap", ("soap", "none", "soap")),
        ("fngd_muon", ("muon", "none", "adamw")),
        ("ekfac", ("sgd", "none", "adamw")),
    ],
)
def test_rules_that_a_name_stands_for(name, rules, tmp_path):
    config = registry.config_from_args(arguments(tmp_path, optim=name, optim_args=None))
    assert (config.update_rule, config.update_scale, config.other_rule) == rules

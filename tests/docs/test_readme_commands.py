"""Every command of the pages runs, small, or a test named here runs it."""

import gzip
import json
import os
import re
import shlex
import shutil
import sys

import pytest

from hf_fngd import __main__ as runner
from tests.hf_utils import tiny_marian
from tests.pages import PAGES, ROOT
from tests.report.test_explain import config_of
from tests.scripts.script_utils import flat, script
from tests.scripts.test_run_summarization import rows, tiny_t5

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = ROOT / "scripts"
PROGRAMS = ("python", "torchrun", "accelerate", "make", "hf")

# Commands that start more than this test can, and where they run.
COVERED = {
    "make env": "Makefile::$(STAMP)",
    "make test": "Makefile::test",
    "make test-fast": "Makefile::test-fast",
    "make lint": "Makefile::lint",
    "torchrun --nproc_per_node 2 -m hf_fngd run_translation.py --optim fngd ...": (
        "tests/hf/test_ddp.py::test_ranks_agree"
    ),
    "accelerate launch -m hf_fngd run_translation.py --optim fngd ...": (
        "tests/hf/test_ddp.py::test_accelerate_launch"
    ),
    "accelerate launch": "tests/hf/test_ddp.py::test_accelerate_launch",
    "python scripts/tables.py": (
        "tests/docs/test_readme.py::test_tables_are_those_of_the_code_and_the_result_files"
    ),
    "python scripts/gpu_runs.py --tasks images --jobs 4 --images_epochs 8 --minutes 5.9 --work "
    "runs/gpu --output scripts/bench/results/gpu/images.json": (
        "tests/scripts/test_gpu_runs.py::test_good_and_bad_runs_have_results"
    ),
    "python scripts/bench/gpu.py --rounds 6 --parts ceilings shapes rules methods --output "
    "scripts/bench/results/gpu/gpu.json": (
        "tests/scripts/test_gpu_bench.py::test_every_part_has_results"
    ),
    "python scripts/front_picture.py": (
        "tests/docs/test_readme.py::test_front_picture_is_that_of_the_committed_runs"
    ),
    "hf auth login": "tests/report/test_hub.py::client",
    "hf upload you/name runs/demo . --exclude '_*' --exclude 'checkpoint-*'": (
        "tests/report/test_hub.py::again"
    ),
}

# What makes a command of a script small; it comes last and so wins.
TINY = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "max_train_samples": 16,
    "max_eval_samples": 4,
    "max_predict_samples": 4,
    "logging_steps": 1,
    "warmup_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": "true",
}
NET = {"d_model": 16, "ffn_dim": 16, "layers": 1}
LENGTHS = {"max_source_length": 16, "max_target_length": 16, "num_beams": 1}
HEADS = {"attention_heads": 2}
BENCH = {**NET, "vocab_size": 50, "length": 5, "batch_size": 4, "threads": 1, "output": "b.json"}
# Folders of results, of which the commands with these plans make the report alone.
PLANS = ("compare_cifar10", "compare_multi30k", "quality_finetune", "ablation_finetune",
         "quality_cifar10", "ablation_cifar10", "ablation_scratch", "quality_scratch",
         "ablation_cifar10_wide", "quality_lora", "paper_setting", "noise_finetune",
         "quality_small_batches", "quality_finetune_bleu", "one_epoch", "three_epochs",
         "whitening", "finetune_muon_base", "finetune_adamw_base", "finetune_lora",
         "cifar10_average", "batches_256", "whitening_cifar10",
         "whitening_cifar10_rates")  # fmt: skip
SHRINK = {
    # As long as what the study of coefficients, which starts from such a model, wants.
    "run_translation": {**TINY, **NET, **HEADS, "vocab_size": 200, "max_source_length": 64,
                        "max_target_length": 64, "num_beams": 1, "generation_max_length": 16},
    "run_image_classification": {**TINY, "width": 4, "validation_rows": 10},
    "run_clm": {**TINY, **HEADS, "d_model": 16, "layers": 1, "vocab_size": 300, "max_length": 16},
    "run_summarization": {**TINY, **LENGTHS, "max_source_length": 48},
    "compare_optimizers": {"stage": "report"},
    "write_card": {},
    "methods": {**BENCH, "width": 4, "rounds": 1, "memory_repeats": 0},
    "update_rules": {**NET, "repeats": 2, "warmup": 1, "threads": 1, "output": "b.json"},
    "all_shapes": {"only": "marian_512_b64", "threads": 1, "output": "times",
                "flags": "--d_model 16 --ffn_dim 16 --layers 1 --vocab_size 50 --length 5 "
                "--batch_size 4 --repeats 2 --warmup 1"},
    "growth": {**BENCH, "repeats": 2, "warmup": 1, "only": "layers", "plot": "b.png"},
    "store": {**BENCH, "repeats": 2, "rows": 64, "stored_layers": 3},
    # One of the processes that it starts.
    "memory": {**BENCH, "steps": 1, "variant": "adamw", "checkpointing": "reentrant"},
    "coefficient_noise": {"rows": 16, "d_model": 16, "layers": 1, "batch_size": 8, "epochs": 1,
                          "output": "b.json"},
    "direction_quality": {"rows": 16, "d_model": 16, "layers": 1, "batch_size": 8, "epochs": 1,
                          "judges": 2, "repeats": 1, "steps": 2, "output": "b.json"},
    "profile_step": {**BENCH, "repeats": 2},
    "gram": {"samples": 3, "positions": 2, "widths": 4, "threads": 1, "repeats": 2, "warmup": 1,
             "output": "b.json", "plot": "b.png"},
}  # fmt: skip


def commands(text):
    """Commands of bash blocks, of indented blocks and of inline code."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    blocks += re.findall(r"^ {4}(\S.*)$", rest, re.M) + re.findall(r"`([^`]+)`", rest)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]
    found = [shlex.join(one) for one in words if one[0] in PROGRAMS and len(one) > 1]
    return list(dict.fromkeys(found))


COMMANDS = commands("\n".join(PAGES.values()))


def test_commands_are_found_wherever_they_stand():
    text = """Say `make demo` or `--optim x`, `python -m a.b c`.

    hf upload a .
    python = 3

```bash
make test   # all
python a.py \\
    --b 'c d' > e
```

```python
make = nothing
```
"""
    expected = ["make test", "python a.py --b 'c d' '>' e", "hf upload a .", "python = 3"]
    assert commands(text) == [*expected, "make demo", "python -m a.b c"]


def test_table_of_covered_commands_is_true():
    assert COVERED.keys() <= set(COMMANDS), "no page has one of these"
    for where in COVERED.values():
        path, name = where.split("::")
        mark = f"def {name}(" if path.endswith(".py") else f"\n{name}:"
        assert mark in (ROOT / path).read_text(encoding="utf-8"), where


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the files, data and models that the pages name, all tiny."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "scripts").symlink_to(SCRIPTS)
    lines = (SCRIPTS / "data/tatoeba/train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    for name in ("multi30k", "tatoeba"):
        (folder / "data" / name).mkdir(parents=True)
    parts = ("train", "validation", "test_2016_flickr", "test_2017_flickr")
    of_multi30k = [f"multi30k/{part}.en-de" for part in parts]
    for name in (*of_multi30k, "tatoeba/en-de", "tatoeba/validation.en-de"):
        packed = gzip.compress("\n".join(lines).encode())
        (folder / f"data/{name}.jsonl.gz").write_bytes(packed)
    for part in ("train", "validation", "test"):
        (folder / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shutil.copytree(SCRIPTS / "data/fashion_mnist", folder / "data/cifar10")
    texts = [json.loads(line)["translation"]["en"] for line in lines]
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("\n".join(texts), encoding="utf-8")
    for name in ("articles.jsonl", "articles_test.jsonl"):
        text = rows(20).replace("article", "text").replace("highlights", "summary")
        (folder / name).write_text(text)
    tiny_t5(folder / "google-t5/t5-small")
    config_of(tiny_marian(max_position_embeddings=64), folder / "Helsinki-NLP/opus-mt-en-de")
    with script(SCRIPTS / "run_clm.py") as clm:
        shape = clm.ModelArguments(vocab_size=300, d_model=16, layers=1, attention_heads=2)
        for part in clm.load_model(shape, texts, 16):
            part.save_pretrained(folder / "openai-community/gpt2")
    with script(SCRIPTS / "run_translation.py") as translation:
        shape = translation.ModelArguments(vocab_size=200, **NET, **HEADS)
        for part in translation.load_model(shape, texts, 64, ("en", "de")):
            part.save_pretrained(folder / "runs/tatoeba-marian-small")
    for name in ("finetuned", "pretrained"):
        tiny_marian().save_pretrained(folder / "runs" / name)
    for name in ("FOLDER", "runs/demo", "runs/demo-adamw"):
        shutil.copytree(ROOT / "model_cards/tatoeba-demo", folder / name)
    for plan in PLANS:
        copy = f"compare_{plan.removeprefix('compare_')}"
        shutil.copytree(SCRIPTS / "bench/results" / plan, folder / "runs" / copy)
    return folder


def call(words, function, monkeypatch):
    """Runs a command's `main` in this process, and gives its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        return function() or 0
    except SystemExit as end:
        return end.code or 0


def run_script(path, words, monkeypatch):
    name = path.removesuffix(".py").rsplit("/", 1)[-1]
    assert name in SHRINK, f"neither run nor covered: say in SHRINK how {path} becomes small"
    if words == ["--help"]:
        more = []
    elif name.startswith("run_") and words[0].endswith(".json"):
        settings = json.loads((ROOT / words[0]).read_text()) | SHRINK[name]
        settings |= {"disable_tqdm": True, "eval_on_start": False}
        with open("settings.json", "w") as file:
            json.dump(settings, file)
        words, more = ["settings.json", *words[1:]], []
    else:
        more = flat(SHRINK[name])
        if name == "compare_optimizers":
            plan = words[0].removesuffix(".json").rsplit("/", 1)[-1]
            more += ["--results", f"runs/compare_{plan}"]
    with script(ROOT / path) as module:
        function = getattr(module, "cli", None)
        if function is None:
            function = module.main if name != "write_card" else lambda: module.main(words)
        return call([path, *words, *more], function, monkeypatch)


def run_module(words, folder, monkeypatch):
    """`python -m hf_fngd`, with a script of transformers' kind where `...` stands for its rest."""
    if words[-1] == "...":
        (folder / words[0]).unlink(missing_ok=True)
        (folder / words[0]).symlink_to(ROOT / "tests/hf/stock_script.py")
        (folder / "stock").mkdir(exist_ok=True)
        rest = ["--output_dir", "stock", "--use_cpu", "--report_to", "none", "--max_steps", "2"]
        words = [*words[:-1], *rest]
    return call(["hf_fngd", *words], runner.main, monkeypatch)


def run(command, folder, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        (recipe,) = re.findall(rf"^{words[1]}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
        lines = re.findall(r"^\t\$\(BIN\)/(python .*)$", recipe, re.M)
        assert lines and len(lines) == recipe.count("\n"), recipe
        return max(run(line, folder, monkeypatch) for line in lines)
    program, first, *words = [word for word in words if word != ">"]
    assert program == "python", f"neither run nor covered: {command}"
    if first == "-m":
        assert words.pop(0) == "hf_fngd"
        words = [word for word in words if word != "compare.md"]
        return run_module(words, folder, monkeypatch)
    return run_script(first, words, monkeypatch)


# Files that a command must leave in its folder, in addition to exit code 0. The keys are parts
# of commands, `$` being the end of one.
LEFT = {
    "make demo": ["runs/demo/README.md", "runs/demo/predictions.jsonl", "runs/demo/curves.png"],
    "--output_dir runs/demo-adamw": ["runs/demo-adamw/metrics.json"],
    "make bench": ["times/marian_512_b64.json", "b.json"],
    "growth": ["b.json", "b.png"],
    "run_translation.py --optim": ["stock/done0.json"],
    "hf_fngd rank": ["ranks.json"],
    "--output_dir runs/mine": ["runs/mine/README.md"],
    "scripts/multi30k_finetune.json$": ["runs/multi30k-finetune-fngd/README.md"],
    "--output_dir runs/multi30k-finetune-soap": ["runs/multi30k-finetune-soap/README.md"],
    "--output_dir runs/multi30k-finetune-sgd": ["runs/multi30k-finetune-sgd/README.md"],
    "scripts/cifar10_small.json$": ["runs/cifar10-resnet18-small-fngd/metrics.json"],
    "--output_dir runs/cifar10-resnet18-small-sgd": ["runs/cifar10-resnet18-small-sgd/README.md"],
    "scripts/multi30k.json$": ["runs/multi30k-marian-small-fngd/coefficients.png"],
    "multi30k-marian-small-muon_soap": ["runs/multi30k-marian-small-muon_soap/README.md"],
    "multi30k-marian-small-muon$": ["runs/multi30k-marian-small-muon/README.md"],
    "multi30k-marian-small-adamw": ["runs/multi30k-marian-small-adamw/README.md"],
    "scripts/tatoeba.json$": ["runs/tatoeba-marian-small/README.md"],
    "fashion_smoke.json": ["runs/fashion-smoke/metrics.json"],
    "runs/german": ["runs/german/model.safetensors", "runs/german/coefficients.png"],
    "runs/lora": ["runs/lora/adapter_model.safetensors", "runs/lora/README.md"],
    "runs/summaries": ["runs/summaries/predictions.jsonl"],
    "hf_fngd compare": ["compare.png"],
    "plans/cifar10.json": ["runs/compare_cifar10/table.md", "runs/compare_cifar10/curves.png"],
    "plans/multi30k.json": ["runs/compare_multi30k/table.md"],
    **{f"plans/{name}.json": [f"runs/compare_{name}/table.md"] for name in PLANS[2:]},
    "update_rules": ["b.json"],
    "methods_": ["b.json"],
    "tatoeba-marian-small-adamw": ["runs/tatoeba-marian-small-adamw/README.md"],
    "coefficient_noise": ["b.json"],
    "direction_quality": ["b.json"],
    "route_crossover": ["b.json", "b.png"],
    "profile_step": ["b.json"],
    "write_card.py FOLDER": ["FOLDER/README.md"],
    "write_card.py runs": ["runs/demo/README.md", "runs/demo-adamw/README.md"],
}


# Of peft, and of Marian's tokenizer.
@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out", "ignore:Recommended"
)
@pytest.mark.parametrize(
    "command", [one for one in COMMANDS if one not in COVERED], ids=lambda one: one[:60]
)
def test_command_runs(command, world, monkeypatch, capsys):
    expected = [file for part, files in LEFT.items() if part in f"{command}$" for file in files]
    for file in expected:
        (world / file).unlink(missing_ok=True)
    monkeypatch.chdir(world)
    assert run(command, world, monkeypatch) == 0, capsys.readouterr().err
    assert expected or capsys.readouterr().out, "a command that leaves nothing says something"
    assert [file for file in expected if not os.path.exists(file)] == []


@pytest.mark.parametrize(
    "command", ["python scripts/no.py x", "make nothing", "accelerate launch b"]
)
def test_command_that_is_neither_run_nor_covered_fails(command, world, monkeypatch):
    with pytest.raises((AssertionError, ValueError)):
        run(command, world, monkeypatch)

"""scripts/run_image_classification.py from images to classes, and its errors in one line each."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import write_metric

SCRIPT = ROOT / "scripts" / "run_image_classification.py"
SAMPLE = ROOT / "scripts" / "data" / "fashion_mnist"


def sample(rows=None, split="train"):
    file = str(SAMPLE / f"{split}.parquet")
    found = datasets.load_dataset("parquet", data_files=file, split="train")
    return found if rows is None else found.select(range(rows))


def write(folder, name, images, labels, label_column="label"):
    """A parquet file of raw bytes, as other programs write it."""
    packed = [{"bytes": image, "path": None} for image in images]
    rows = datasets.Dataset.from_dict({"image": packed, label_column: labels})
    rows.to_parquet(folder / name)
    return folder / name


def picture(size=(8, 8), mode="RGB", colour=0, kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def options(folder, **changes):
    settings = {
        "train_file": SAMPLE / "train.parquet",
        "test_file": SAMPLE / "test.parquet",
        "validation_rows": 40,
        "max_train_samples": 96,
        "max_predict_samples": 30,
        "output_dir": folder / "out",
        "width": 4,
        "crop_padding": 2,
        "flip": "true",
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "optim": "fngd",
        "optim_args": "damping=0.5,share=sample",
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        **changes,
    }
    flat = []
    for name, value in settings.items():
        if value is not None and value is not False:
            flat += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flat


@pytest.fixture(scope="module")
def script():
    """The script as a module, to spare a process for each run."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("run_image_classification", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def run(script, monkeypatch):
    def call(*arguments):
        argv = ["run_image_classification.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        return script.cli()

    return call


def metrics(folder, out="out"):
    return json.loads((folder / out / "metrics.json").read_text())


@pytest.mark.slow
def test_process_leaves_everything(tmp_path):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    right = "{'right': sum(p == r for p, r in zip(predictions, references))}"
    metric = write_metric(tmp_path, "right", "int32", "int32", right)
    more = {"dataset_label": "some clothes", "metrics": metric}
    out = subprocess.run(
        [sys.executable, str(SCRIPT), *options(tmp_path, **more)],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    folder, found = tmp_path / "out", metrics(tmp_path)
    assert list(found) == [
        "settings",
        "train",
        "history",
        "validation",
        "test",
        "custom_code",
        "environment",
        "train_rows",
        "optimizer",
    ]
    assert found["settings"]["training"]["optim"] == "fngd"
    assert (
        found["settings"]["data"]["crop_padding"] == 2 and found["settings"]["model"]["width"] == 4
    )
    assert found["optimizer"]["config"]["damping"] == 0.5
    assert str(SCRIPT) in found["environment"]["command"]
    assert found["test"]["test_right"] == pytest.approx(30 * found["test"]["test_accuracy"])
    assert "\ntest right: " in out.stdout
    # Row numbers survive augmentation: all samples of the second epoch are known.
    rates = [e["fngd/reuse_rate"] for e in found["history"] if "fngd/reuse_rate" in e]
    assert rates and set(rates) == {1.0}
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    names = sample().features["label"].names
    assert [row["label"] for row in rows] == [names[n] for n in sample(30, "test")["label"]]
    right = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert found["test"]["test_accuracy"] == pytest.approx(right)
    assert [e["step"] for e in found["history"] if "eval_accuracy" in e] == [3, 6]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    (result, other) = ModelCard(card).data.eval_results
    assert (result.metric_name, result.metric_value) == ("Accuracy", round(right, 4))
    assert (other.metric_name, other.metric_value) == ("right", round(30 * right))
    assert "some clothes" in card and "sacrebleu" not in card and "AutoTokenizer" not in card
    for name in ("metrics.json", "predictions.jsonl", "curves.png", "README.md"):
        assert str(folder / name) in out.stdout
    # What the card says to do gives the same classes, where the scripts are not.
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1).replace("...", str(folder))
    sample(1, "test")["image"][0].save(tmp_path / "picture.png")
    again = subprocess.run(
        [
            sys.executable,
            "-c",
            code
            + "import datasets, torch\n"
            + f"rows = datasets.load_dataset('parquet', data_files='{SAMPLE}/test.parquet')\n"
            + "inputs = processor(list(rows['train'][:30]['image']), return_tensors='pt')\n"
            + "with torch.no_grad():\n    best = model(**inputs).logits.argmax(-1).tolist()\n"
            + "print('classes:', '|'.join(model.config.id2label[n] for n in best))\n",
        ],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    first, last = again.stdout.strip().splitlines()
    assert first == rows[0]["prediction"]
    assert last == "classes: " + "|".join(row["prediction"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "optim_args", "rate"),
    [
        ("adamw_torch", None, 3e-3),
        ("sgd", "momentum=0.9", 0.05),
        ("fngd", "damping=1,share=sample", 0.05),
    ],
)
def test_learns(optim, optim_args, rate, tmp_path, run):
    changes = {"max_train_samples": 500, "num_train_epochs": 3, "max_predict_samples": None}
    names = {"optim": optim, "optim_args": optim_args, "learning_rate": rate, "width": 8}
    assert run(*options(tmp_path, **changes, **names)) == 0
    found = metrics(tmp_path)
    losses = [entry["loss"] for entry in found["history"] if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert ("optimizer" in found) == (optim == "fngd")


def test_sgd_takes_momentum(script, tmp_path, run, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "train", lambda t: seen.append(t.create_optimizer()) or {})
    monkeypatch.setattr(script, "_report", lambda *_: None)
    assert run(*options(tmp_path, optim="sgd", optim_args="momentum=0.9", do_predict=False)) == 0
    assert seen[0].defaults["momentum"] == 0.9


def test_same_seed_same_run_and_another_one_differs(tmp_path, run):
    quick = {"num_train_epochs": 1, "do_predict": False, "do_eval": False, "eval_strategy": "no"}
    losses = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*options(tmp_path, output_dir=tmp_path / out, seed=seed, **quick)) == 0
        history = metrics(tmp_path, out)["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == losses[1] != losses[2]


def test_image_folders_of_several_sizes_and_another_set_of_classes(tmp_path, run):
    for split, classes in (("train", "abc"), ("test", "c")):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(6):
                colour = (40 * number, 255 * (name == "b"), 255 * (name == "c"))
                (folder / f"{number}.png").write_bytes(picture((8 + number, 9), "RGB", colour))
    files = {"train_file": None, "test_file": None, "validation_rows": 0, "do_eval": False}
    folders = {
        "train_dir": tmp_path / "train",
        "test_dir": tmp_path / "test",
        "eval_strategy": "no",
    }
    assert run(*options(tmp_path, **files, **folders, image_size=8)) == 0
    rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(row)["label"] for row in rows} == {"c"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"} and config["num_channels"] == 3
    # What it saved is evaluated without training, and fine-tuned.
    again = {"model_name_or_path": tmp_path / "out", "width": None, "do_train": False}
    other = {"output_dir": tmp_path / "again", "optim": "adamw_torch", "optim_args": None}
    assert run(*options(tmp_path, **files, **{**folders, "train_dir": None}, **again, **other)) == 0
    assert (tmp_path / "again" / "predictions.jsonl").read_text().splitlines() == rows
    more = {**again, "do_train": True, **other}
    assert run(*options(tmp_path, **files, **folders, **more)) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "fine-tuned from a local model, `out`, on" in card


@pytest.fixture
def vit(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"intermediate_size": 8, "image_size": 16, "patch_size": 8}
    ViTForImageClassification(ViTConfig(**size, **shape)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_model_of_transformers_in_its_own_size(vit, tmp_path, run, script):
    # Other pixels than the ones that fit into memory are decoded when they are needed.
    pixels = sys.modules["images.pixels"]
    bound, pixels.IN_MEMORY_BYTES = pixels.IN_MEMORY_BYTES, 0
    try:
        assert run(*options(tmp_path, model_name_or_path=vit, num_train_epochs=1)) == 0
    finally:
        pixels.IN_MEMORY_BYTES = bound
    folder = tmp_path / "out"
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [image.convert("RGB") for image in sample(30, "test")["image"]]
    inputs = processor(images, return_tensors="pt")
    assert inputs["pixel_values"].shape == (30, 3, 16, 16)
    with torch.no_grad():
        best = model(**inputs).logits.argmax(-1).tolist()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    names = [model.config.id2label[number] for number in best]
    agree = sum(name == row["prediction"] for name, row in zip(names, rows, strict=True))
    assert agree >= 29  # sizes are rounded to whole pixel values before they are normalised
    assert model.config.num_labels == 10
    assert "trust_remote_code" not in (folder / "README.md").read_text()


def test_help_reads_well(run, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "\n    python scripts/run_image_classification.py --train_file" in text
    for words in ("momentum=0.9", "--validation_rows", "--label_column", "fngd_adamw"):
        assert words in text


# ---- augmentation ----------------------------------------------------------------------------


@pytest.fixture
def pixels(script):
    return sys.modules["images.pixels"]


@pytest.mark.parametrize(("padding", "flip"), [(0, True), (3, False), (2, True)])
def test_augmentation_keeps_shape_and_type_and_follows_the_seed(padding, flip, pixels):
    images = torch.randint(256, (16, 3, 7, 9), dtype=torch.uint8)
    change = pixels.CropAndFlip(padding, flip)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(change(images))
    assert results[0].shape == images.shape and results[0].dtype == torch.uint8
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_every_crop_is_a_shift_and_every_flip_a_mirror_image(pixels):
    image = torch.randint(1, 256, (1, 1, 4, 5), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, [1] * 4)[0]
    shifts = [padded[:, y : y + 4, x : x + 5] for y in range(3) for x in range(3)]
    allowed = {tuple(one.flatten().tolist()) for s in shifts for one in (s, s.flip(2))}
    found = pixels.CropAndFlip(1, True)(image.expand(400, -1, -1, -1))
    assert {tuple(one.flatten().tolist()) for one in found} == allowed


def test_evaluation_sees_the_images_themselves(tmp_path, run, script, monkeypatch):
    seen = {}

    def keep(trainer):
        seen.update(train=trainer.train_dataset, validation=trainer.eval_dataset)
        return {}

    monkeypatch.setattr(script, "train", keep)
    monkeypatch.setattr(script, "_report", lambda *_: None)
    assert run(*options(tmp_path, do_predict=False)) == 0
    numbers = list(range(40))
    for split, same in (("train", False), ("validation", True)):
        rows = seen[split]
        items = torch.stack([item["pixel_values"] for item in rows.__getitems__(numbers)])
        assert items.dtype == torch.uint8 and items.shape == (40, 1, 28, 28)
        assert torch.equal(items, rows.pixels(numbers)) == same


def test_batches_have_mean_zero_and_deviation_one(pixels):
    images = torch.randint(256, (600, 2, 5, 5), dtype=torch.uint8)
    reader = type("Reader", (), {"__len__": lambda _: 600, "channels": 2, "size": (5, 5)})
    reader.__call__ = lambda _, number: images[number]
    rows = pixels.ImageRows(reader(), [0] * 600)
    batch = pixels.ImageCollator(*pixels.channel_statistics(rows))(rows.__getitems__(range(600)))
    values = batch["pixel_values"].transpose(0, 1).flatten(1)
    assert values.mean(1).abs().max() < 1e-5 and (values.std(1) - 1).abs().max() < 1e-3
    assert batch["labels"].shape == (600,)


# ---- errors ----------------------------------------------------------------------------------


def grey(count):
    return [picture(mode="L", colour=number) for number in range(count)]


BAD = {
    "missing file": (lambda f: {"train_file": f / "no.parquet"}, "there is no file .*check the"),
    "other kind of file": (
        lambda f: {"train_file": SAMPLE / "README.md"},
        "is no .parquet, .json, .jsonl or .jsonl.gz file",
    ),
    "damaged file": (
        lambda f: {"train_file": (f / "x.parquet").write_bytes(b"no") and f / "x.parquet"},
        "is not a parquet file",
    ),
    "missing folder": (
        lambda f: {"train_file": None, "train_dir": f / "none"},
        "--train_dir: there is no folder",
    ),
    "empty folder": (
        lambda f: {"train_file": None, "train_dir": (f / "e").mkdir() or f / "e"},
        "has no images by class",
    ),
    "file and folder": (lambda f: {"train_dir": f}, "give --train_file or --train_dir, not both"),
    "no training data": (
        lambda f: {"train_file": None, "validation_rows": 0, "test_file": SAMPLE / "test.parquet"},
        "--do_train needs training images",
    ),
    "no data": (lambda f: {"train_file": None, "test_file": None}, "no data: give --train_file"),
    "image column": (lambda f: {"image_column": "img"}, "image, label but no 'img': check --image"),
    "label column": (lambda f: {"label_column": "fine"}, "no 'fine': check --label_column"),
    "columns swapped": (
        lambda f: {"image_column": "label", "label_column": "image"},
        "the column 'label' of the train set has no images",
    ),
    "no validation data": (
        lambda f: {"validation_rows": 0},
        "--eval_strategy needs validation images: give",
    ),
    "no rows": (lambda f: {"max_train_samples": 0}, "the train set has no rows"),
    "all held out": (lambda f: {"validation_rows": 600}, "leaves none of the 600 training rows"),
    "negative": (lambda f: {"crop_padding": -1}, "--crop_padding cannot be -1"),
    "sorted rows": (
        lambda f: {
            "train_file": write(f, "s.parquet", grey(9), [0] * 4 + [1] * 5),
            "validation_rows": 3,
        },
        "the last 3 training rows are all of one class",
    ),
    "label out of range": (
        lambda f: {"test_file": write(f, "t.parquet", grey(2), ["Bag", "Hat"])},
        "row 1 of the test set has the label 'Hat', which is none of the 10 classes .*check",
    ),
    "negative label": (
        lambda f: {"train_file": write(f, "n.parquet", grey(60), [-1, 1] * 30)},
        "labels must be class names or whole numbers from 0 on, not like -1",
    ),
    "labels with a fraction": (
        lambda f: {"train_file": write(f, "n.parquet", grey(60), [0.5, 1.0] * 30)},
        "labels must be class names .*check --label_column",
    ),
    "missing label": (
        lambda f: {"train_file": write(f, "n.parquet", grey(60), [0, 1, None] * 20)},
        "row 2 of the train set has the label None",
    ),
    "one class": (
        lambda f: {
            "train_file": write(f, "n.parquet", grey(60), ["a"] * 60),
            "test_file": None,
        },
        "there is one class only, 'a'",
    ),
    "corrupt image": (
        lambda f: {
            "train_file": write(f, "c.parquet", [*grey(59), b"\x89PNG no"], [0, 1] * 30),
            "validation_rows": 0,
            "max_train_samples": None,
            "eval_strategy": "no",
        },
        "row 59 of the train set has an image that cannot be read, remove it",
    ),
    "image cut short": (
        lambda f: {
            "train_file": write(f, "c.parquet", [picture((90, 90))[:60]] * 60, [0, 1] * 30),
        },
        "row 0 of the train set has an image that cannot be read",
    ),
    "no image": (
        lambda f: {"train_file": write(f, "c.parquet", [grey(1)[0], None] * 30, [0, 1] * 30)},
        "row 1 of the train set has (no image|an image that cannot be read), remove it",
    ),
    "two sizes": (
        lambda f: {
            "train_file": write(f, "c.parquet", [*grey(9), picture((5, 6), "L")] * 9, [0, 1] * 45)
        },
        "row 9 of the train set is an image of 5x6 pixels, the first one has 8x8: give --image",
    ),
    "grey and colour": (
        lambda f: {"train_file": write(f, "c.parquet", [*grey(9), picture()] * 9, [0, 1] * 45)},
        "row 9 of the train set is a colour image.*give --num_channels 3",
    ),
    "16 bits": (
        lambda f: {"train_file": write(f, "c.parquet", [picture(mode="I;16")] * 60, [0, 1] * 30)},
        "more than 8 bits a channel",
    ),
    "no such data set": (
        lambda f: {"dataset_name": "nobody/nothing", "train_file": None},
        "cannot load the data set 'nobody/nothing'",
    ),
    "no such model": (
        lambda f: {"model_name_or_path": f / "no-model"},
        "cannot load --model_name_or_path",
    ),
    "no such width": (lambda f: {"width": 0}, "--width must be 1 or more, not 0"),
    "unknown optim_args": (lambda f: {"optim_args": "dampnig=1"}, "did you mean 'damping'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_with_a_way_out_and_nothing_is_lost(case, tmp_path, run, capsys):
    changes, message = BAD[case]
    kept = tmp_path / "out" / "metrics.json"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert run(*options(tmp_path, **{"test_file": None, **changes(tmp_path)})) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("run_image_classification: error: ")
    assert re.search(message, line), line
    assert kept.read_text() == "mine"


def test_model_without_a_head_for_images(vit, tmp_path, run, capsys):
    BertConfig().save_pretrained(vit)
    assert run(*options(tmp_path, model_name_or_path=vit)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no image classification head: choose" in last or "cannot load" in last

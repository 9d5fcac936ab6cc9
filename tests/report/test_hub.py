"""Pushing with the real client to a Hub on the loopback, loading back, and what goes wrong."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Seq2SeqTrainer

from hf_fngd.report.hub import HubError, HubMixin, push_command
from tests.hf.test_runner import run
from tests.hf_utils import arguments, make_trainer, tiny_marian
from tests.report.hub_server import Hub, Repo
from tests.scripts.test_run_translation import SCRIPT, files, options  # noqa: F401

LOAD = """
import json, sys, torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
def load(name):
    return AutoModelForSeq2SeqLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
(model, tokenizer), (other, _) = load(sys.argv[1]), load(sys.argv[2])
pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
assert all(name == again and torch.equal(one, two) for (name, one), (again, two) in pairs)
sources = [json.loads(line)["source"] for line in open(sys.argv[2] + "/predictions.jsonl")]
tokens = tokenizer(sources, return_tensors="pt", padding=True, truncation=True, max_length=16)
output = model.generate(**tokens, num_beams=1, max_length=16)
print(json.dumps(tokenizer.batch_decode(output, skip_special_tokens=True)))
"""
PUSH = """
import json, sys
from hf_fngd import FNGDError, FNGDSeq2SeqTrainer
from hf_fngd.report.hub import HubMixin
from tests.hf_utils import arguments, make_trainer
class Pushing(HubMixin, FNGDSeq2SeqTrainer):
    pass
plain = make_trainer(FNGDSeq2SeqTrainer, arguments(sys.argv[1], max_steps=1))
plain.train()
plain.args.hub_model_id = "me/plain"
plain.push_to_hub()
trainer = make_trainer(Pushing, arguments(sys.argv[1] + "/more", max_steps=1))
found = {}
for name in sys.argv[2:]:
    trainer.args.hub_model_id, trainer.hub_model_id = name, None
    try:
        found[name] = trainer.push_to_hub().repo_url
    except FNGDError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
SHORT = {"max_steps": 1, "do_eval": None, "do_predict": None, "eval_strategy": "no"}
TRAINED = (
    "run_translation: error: the model is trained and safe in {}, but it could not be pushed to "
    "me/tiny"
)


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


def client(hub, folder, *command, launcher=(), **changes):
    """Runs Python as a client of the Hub, with an empty cache; a change of None takes away."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(folder / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return run(*map(str, command), launcher=launcher, **settings | changes)


def push(hub, files, launcher=(), environment=None, **changes):  # noqa: F811
    changes = {"push_to_hub": True, "hub_model_id": "me/tiny", **changes}
    command = [SCRIPT, *options(files, **changes)]
    return client(hub, files, *command, launcher=launcher, **environment or {})


def on_disk(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def again(message, hub, folder):
    """Runs the command that a message names."""
    words = shlex.split(message[message.index("hf upload") :])
    script = Path(sys.executable).with_name(words[0])
    return client(hub, folder, script, *words[1:])


@pytest.mark.slow
def test_pushed_model_loads_and_translates_the_same(hub, files):  # noqa: F811
    out = push(hub, files, hub_token=hub.token, dataset_id="someone/pairs", num_train_epochs=1,
               environment={"HF_TOKEN": "hf_wrong"})  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert f"pushed: {hub.url}/me/tiny" in out.stdout
    folder, pushed = files / "out", hub.repos["me/tiny"].files
    assert pushed == on_disk(folder) and hub.unknown == []
    assert {"model.safetensors", "source.spm", "vocab.json", "metrics.json"} <= pushed.keys()
    assert not [path for path, data in pushed.items() if hub.token.encode() in data]
    found = json.loads(pushed["metrics.json"])
    card = ModelCard(pushed["README.md"].decode())
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {n: round(found["test"][n], 4) for n in ("bleu", "chrf")}
    assert card.data.datasets == ["someone/pairs"] and "'***'" in card.text
    (entry,) = yaml.safe_load(pushed[".eval_results/pairs.yaml"])
    assert entry["dataset"] == {"id": "someone/pairs", "task_id": "default"}
    assert entry["value"] == scores["bleu"]
    assert found["test"]["bleu_signature"] in entry["notes"] and "chrf" in entry["notes"]
    out = client(hub, files, "-c", LOAD, "me/tiny", folder, HF_HOME=str(files / "empty"))
    assert out.returncode == 0, out.stderr
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [json.loads(line)["prediction"] for line in lines]
    assert json.loads(out.stdout.splitlines()[-1]) == expected
    assert hub.unknown == []


@pytest.mark.slow
def test_resumed_run_is_pushed_and_completes_the_card_of_the_repository(hub, files):  # noqa: F811
    changes = {"save_strategy": "epoch", "do_eval": None, "eval_strategy": "no"}
    assert push(hub, files, push_to_hub=None, hub_model_id=None, **changes).returncode == 0
    folder = files / "out"
    whole = (folder / "model.safetensors").read_bytes()
    # As if killed in the second of two epochs: a checkpoint is all there is.
    for path in folder.iterdir():
        if path.name != "checkpoint-3":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    mine = b"---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nWhat I say of it.\n"
    hub.repos["me/tiny"] = Repo({"README.md": mine})
    out = push(hub, files, resume_from_checkpoint="true", **changes)
    assert out.returncode == 0, out.stderr
    pushed = hub.repos["me/tiny"].files
    assert pushed["model.safetensors"] == whole
    assert not [path for path in pushed if path.startswith("checkpoint-")]
    card = ModelCard(pushed["README.md"].decode())
    found = json.loads(pushed["metrics.json"])
    assert card.data.license == "mit" and {"mine", "fngd"} <= set(card.data.tags)
    assert card.text.lstrip().startswith("# My model\n\nWhat I say of it.\n")
    assert found["environment"]["command"] in card.text
    assert "--resume_from_checkpoint true" in found["environment"]["command"]
    assert {e["step"] for e in found["history"] if "loss" in e} == set(range(1, 7))
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {n: round(found["test"][n], 4) for n in ("bleu", "chrf")}
    assert hub.unknown == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "status", "why"),
    [("/commit/", 0, "no connection to {} ("), ("PUT /lfs", 500, "{} answered 500")],
)
def test_interrupted_push_goes_on_without_training(where, status, why, hub, files):  # noqa: F811
    hub.repos["me/tiny"] = Repo({"NOTES.md": b"mine"})
    hub.faults = {where: status}
    out = push(hub, files, save_strategy="epoch", hub_strategy="end", **SHORT)
    folder = files / "out"
    last = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert last.startswith(f"{TRAINED.format(folder)}: {why.format(hub.url)}")
    assert hub.repos["me/tiny"].files.keys() == {"NOTES.md"}
    before, sent = on_disk(folder), hub.count("PUT /lfs")
    assert "model.safetensors" in before and "README.md" in before
    hub.faults = {}
    out = again(last, hub, files)
    assert out.returncode == 0, out.stderr
    kept = {path: data for path, data in before.items() if not path.startswith("checkpoint-")}
    assert len(kept) < len(before) and on_disk(folder) == before
    assert hub.repos["me/tiny"].files == {"NOTES.md": b"mine", **kept}
    if where == "/commit/":
        assert hub.count("PUT /lfs") == sent > 0, "what had arrived was sent again"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["wrong token", "closed port"])
def test_trouble_at_the_start_costs_no_training(case, hub, files):  # noqa: F811
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    changes, why = {
        "wrong token": ({"HF_TOKEN": "hf_wrong"}, "the token is missing or wrong (401)"),
        "closed port": (closed, "no connection to http://127.0.0.1:9 ("),
    }[case]
    out = push(hub, files, environment=changes, **SHORT)
    last = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 2 and "Traceback" not in out.stderr
    start = "run_translation: error: cannot open me/tiny on the Hub, so nothing was trained: "
    assert last.startswith(start + why)
    assert f"upload the finished model later: hf upload me/tiny {files / 'out'} ." in last
    assert not (files / "out" / "model.safetensors").exists() and hub.repos == {}


@pytest.mark.slow
def test_trainers_push_and_say_what_went_wrong(hub, tmp_path):
    hub.faults = {"me/revoked/preupload": 401, "me/forbidden/": 403, "me/gone/commit": 404}
    names = ["me/new", "me/revoked", "me/forbidden", "me/gone"]
    out = client(hub, tmp_path, "-c", PUSH, tmp_path / "out", *names)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert "model.safetensors" in hub.repos["me/plain"].files
    assert found["me/new"] == f"{hub.url}/me/new" and "README.md" in hub.repos["me/new"].files
    safe = f"the model is trained and safe in {tmp_path / 'out' / 'more'}, but"
    for name, why in {
        "me/revoked": "the token is missing or wrong (401): set HF_TOKEN",
        "me/forbidden": "the token may not write there (403)",
        "me/gone": "answered 404",
    }.items():
        assert found[name].startswith(safe) and why in found[name]
        assert f"hf upload {name} {tmp_path / 'out' / 'more'} ." in found[name]
        assert hub.repos[name].files == {}


@pytest.mark.slow
def test_only_the_first_rank_pushes(hub, files):  # noqa: F811
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out = push(hub, files, launcher=launcher, **SHORT)
    assert out.returncode == 0, out.stderr
    assert hub.count("POST /api/repos/create") == hub.count("/commit/") == 1
    assert hub.repos["me/tiny"].files == on_disk(files / "out") and out.stdout.count("pushed") == 1


class Pushing(HubMixin, Seq2SeqTrainer):
    pass


def test_offline_mode_is_named_before_training(tmp_path):
    args = arguments(tmp_path, push_to_hub=True, optim="adamw_torch", optim_args=None)
    with pytest.raises(HubError, match="nothing was trained: HF_HUB_OFFLINE=1 forbids it"):
        make_trainer(Pushing, args)


def test_interruption_leaves_the_model(tmp_path, monkeypatch):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Seq2SeqTrainer, "push_to_hub", interrupted)
    args = arguments(tmp_path / "my run", optim="adamw_torch", optim_args=None, hub_revision="v1")
    with pytest.raises(HubError, match="safe in .*my run.*: interrupted. To upload it") as caught:
        make_trainer(Pushing, args).push_to_hub()
    assert (tmp_path / "my run" / "model.safetensors").exists()
    command = push_command(args)
    assert command in str(caught.value) and command.startswith("hf upload 'my run' ")
    assert shlex.split(command)[2:] == [
        "my run", str(tmp_path / "my run"), ".", "--revision", "v1",
        "--exclude", "_*", "--exclude", "checkpoint-*",
    ]  # fmt: skip


@pytest.mark.slow
def test_explain_reads_no_more_than_the_config_of_a_model_on_the_hub(hub, tmp_path):
    model = tiny_marian()
    model.save_pretrained(tmp_path / "tiny")
    hub.repos["me/tiny"] = Repo(on_disk(tmp_path / "tiny"))
    out = client(hub, tmp_path, "-m", "hf_fngd", "explain", "me/tiny")
    assert out.returncode == 0, out.stderr
    assert "16 layers chosen, 11 left out." in out.stdout
    assert hub.count("config.json") and not hub.count("safetensors")
    out = client(hub, tmp_path, "-m", "hf_fngd", "explain", "me/none")
    last = out.stderr.strip().splitlines()[-1]
    assert out.returncode == 2 and "Traceback" not in out.stderr
    start = "python -m hf_fngd explain: error: cannot read the config of 'me/none': give the id of"
    assert last.startswith(start)

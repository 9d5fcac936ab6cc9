"""`python -m hf_fngd SCRIPT` runs scripts that know nothing of FNGD."""

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests/hf/stock_script.py")
UPSTREAM = os.environ.get("HF_FNGD_UPSTREAM_TRANSLATION", "")
SETTINGS = ["--use_cpu", "--report_to", "none", "--learning_rate", "3e-3", "--logging_steps", "1"]
BATCHES = ["--per_device_train_batch_size", "4", "--num_train_epochs", "2"]


def run(*command, launcher=("-m", "hf_fngd"), cwd=ROOT, **environment):
    settings = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=cwd,
        env={**os.environ, **settings, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_script_by_name(tmp_path):
    options = ["--optim", "fngd", "--optim_args", "damping=0.01,share=sample,update_scale=rms"]
    layers = ["--optim_target_modules", "all-linear"]
    out = run(SCRIPT, "--output_dir", str(tmp_path), *options, *layers, *SETTINGS, *BATCHES)
    assert out.returncode == 0, out.stderr
    argv = json.loads((tmp_path / "done0.json").read_text())
    assert argv[0] == SCRIPT and argv[1] == "--output_dir"
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history[-2]["fngd/reuse_rate"] == 1.0 and history[-2]["fngd/damping"] == 0.01


@pytest.mark.slow
def test_help_of_the_script_and_of_the_runner():
    out = run(SCRIPT, "--help")
    assert out.returncode == 0 and "--optim_target_modules" in out.stdout
    assert "fngd_muon" in out.stdout
    out = run("--help")
    assert out.returncode == 0 and "python -m hf_fngd SCRIPT" in out.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "usage: python -m hf_fngd SCRIPT"),
        (
            ["no/such/script.py"],
            "hf_fngd: error: no script at 'no/such/script.py': give the path of a Python file",
        ),
    ],
)
def test_bad_command(command, message):
    out = run(*command)
    assert out.returncode == 2
    assert message in out.stdout + out.stderr


def test_bad_setting_is_one_line_and_exit_code_2(tmp_path):
    options = ["--optim", "fngd", "--optim_args", "dampng=0.01"]
    out = run(SCRIPT, "--output_dir", str(tmp_path), *options, *SETTINGS)
    assert out.returncode == 2
    last = out.stderr.strip().splitlines()[-1]
    assert last == (
        "hf_fngd: error: optim_args: 'dampng' is not a setting of FNGD: did you mean 'damping'?"
    )
    assert "Traceback" not in out.stderr


@pytest.mark.slow
def test_exit_code_and_traceback_of_a_failing_script(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(7)\n")
    assert run(str(script)).returncode == 7
    script.write_text("raise KeyError('mine')\n")
    out = run(str(script))
    assert out.returncode == 1 and "KeyError: 'mine'" in out.stderr


@pytest.mark.slow
def test_nothing_outside_the_process_changes(tmp_path):
    """Files of packages, home and working folder stay, and another process knows no names."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    script = tmp_path / "asks.py"
    script.write_text(
        "from transformers import TrainingArguments\n"
        "print(TrainingArguments('unused', optim='fngd', use_cpu=True).optim.value)\n"
    )
    packages = [Path(accelerate.__file__).parent, Path(transformers.__file__).parent]
    packages += [packages[0].parent / "torch" / "optim", ROOT / "hf_fngd"]

    def installed():
        files = [path for folder in packages for path in folder.rglob("*.py")]
        files += packages[0].parent.glob("*.pth")
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    settings = {"HOME": str(home), "HF_HOME": str(home / "hf"), "MPLCONFIGDIR": str(home / "mpl")}
    before = installed()
    out = run(str(script), cwd=work, **settings)
    assert (out.returncode, out.stdout.strip()) == (0, "fngd"), out.stderr
    # What a plain run of transformers leaves there it may leave here too.
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert not [name for name in left if "fngd" in name]
    out = run(str(script), launcher=(), cwd=work, **settings)
    assert out.returncode == 1 and "fngd is not a valid OptimizerNames" in out.stderr
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == left
    assert installed() == before and not list(work.iterdir())


@pytest.mark.slow
def test_script_sees_its_own_folder_first(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 3\n")
    script = tmp_path / "main.py"
    script.write_text(
        "import sys, neighbour\n"
        "assert __name__ == '__main__' and sys.argv[1:] == ['a', 'b'] and neighbour.VALUE == 3\n"
    )
    out = run(str(script), "a", "b")
    assert out.returncode == 0, out.stderr


@pytest.mark.skipif(not UPSTREAM, reason="HF_FNGD_UPSTREAM_TRANSLATION names no script")
def test_example_script_of_transformers(tmp_path):
    """Needs a copy of run_translation.py, a tiny model and data: see the README."""
    arguments = os.environ["HF_FNGD_UPSTREAM_ARGUMENTS"].split()
    folder = Path(UPSTREAM).parent
    out = run(UPSTREAM, *arguments, "--output_dir", str(tmp_path), cwd=folder)
    assert out.returncode == 0, out.stderr

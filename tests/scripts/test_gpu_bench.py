"""The benchmark of a GPU, rehearsed on a CPU: every part has results, a failed one its message."""

import json
import sys
import time
from unittest import mock

import pytest

from tests.hf.test_runner import ROOT
from tests.scripts.script_utils import script

FOLDER = ROOT / "scripts" / "bench"


@pytest.fixture
def gpu():
    with script(FOLDER / "gpu.py") as module:
        yield module


def run(gpu, file, *words):
    words = ("--tiny", "--device", "cpu", "--rounds", "2", "--output", str(file), *words)
    with mock.patch.object(sys, "argv", ["gpu.py", *words]):
        gpu.main()
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_part_has_results(gpu, tmp_path, capsys):
    some = ("--only", "marian_512_b128", "lora_7b_blocks_b8")
    written = run(gpu, tmp_path / "new" / "gpu.json", *some)
    failed = {
        part: found["error"] for part, found in written["results"].items() if "error" in found
    }
    assert not failed
    assert {"device", "date", "torch", "transformers"} <= written["machine"].keys()
    shapes = some[1:]
    table = capsys.readouterr().out
    for name in shapes:
        found = written["results"][f"shape {name}"]
        assert found["times"].keys() == found["memory"].keys() == gpu.KINDS.keys()
        assert found["times"]["adamw"]["ratio"] == 1
        # Coefficients take more operations than a plain step, and looking them up takes none.
        counts = {kind: found["work"][kind]["operations"] for kind in ("adamw", "fngd_adamw later")}
        assert len(set(counts.values())) == 1
        assert found["work"]["operations_ratio"] > 1
        assert f"| {name}" in table
    for name in gpu.METHODS:
        found = written["results"][f"method {name}"]
        assert found["kinds"].keys() == {"adamw", "fngd", *found["shares"]}
        assert sum(found["shares"].values()) == pytest.approx(1)
    assert written["results"]["rules"]["adamw"]["ratio"] == 1
    assert all(row["us"] > 0 for row in written["results"]["solves"]["8"].values())
    for kind in ("adamw", "fngd_adamw first"):
        found = written["results"]["profile"][kind]
        assert "aten::addmm" in found["top_operators"] and found["seconds"] > 0


def test_a_failed_part_leaves_its_message_and_the_others_go_on(gpu, tmp_path, capsys):
    bench = gpu.Bench(
        gpu.Options(output=str(tmp_path / "gpu.json"), device="cpu", tiny=True, minutes=1)
    )

    def fail(found):
        found["half"] = 1
        raise RuntimeError("out of memory")

    bench.run("one", fail, 10)
    bench.run("slow", lambda found: time.sleep(10), 0.1)
    bench.run("ceilings", bench.ceilings, 10)
    bench.end = time.perf_counter()
    bench.run("late", lambda found: found.update(done=1), 10)
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert results["one"]["half"] == 1
    assert "RuntimeError: out of memory" in results["one"]["error"]
    assert "TimeoutError" in results["slow"]["error"] and results["slow"]["part_seconds"] < 5
    assert results["ceilings"]["bytes"] > 0
    assert "no time was left" in results["late"]["error"] and "done" not in results["late"]
    gpu.print_results(bench.results)
    assert "one failed: RuntimeError: out of memory" in capsys.readouterr().out

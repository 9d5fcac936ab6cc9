"""Train in child processes that are killed at random moments; run by test_faults.py.

Starting Python anew for each would take minutes, so the children are forks.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_fngd import FNGDSeq2SeqTrainer  # noqa: E402
from tests.hf_utils import arguments, make_trainer  # noqa: E402


def die_while_saving(number):
    """Make the process kill itself when half of its n-th file of torch.save is written."""
    save, calls = torch.save, iter(range(number))

    def half(content, path, **options):
        save(content, path, **options)
        if next(calls, None) is None:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def train(folder, resume):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer = make_trainer(FNGDSeq2SeqTrainer, arguments(folder, **settings))
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.model.state_dict(), folder / "final.pt")


def fork(folder, resume, dies_at=None):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if dies_at is not None:
            die_while_saving(dies_at)
        sys.stderr = (folder / "stderr.txt").open("w")
        train(folder, resume)
        code = 0
    finally:
        os._exit(code)


def is_whole(checkpoint):
    """Tell whether the file that the Trainer writes last was written to its end."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def main(folder, kills, seed):
    torch.set_num_threads(1)
    draw = random.Random(seed)
    begin = time.perf_counter()
    (folder / "whole").mkdir()
    assert os.waitpid(fork(folder / "whole", None), 0)[1] == 0
    seconds = time.perf_counter() - begin
    expected = torch.load(folder / "whole" / "final.pt", weights_only=True)
    report = []
    for number in range(kills):
        run = folder / f"run{number}"
        run.mkdir()
        # Every fourth dies in the middle of writing a checkpoint, the others whenever it is.
        saving = number % 4 == 3
        child = fork(run, None, draw.randrange(1, 30) if saving else None)
        if not saving:
            time.sleep(draw.uniform(0.05, 0.95) * seconds)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = {path.name: is_whole(path) for path in run.glob("checkpoint-*")}
        any_complete = any(left.values())
        code = os.waitpid(fork(run, any_complete or None), 0)[1]
        found = torch.load(run / "final.pt", weights_only=True) if code == 0 else {}
        same = found.keys() == expected.keys() and all(
            torch.equal(value, found[name]) for name, value in expected.items()
        )
        report.append({"left": left, "saving": saving, "code": code, "same": same})
        if not same:
            report[-1]["stderr"] = (run / "stderr.txt").read_text()[-2000:]
        shutil.rmtree(run)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

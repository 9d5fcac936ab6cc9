"""Run an unmodified training script with the optimizer names registered, or a command.

python -m hf_fngd run_translation.py --optim fngd --optim_args "damping=1" ...
torchrun --nproc_per_node 2 -m hf_fngd run_translation.py --optim fngd ...
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys

from hf_fngd import FNGDError, register

_COMMANDS = {name: f"hf_fngd.report.{name}" for name in ("explain", "compare", "rank")}
_USAGE = """usage: python -m hf_fngd SCRIPT [ARGUMENTS OF THE SCRIPT]
       python -m hf_fngd explain MODEL [--batch_size N] [--length T] [--rows N] ...
       python -m hf_fngd compare RUN ... [--metric NAME] [--plot FILE]
       python -m hf_fngd rank FOLDER [--base FOLDER] [--share X] [--rank_pattern FILE]

SCRIPT   runs unmodified, with the optimizer names fngd, kfac, eva and so on known to
         transformers: python -m hf_fngd run_translation.py --optim fngd --optim_args "damping=1"
explain  lists which layers of a model (Hub id or folder) are chosen or left out and why, the
         memory and cost of FNGD, and settings to start with.
compare  prints a table of finished runs (output folders), and draws their curves.
rank     prints the effective rank of each matrix of a saved model, or of what training changed,
         and the LoRA rank that keeps most of it.

`explain --help` and so on list the options. To run a script called `explain`, give its
path: `python -m hf_fngd ./explain`.
"""


def main() -> None:
    """Run the command line; the package's own errors end it with exit code 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        if sys.argv[1] in _COMMANDS:
            importlib.import_module(_COMMANDS[sys.argv[1]]).main(sys.argv[2:])
        else:
            _run_script(sys.argv[1])
    except FNGDError as error:
        print(f"hf_fngd: error: {error}", file=sys.stderr)
        sys.exit(2)


def _run_script(script: str) -> None:
    if not os.path.isfile(script):
        raise FNGDError(f"no script at {script!r}: give the path of a Python file")
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    register()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

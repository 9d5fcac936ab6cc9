"""Runs an unmodified training script with the optimizer names registered.

python -m hf_fngd run_translation.py --optim fngd --optim_args "damping=0.1" ...
torchrun --nproc_per_node 2 -m hf_fngd run_translation.py --optim fngd ...
"""

from __future__ import annotations

import os
import runpy
import sys

from hf_fngd import FNGDError, register

_USAGE = """usage: python -m hf_fngd SCRIPT [ARGUMENTS OF THE SCRIPT]

Runs SCRIPT, unmodified, with the optimizer names fngd, kfac, eva and so on known to
transformers: python -m hf_fngd run_translation.py --optim fngd --optim_args "damping=0.1" ...
"""


def main() -> None:
    """Runs the script named on the command line; FNGD's own errors end it with exit code 2."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not os.path.isfile(script):
        print(f"hf_fngd: no script at {script!r}: give the path of a Python file", file=sys.stderr)
        sys.exit(2)
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    try:
        register()
        runpy.run_path(script, run_name="__main__")
    except FNGDError as error:
        print(f"hf_fngd: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

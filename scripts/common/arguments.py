"""The command line of a script: arguments, settings file, and errors of one line."""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import HfArgumentParser, TrainingArguments

from hf_fngd import FNGDError


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to do."""


# What a settings file says of its data, or of its optimizer, holds for no other.
_SPLITS = ("train", "validation", "test")
_DATA = {"dataset_name", *(f"{split}_{kind}" for split in _SPLITS for kind in ("file", "dir"))}
_BELONG = (
    (_DATA, ("dataset_label", "dataset_id")),
    ({"optim"}, ("optim_args", "optim_target_modules")),
)


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names defaults."""


def parse(kinds: Sequence[type], description: str | None) -> tuple[Any, ...]:
    """Reads the command line, or a JSON file with the same arguments; flags after it come first.

    With a flag that names other data or another optimizer, what the file says of its own goes.

    Args:
        kinds: Dataclasses of arguments; the last one is that of the training arguments.
        description: Text of `--help`.

    Returns:
        An instance of each.

    Raises:
        InputError: If the file cannot be read, settings contradict each other, or nothing is to be
            done.
    """
    parser = HfArgumentParser(
        list(kinds),
        prog=Path(sys.argv[0]).stem,
        description=description,
        formatter_class=_Help,
        usage="%(prog)s.py [SETTINGS.json] [--name value ...] (see --help)",
    )
    settings = next((word for word in sys.argv[1:2] if word.endswith(".json")), None)
    try:
        if settings:
            given = json.loads(Path(settings).read_text(encoding="utf-8"))
            flags = _flags(parser, sys.argv[2:])
            for owners, names in _BELONG:
                if any(flags[name] != given.get(name) for name in owners & flags.keys()):
                    given = {name: value for name, value in given.items() if name not in names}
            parsed = parser.parse_dict({**given, **flags})
        else:
            parsed = parser.parse_args_into_dataclasses()
    except (OSError, ValueError, TypeError) as error:
        where = f"cannot use {settings!r}: " if settings else "cannot use these arguments: "
        raise InputError(where + " ".join(str(error).split())) from None
    args = parsed[-1]
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict, or several")
    folder = args.output_dir
    if Path(folder).is_file():
        raise InputError(f"--output_dir {folder!r} is a file: choose a folder")
    if str(args.resume_from_checkpoint).lower() == "true":
        # The last checkpoint; the Trainer would take a flag's word for a folder.
        args.resume_from_checkpoint = True
    _hide_token(args)
    return parsed


def _flags(parser: HfArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    # Without defaults nothing is parsed but what stands on the command line.
    for action in parser._actions:
        action.required, action.default = False, SUPPRESS
    return vars(parser.parse_args(words))


def _hide_token(args: TrainingArguments) -> None:
    """Moves a token into the environment: training_args.bin and the card's command are public."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = token = args.hub_token
        args.hub_token = None
        sys.argv[:] = [word.replace(token, "***") for word in sys.argv]


def quieten(args: TrainingArguments) -> None:
    """Leaves the Trainer's progress bar as the only one, and an error as the only line.

    Args:
        args: Training arguments.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    # The DataLoader's, on every machine without an accelerator.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()


def exit_code(name: str, main: Callable[[], None]) -> int:
    """Runs a script; what the user can mend ends it with one line on stderr.

    Args:
        name: Name of the script.
        main: What it does.

    Returns:
        Exit code.
    """
    try:
        main()
    except (InputError, FNGDError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0

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
    """An argument or a file cannot be used; the message says what to do."""


# Arguments of a settings file that belong to its data or its optimizer, and to no other.
_SPLITS = ("train", "validation", "test")
_DATA = {"dataset_name", *(f"{split}_{kind}" for split in _SPLITS for kind in ("file", "dir"))}
_BELONG = (
    (_DATA, ("dataset_label", "dataset_id")),
    ({"optim"}, ("optim_args", "optim_target_modules")),
)


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keep the lines of the description, and show defaults."""


def parse(kinds: Sequence[type], description: str | None) -> tuple[Any, ...]:
    """Read the command line, or a JSON file with the same arguments; flags after it override it.

    A flag that names other data or another optimizer also drops the file's settings for its own.

    Args:
        kinds: Dataclasses of arguments; the training arguments come last.
        description: Text of `--help`.

    Returns:
        An instance of each.

    Raises:
        InputError: If the file cannot be read, arguments are unknown or contradict each other, or
            no action is asked for.
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
        where = f"cannot use {settings!r}: " if settings else ""
        raise InputError(where + " ".join(str(error).split())) from None
    args = parsed[-1]
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict, or several")
    folder = args.output_dir
    if Path(folder).is_file():
        raise InputError(f"--output_dir {folder!r} is a file: choose a folder")
    if str(args.resume_from_checkpoint).lower() == "true":
        # True means the last checkpoint; the Trainer would take the text for a folder.
        args.resume_from_checkpoint = True
    _hide_token(args)
    return parsed


def _flags(parser: HfArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    # Without defaults, only the arguments on the command line are parsed.
    for action in parser._actions:
        action.required, action.default = False, SUPPRESS
    return vars(parser.parse_args(words))


def _hide_token(args: TrainingArguments) -> None:
    """Move a token into the environment: training_args.bin and the card's command are public."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = token = args.hub_token
        args.hub_token = None
        sys.argv[:] = [word.replace(token, "***") for word in sys.argv]


def quieten(args: TrainingArguments) -> None:
    """Keep the Trainer's progress bar alone, so that an error is the only line.

    Args:
        args: Training arguments.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    # The DataLoader warns on every machine without an accelerator.
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()


def exit_code(name: str, main: Callable[[], None]) -> int:
    """Run a script; an error that the user can fix ends it with one line on stderr.

    Args:
        name: Name of the script.
        main: Its main function.

    Returns:
        Exit code: 2 after such an error, as argparse has it, else 0.
    """
    try:
        main()
    except (InputError, FNGDError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0

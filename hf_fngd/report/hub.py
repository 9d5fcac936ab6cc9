"""Pushing to the Hub: a failure is one message, and the way to go on without training again."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from transformers import Trainer, TrainingArguments

from hf_fngd.errors import FNGDError

_TOKEN = "set HF_TOKEN or run `hf auth login`"


class HubError(FNGDError):
    """The Hub could not be reached or refused; the message says what is safe and how to go on."""


class HubMixin(Trainer):
    """Trainer mixin: what goes wrong with the Hub is a `HubError` of one line.

    The Hub is asked for the repository before anything is trained, so that a wrong token costs no
    training. After training the model is on the disk before anything is sent.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Makes the repository on the Hub, unless it is there.

        A card that it has already is fetched, if the output folder has none: else the push would
        replace what somebody wrote there.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.

        Raises:
            HubError: If that failed.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
            if self.is_world_process_zero():
                _fetch_card(self.hub_model_id, self.args, kwargs.get("token"))
        # Errors of the network are of half a dozen unrelated types.
        except Exception as error:
            raise HubError(
                f"cannot open {_repository(self.args)} on the Hub, so nothing was trained: "
                f"{reason(error)}. Or leave out --push_to_hub, and send the finished model later: "
                f"{push_command(self.args)}"
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the model, writes the card, and sends the output folder to the Hub.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.

        Returns:
            What the Trainer's method returns; None on all ranks but the first.

        Raises:
            HubError: If the model could not be sent; it is saved by then.
        """
        if not self.args.push_to_hub:
            # Else the Trainer talks to the Hub first, and there would be nothing to fall back on.
            self.save_model(_internal_call=True)
        try:
            return super().push_to_hub(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            raise HubError(
                f"the model is trained and safe in {self.args.output_dir}, but it could not be "
                f"pushed to {_repository(self.args)}: {reason(error)}. To send it without training "
                f"again: {push_command(self.args)}"
            ) from error


def _fetch_card(repository: str, args: TrainingArguments, token: str | None) -> None:
    path = Path(args.output_dir) / "README.md"
    if path.exists():
        return
    wanted = {"revision": args.hub_revision, "token": token or args.hub_token}
    try:
        found = hf_hub_download(repository, path.name, **wanted)
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, path)


def push_command(args: TrainingArguments) -> str:
    """Gives the command that sends a finished run to the Hub, and only what is not there yet.

    Args:
        args: Training arguments of the run.

    Returns:
        A line for the shell. It leaves out what the Trainer leaves out.
    """
    words = ["hf", "upload", _repository(args), args.output_dir, "."]
    if args.hub_private_repo:
        words.append("--private")
    if args.hub_revision:
        words += ["--revision", args.hub_revision]
    return shlex.join([*words, "--exclude", "_*", "--exclude", "checkpoint-*"])


def reason(error: BaseException) -> str:
    """Says in one line what went wrong, and what to do about it.

    Args:
        error: What was raised; errors that it was raised from count as well.

    Returns:
        Text without a full stop.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in chain:
        if isinstance(one, KeyboardInterrupt):
            return "interrupted"
        if isinstance(one, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 forbids it"
        if isinstance(one, LocalTokenNotFoundError):
            return f"there is no token: {_TOKEN}"
        if isinstance(one, HfHubHTTPError):
            return _answer(one)
        if isinstance(one, HTTPError):
            told = " ".join(str(one).split()) or type(one).__name__
            return f"no connection to {constants.ENDPOINT} ({told})"
    return " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())


def _answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the token is missing or wrong (401): {_TOKEN}"
    if status == 403:
        return f"the token may not write there (403): {_TOKEN} with another one"
    said = f", {error.server_message}" if error.server_message else ""
    return f"{constants.ENDPOINT} answered {status}{said}"


def _repository(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name

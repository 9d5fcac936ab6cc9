"""Uploads to the Hub: a failure is one message, and says how to go on without training again."""

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

from hf_fngd import FNGDError

_TOKEN = "set HF_TOKEN or run `hf auth login`"


class HubError(FNGDError):
    """The Hub could not be reached or refused; the message says what is safe and how to go on."""


class HubMixin(Trainer):
    """Trainer mixin: a failure on the Hub is a `HubError` of one line.

    The repository is opened before the training, so a wrong token costs no training. After the
    training the model is saved before anything is uploaded.
    """

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository on the Hub unless it exists.

        If the repository has a card and the output folder has none, the card is downloaded:
        otherwise the push would replace it.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.

        Raises:
            HubError: If that fails.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
            if self.is_world_process_zero():
                _fetch_card(self.hub_model_id, self.args, kwargs.get("token"))
        # Network errors have half a dozen unrelated types.
        except Exception as error:
            raise HubError(
                f"cannot open {_repository(self.args)} on the Hub, so nothing was trained: "
                f"{reason(error)}. Or leave out --push_to_hub and upload the finished model later: "
                f"{push_command(self.args)}"
            ) from error

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, write the card, and upload the output folder to the Hub.

        Args:
            *args: Arguments of the Trainer's method.
            **kwargs: Arguments of the Trainer's method.

        Returns:
            The result of the Trainer's method; None on every rank except the first.

        Raises:
            HubError: If the upload fails; the model is saved by then.
        """
        if not self.args.push_to_hub:
            # The Trainer would contact the Hub first, and a failure would leave no saved model.
            self.save_model(_internal_call=True)
        try:
            return super().push_to_hub(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            raise HubError(
                f"the model is trained and safe in {self.args.output_dir}, but it could not be "
                f"pushed to {_repository(self.args)}: {reason(error)}. To upload it without "
                f"training again: {push_command(self.args)}"
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
    """Return the command that uploads a finished run, without the files that the Hub has.

    Args:
        args: Training arguments of the run.

    Returns:
        A line for the shell. It excludes the same files as the Trainer.
    """
    words = ["hf", "upload", _repository(args), args.output_dir, "."]
    if args.hub_private_repo:
        words.append("--private")
    if args.hub_revision:
        words += ["--revision", args.hub_revision]
    return shlex.join([*words, "--exclude", "_*", "--exclude", "checkpoint-*"])


def reason(error: BaseException) -> str:
    """Return the cause of a failure in one line, and what to do about it.

    Args:
        error: The exception; the exceptions that caused it are looked at as well.

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

"""Errors that a user can cause: one line on standard error and an exit code, no traceback. No error
that is printed shows an API key."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import yaml

from boltlm import interruption

# Shorter values are placeholders for servers that check no key, and may be ordinary words.
MIN_SECRET_CHARACTERS = 8
_REDACTED = "[key]"
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")  # user:password of an address
_OPENAI_KEY = re.compile(r"\bsk-[\w*.-]+")  # also of other accounts, and partly masked ones
_secrets: set[str] = set()


class UserError(ValueError):
    """The input, the parameters or the machine are not as required; the message says what was
    wrong, which value was found, and what to do."""


def hide_secret(secret: str) -> None:
    """Have `redact_secrets` remove this value from texts, from now on in this process."""
    if len(secret) >= MIN_SECRET_CHARACTERS:
        _secrets.add(secret)


def redact_secrets(text: str) -> str:
    """A text without the literal values of the secrets, whatever they look like, and without the
    user and the password of an address."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, _REDACTED)
    return _CREDENTIALS.sub(f"{_REDACTED}@", text)


def redact(text: str) -> str:
    """An API's message without secrets and without anything that looks like a key of OpenAI."""
    return _OPENAI_KEY.sub(_REDACTED, redact_secrets(text))


def run_main(main: Callable[[], None]) -> None:
    """Run the `main` of a stage script or of the command line.

    A `UserError` or an operating-system error (missing file, full disk) ends it with one line on
    standard error and exit code 1; Ctrl-C ends it with 130 and SIGTERM with 143, in a few seconds.
    A stage that DVC or a launcher has started ends with the process that started it. Where a
    launcher has started several processes only the main one reports a `UserError`, which all of
    them have in common. Any other exception is a defect of the program and keeps its traceback, but
    for secrets in it.
    """
    try:
        interruption.handle_signals()
        if {"DVC_STAGE", "RANK", interruption.LAUNCHED} & os.environ.keys():
            interruption.end_with_parent(signal.SIGTERM)
        main()
    except BaseException as error:
        if interruption.was_interrupted() or isinstance(error, KeyboardInterrupt):
            interruption.report_interruption()
            raise SystemExit(interruption.exit_code()) from None
        if isinstance(error, UserError | OSError):
            _report_error(error)
            raise SystemExit(1) from error
        text = traceback.format_exc()
        if not isinstance(error, Exception) or redact_secrets(text) == text:
            raise
        print(redact_secrets(text), file=sys.stderr)
        raise SystemExit(1) from None


def _report_error(error: UserError | OSError) -> None:
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        _report_removed_outputs(os.environ.get("DVC_STAGE"), Path("dvc.lock"))
        print(f"error: {redact_secrets(str(error))}", file=sys.stderr)
    elif isinstance(error, OSError):  # concerns this machine only
        print(f"error in process {rank}: {redact_secrets(str(error))}", file=sys.stderr)


def _report_removed_outputs(stage: str | None, lock: Path) -> None:
    """Name the outputs that this stage of DVC has in a dvc.lock from an earlier run and that DVC
    has removed before this run, with the commands that bring them back."""
    if stage is None:
        return
    try:
        outs = yaml.load(lock.read_bytes(), yaml.CSafeLoader)["stages"][stage].get("outs", ())
        removed = [out["path"] for out in outs if not Path(out["path"]).exists()]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return  # the stage has never run
    if removed:
        print(
            f"note: DVC has removed {', '.join(removed)} before this run; to have the earlier ones"
            f" back: dvc checkout {stage} (files in metrics/: git checkout)",
            file=sys.stderr,
        )

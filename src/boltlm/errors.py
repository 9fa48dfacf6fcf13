"""Errors that a user can cause: one line on standard error and an exit code, no traceback."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The input, the parameters or the machine are not as required; the message says what was
    wrong, which value was found, and what to do."""


def run_main(main: Callable[[], None]) -> None:
    """Run the `main` of a stage script or of the command line.

    A `UserError` or an operating-system error (missing file, full disk) ends it with one line on
    standard error and exit code 1; Ctrl-C ends it with 130. Where a launcher has started several
    processes only the main one reports a `UserError`, which all of them have in common. Any other
    exception is a defect of the program and keeps its traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError):  # concerns this machine only
            print(f"error in process {rank}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None

"""What a user can cause, told in one line; `stage` makes it an exit code without a traceback."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input, parameters or the machine are not as they must be; the message says what to do."""


def stage(main: Callable[[], None]) -> None:
    """Run a stage script's `main`.

    A `UserError` or an operating-system error (no file, full disk) ends it with one line on
    standard error and exit code 1, said once where a launcher started several processes; Ctrl-C
    with 130. Anything else is a defect and keeps its traceback.
    """
    try:
        main()
    except (UserError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OSError):  # of this machine; what the user did, process 0 says
            print(f"error in process {rank}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None

"""`accelerate launch`, but that a signal or a process that fails ends it with one line.

    python -m boltlm.training.launch --num_processes 8 [--use_fsdp] stages/train.py …

Takes the arguments of `accelerate launch`. Its processes end when it ends, however it ends.
"""

import logging
import os
import subprocess
from typing import NoReturn

from boltlm.errors import UserError, run_main
from boltlm.interruption import LAUNCHED, SIGNALS


def launch_processes() -> None:
    """Start the processes and wait for them."""
    from accelerate.commands.launch import main as launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # torch's lines and tables about processes that ended
    os.environ[LAUNCHED] = "1"
    try:
        launch()
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        _end({failure.exitcode for failure in error.failures.values()})
    except subprocess.CalledProcessError as error:
        _end({error.returncode})


def _end(exit_codes: set[int]) -> NoReturn:
    """End as the processes did, which have said what was wrong unless a signal ended them."""
    if exit_codes & {128 + number for number in SIGNALS}:
        raise KeyboardInterrupt
    if killed := [code for code in exit_codes if code < 0]:
        raise UserError(
            f"a process ended with exit code {killed[0]} (-9: killed, perhaps for lack of memory);"
            " run the same command again to resume"
        )
    raise SystemExit(1)


if __name__ == "__main__":
    run_main(launch_processes)

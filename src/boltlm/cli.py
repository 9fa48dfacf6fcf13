"""The command `boltlm`; its sub-commands are declared in `boltlm.commands`."""

import argparse

from boltlm.commands.analysis import add_analysis_commands
from boltlm.commands.check import add_check_command
from boltlm.commands.init import add_init_command
from boltlm.commands.plan import add_plan_command
from boltlm.commands.teachers import add_teacher_commands
from boltlm.commands.trial import add_trial_commands
from boltlm.commands.verification import add_verify_command
from boltlm.errors import run_main


def main() -> None:
    """Entry point of the command."""
    run_main(_run_command)


def _run_command() -> None:
    parser = argparse.ArgumentParser(
        prog="boltlm",
        description="Check and plan an experiment, try its parts, analyse what it made.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_init_command(commands)
    add_check_command(commands)
    add_plan_command(commands)
    add_teacher_commands(commands)
    add_trial_commands(commands)
    add_analysis_commands(commands)
    add_verify_command(commands)
    args = parser.parse_args()
    args.run(args)

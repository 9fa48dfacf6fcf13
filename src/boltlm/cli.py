"""The command `boltlm`; its sub-commands are declared in `boltlm.commands`."""

import argparse

from boltlm.commands.analysis import add_analysis_commands
from boltlm.commands.check import add_check_command
from boltlm.commands.teachers import add_teacher_commands
from boltlm.errors import run_main


def main() -> None:
    """Entry point of the command."""
    run_main(_run_command)


def _run_command() -> None:
    parser = argparse.ArgumentParser(
        prog="boltlm", description="Check experiments, preview teachers, analyse results."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_check_command(commands)
    add_teacher_commands(commands)
    add_analysis_commands(commands)
    args = parser.parse_args()
    args.run(args)

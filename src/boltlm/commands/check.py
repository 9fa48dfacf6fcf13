"""The sub-command `check`."""

import argparse
from pathlib import Path

from boltlm.commands.parser import Commands, add_command

CHECK_EXAMPLE = """\
examples:
  boltlm check
  boltlm check --params presets/gsm8k.yaml

Checks the keys, values and names of a params file, the graph of its entries, the files that they
name, and the packages, GPUs and servers that they need. It prints a line for each finding and ends
with exit code 1 if there are any; it changes nothing and takes no more than seconds."""


def add_check_command(commands: Commands) -> None:
    """Declare `boltlm check`."""
    summary = "find what is wrong with an experiment before it runs"
    parser = add_command(commands, "check", summary, CHECK_EXAMPLE, _check)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))


def _check(args: argparse.Namespace) -> None:
    from boltlm.preflight.check import check_experiment

    check_experiment(args.params)
    print(f"{args.params}: nothing is wrong")

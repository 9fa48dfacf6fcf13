"""Sides of a benchmark: each is the benchmark's own program again, in a process of its own."""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def add_paths(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """A flag for each path that the sides read."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default))


def measured(*arguments: str) -> dict[str, float]:
    """What a side prints as its last line, given these arguments before the program's own."""
    command = [sys.executable, sys.argv[0], *arguments, *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])

"""Runs each side of a benchmark, the program and what it is compared with, in its own process."""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def add_paths(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """Add a flag with a default for each path that the sides read."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=Path, default=Path(default))


def measured(*arguments: str) -> dict[str, float]:
    """Run this benchmark's program again with `arguments` before its own arguments, and return the
    JSON that it prints as its last line."""
    command = [sys.executable, sys.argv[0], *arguments, *sys.argv[1:]]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])

"""How a sub-command is declared: a summary, a help text that ends with an example, and a function
of the parsed arguments, which imports what it needs when it runs, so that help is quick."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """A sub-command whose help ends with an example."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[:1].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def count(text: str) -> int:
    """A whole number of 0 or more, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be 0 or more, found {text!r}")
    return int(text)

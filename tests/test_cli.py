"""The command `boltlm`: help with an example, and one line for what a user did wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("boltlm")
COMMANDS = ("plan", "compare", "seeds", "teacher preview", "verify-weights", "browse")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(COMMAND), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_help_lists_the_commands(tmp_path: Path) -> None:
    """What a user types first."""
    done = run("--help", folder=tmp_path)
    assert done.returncode == 0
    for name in COMMANDS:
        assert name.split()[0] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_an_example(tmp_path: Path, name: str) -> None:
    """An example is what most readers of a help text want."""
    done = run(*name.split(), "--help", folder=tmp_path)
    assert done.returncode == 0
    assert f"boltlm {name} " in re.split("examples?:", done.stdout)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "data/evaluate/a", "data/evaluate/b"), "--corpus is missing"),
        (
            ("compare", "data/evaluate/a", "data/evaluate/b", "--corpus", "heldout"),
            "data/evaluate/a",
        ),
        (("teacher", "preview", "warmstart"), "params.yaml: no such params file"),
        (("seeds", "--out", "seeds.csv"), "params.yaml: no such params file"),
        (
            ("verify-weights", "--model", "models/em1", "--chunks", "data/chunks/em"),
            "params.yaml: no such params file",
        ),
        (("browse", "data/latents/em1"), "params.yaml: no such params file"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """No traceback, and exit code 1."""
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line

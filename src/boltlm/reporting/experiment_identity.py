"""Which experiment this is: its commit, the preset that its params come from, what it changed."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

COMMITTED = "default"  # the name of the params.yaml that is committed
_MAX_NAMED_CHANGES = 4  # in the name of a run
PAGE_FILE = "index.html"
FACTS_FILE = "facts.json"  # beside the page: its summary, warnings and versions
REMOVED = "(removed)"


class Preset(NamedTuple):
    """The params that an experiment's come from, and what it changed, as dotted keys with values
    as text; keys that the experiment does not have are `REMOVED`."""

    name: str
    changes: Mapping[str, str]

    @property
    def run_name(self) -> str:
        """The preset and the changes, which are only counted where they are many."""
        if len(self.changes) > _MAX_NAMED_CHANGES:
            return f"{self.name}, {len(self.changes)} changes"
        return ", ".join([self.name, *(f"{key}={value}" for key, value in self.changes.items())])


def report_path(folder: Path) -> Path:
    """The page of this experiment below the folder of all reports. Queued experiments share the
    folder, and each has a page of its own."""
    return folder / os.environ.get("DVC_EXP_NAME", "workspace") / PAGE_FILE


def nearest_preset(flat: Mapping[str, str], presets: Mapping[str, Mapping[str, str]]) -> Preset:
    """The preset that the fewest params differ from; of equally near ones the first. All are flat:
    dotted keys with values as text."""
    candidates = [Preset(name, _changes(preset, flat)) for name, preset in presets.items()]
    return min(candidates, key=lambda preset: len(preset.changes), default=Preset(COMMITTED, {}))


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    changed = {key: value for key, value in new.items() if old.get(key) != value}
    return changed | {key: REMOVED for key in old if key not in new}


def committed_text(path: Path) -> str | None:
    """A file as it was committed before the experiment; None where it was not, or there is no
    repository."""
    revision = os.environ.get("DVC_EXP_BASELINE_REV", "HEAD")
    try:
        return _git("show", f"{revision}:./{path}")
    except (OSError, subprocess.CalledProcessError):
        return None


def git_commit() -> str:
    """The commit, and whether tracked files differ from it; "unknown" outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}{' with changes' if changes else ''}"


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

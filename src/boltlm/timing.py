"""Wall-clock figures: measured, never part of a tracked output.

A stage that has measured how long its work took writes a timing file outside git, with the digest
of the tracked metrics file that it belongs to. It is only read while that metrics file is still the
same, so figures of another experiment, or of results that DVC has since replaced, are never used.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boltlm.fingerprint import hash_path


def timing_path(folder: Path, kind: str, name: str) -> Path:
    """The timing file of one entry: `<folder>/<experiment>/<kind>/<name>.json`. Queued experiments
    share the folder, and each has a part of its own."""
    experiment = os.environ.get("DVC_EXP_NAME", "workspace")
    return folder / experiment / kind / f"{name}.json"


def write_timing(path: Path, metrics: Path, lines: Sequence[Mapping[str, float]]) -> None:
    """Write measured figures, one mapping a line of a curve or a single one, for the metrics file
    that is written already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"metrics": hash_path(metrics), "lines": list(lines)}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_timing(path: Path, metrics: Path) -> list[dict[str, float]]:
    """The figures that belong to this very metrics file; none where there are no such ones."""
    if not (path.is_file() and metrics.is_file()):
        return []
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content["lines"] if content["metrics"] == hash_path(metrics) else []

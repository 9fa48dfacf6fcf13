"""Whether the files of an experiment, and DVC's copies of them, are those of dvc.lock.

DVC itself compares times and sizes first, so it does not notice a byte that has changed on a disk.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from boltlm.errors import UserError

IGNORED_FOLDERS = frozenset({"__pycache__"})  # as .dvcignore says


@dataclass(frozen=True, slots=True)
class LockedPath:
    """A file or folder of dvc.lock. `stage`: the one that makes it, None for a dependency that no
    stage makes; `md5` as DVC writes it."""

    path: Path
    md5: str
    stage: str | None


def locked_paths(lock: Path) -> list[LockedPath]:
    """What dvc.lock names, each path once, outputs first. Raises UserError where the file is
    missing or is none of DVC's."""
    try:
        stages: Any = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        outs = [(stage, out) for stage, facts in stages.items() for out in facts.get("outs", ())]
        deps = [(None, dep) for facts in stages.values() for dep in facts.get("deps", ())]
        found: dict[str, LockedPath] = {}
        for stage, facts in (*outs, *deps):
            locked = LockedPath(Path(facts["path"]), facts["md5"], stage)
            found.setdefault(facts["path"], locked)
    except OSError as error:
        raise UserError(f"{lock}: cannot be read ({error}); run dvc repro first") from error
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{lock}: is not a lock file of DVC ({error!r})") from error
    return list(found.values())


def path_problem(locked: LockedPath, root: Path) -> str | None:
    """What is wrong with a path below `root`, or None."""
    path = root / locked.path
    if not path.exists():
        return "is missing; bring it back with dvc checkout or dvc repro"
    if _md5(path) == locked.md5:
        return None
    if locked.stage is None:
        return "has changed since dvc repro; run it again"
    return f"is not what the stage {locked.stage} made: delete it, then dvc checkout or dvc repro"


def damaged_objects(locked: LockedPath, cache: Path) -> Iterator[Path]:
    """The objects of DVC's cache behind a path that differ from their names. What the cache does
    not hold (metrics, source files, outputs that were never cached) is no damage."""
    listing = _object(cache, locked.md5)
    if not listing.is_file():
        return
    names = [locked.md5]
    if locked.md5.endswith(".dir"):
        with suppress(ValueError):  # a damaged listing is found by its own hash
            names += [entry["md5"] for entry in json.loads(listing.read_bytes())]
    for name in names:
        path = _object(cache, name)
        if path.is_file() and _file_md5(path) != name.removesuffix(".dir"):
            yield path


def _object(cache: Path, md5: str) -> Path:
    return cache / md5[:2] / md5[2:]


def _md5(path: Path) -> str:
    """As DVC computes it: of a folder, of the list of its files with their hashes."""
    if path.is_file():
        return _file_md5(path)
    files = (file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in files}
    entries = [
        {"md5": _file_md5(names[name]), "relpath": name}
        for name in sorted(names)
        if not IGNORED_FOLDERS & {*Path(name).parts}
    ]
    listing = json.dumps(entries, sort_keys=True).encode()
    return f"{hashlib.md5(listing, usedforsecurity=False).hexdigest()}.dir"


def _file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()

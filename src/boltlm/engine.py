"""Shards of work that outlive the process that did them.

A finished shard lies in the work folder under a key made of everything that it depends on. It is
written whole or not at all, its checksum beside it, and found again by any later run with the
same key: after a crash, in a queued experiment, under another preset. When all are there they
are published into the stage's output.
"""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from boltlm.progress import Progress

T = TypeVar("T")


def work_root(work: Path) -> Path:
    """The work folder, shared by queued experiments: DVC runs them in a copy of the repository
    and tells them in DVC_ROOT where the real one is."""
    return Path(os.environ.get("DVC_ROOT", ".")) / work


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A neighbour to write a file to: on leaving it is flushed to the disk and takes the file's
    name; on an error nothing is left and what had that name stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, what: str, *, mine: bool = True) -> Iterator[None]:
    """Hold a folder of unfinished work; another run that wants it waits, and says so. One that
    dies lets go of it. `mine` false: another process of the same run holds it."""
    if not mine:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except TimeoutError:
        print(f"{what}: waiting for another process that makes the same", flush=True)
        lock.acquire(blocking=True)
    try:
        yield
    finally:
        lock.release()


def key(facts: dict[str, Any]) -> str:
    """A name for work by what it depends on (JSON-ready facts)."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content(place: Path) -> str:
    """A digest of a file, or of a folder's files: the name under which work done with them is
    remembered."""
    digest = hashlib.blake2b(digest_size=16)
    inside = sorted(path for path in place.rglob("*") if path.is_file())
    for path in inside or [place]:
        digest.update(str(path.relative_to(place)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def code(names: Sequence[str]) -> str:
    """A digest of modules and packages by what Python makes of them: a comment or a line break
    leaves it as it is, any other change makes older work unknown."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        origin = Path(spec.origin)
        package = spec.submodule_search_locations is not None
        for path in sorted(origin.parent.rglob("*.py")) if package else [origin]:
            digest.update(ast.dump(ast.parse(path.read_bytes())).encode())
    return digest.hexdigest()


def run_shards(
    names: Sequence[str],
    make: Callable[[list[str]], Iterator[T]],
    *,
    work: Path,
    out: Path,
    what: str,
    workers: int = 1,
) -> list[T]:
    """Have every shard made that is not already whole in `work`, publish all into `out`, and
    return what `make` yields: once for each of the shards left, when it is written there and
    sealed. `workers` of them are under way at once."""
    left = [name for name in names if not is_whole(work / name)]
    made: list[T] = []
    if len(left) < len(names):
        print(f"{what}: {len(names) - len(left)} of {len(names)} shards found in {work}")
    if left:
        with Progress(what=what, total=len(left), unit="shards") as progress:
            for effort in make(left):
                made.append(effort)
                flying = min(workers, len(left) - len(made))
                waiting = len(left) - len(made) - flying
                progress.note(f"{flying} in flight, {waiting} waiting")
                progress.advance(1)
    publish([work / name for name in names], out)
    return made


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Put a finished shard's checksum beside it: from now on it counts."""
    with whole(path.with_name(path.name + ".sha256")) as part:
        part.write_text(_checksum(path), encoding="utf-8")


def is_whole(path: Path) -> bool:
    """Whether a shard is there, finished, and what it was when it was finished."""
    seal = path.with_name(path.name + ".sha256")
    return path.is_file() and seal.is_file() and seal.read_text("utf-8") == _checksum(path)


def publish(paths: Sequence[Path], out: Path) -> None:
    """Copy finished shards into an output that then holds nothing else."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for path in paths:
        shutil.copyfile(path, out / path.name)

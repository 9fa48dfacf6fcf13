"""Unfinished work that outlives the process that does it: complete files, locks, shards.

A finished shard lies in the work folder under the fingerprint of everything that it depends on. It
is written completely or not at all, with its checksum beside it, and any later run with the same
fingerprint uses it: after a crash, in a queued experiment, under another preset. When all shards of
a stage are complete they become the stage's output, as hard links where the file system has them:
they are on the disk once. No file of the work folder is ever changed in place.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from boltlm.progress import Progress

_T = TypeVar("_T")


def repository_path(path: Path) -> Path:
    """`path` in the repository itself, also in a queued experiment, which DVC runs in a copy of the
    repository whose original it names in DVC_ROOT."""
    return Path(os.environ.get("DVC_ROOT", ".")) / path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. On leaving, the file there is flushed to the disk
    and renamed to `path`; after an error it is removed and `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(
    folder: Path, what: str, *, acquire: bool = True, wait: bool = True
) -> Iterator[bool]:
    """Hold the lock of a folder of unfinished work, and yield whether it is held. A second run
    waits for it and says for which process or, with `wait` false, goes without it; the lock of a
    process that dies is released. `acquire` false: another process of this run holds it."""
    if not acquire:
        yield True
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except TimeoutError:
        if not wait:
            yield False
            return
        with suppress(OSError):
            print(f"{what}: waiting for {_holder(path)}, which does the same work", flush=True)
        lock.acquire(blocking=True)
    try:
        path.write_text(str(os.getpid()), encoding="utf-8")
        yield True
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for it then locks a new file
        lock.release()


def _holder(path: Path) -> str:
    with suppress(OSError):  # it may end now
        return f"process {path.read_text('utf-8')}"
    return "another process"


def run_shards(
    names: Sequence[str],
    process: Callable[[list[str]], Iterator[_T]],
    *,
    work: Path,
    out: Path,
    what: str,
    workers: int = 1,
) -> list[_T]:
    """Process every shard that is not yet complete in `work`, then publish all of them in `out`.

    `process` gets the names of the missing shards and yields once for each of them, when it is
    written to `work` and marked complete; what it yields is returned. `workers`: how many shards
    are processed at once, for the progress line.
    """
    with exclusive_lock(work, what):
        missing = [name for name in names if not is_complete(work / name)]
        if len(missing) < len(names):
            print(f"{what}: {len(names) - len(missing)} of {len(names)} shards found in {work}")
        results = _process_missing(missing, process, what, workers) if missing else []
        publish_shards([work / name for name in names], out)
    return results


def _process_missing(
    missing: Sequence[str], process: Callable[[list[str]], Iterator[_T]], what: str, workers: int
) -> list[_T]:
    results: list[_T] = []
    with Progress(what=what, total=len(missing), unit="shards") as progress:
        for result in process(list(missing)):
            results.append(result)
            running = min(workers, len(missing) - len(results))
            progress.note(f"{running} running, {len(missing) - len(results) - running} waiting")
            progress.advance(1)
    return results


def mark_complete(path: Path) -> None:
    """Write the checksum of a finished file beside it; from now on the file counts."""
    with atomic_write(_checksum_path(path)) as temporary:
        temporary.write_text(_checksum(path), encoding="utf-8")


def is_complete(path: Path) -> bool:
    """Whether a file exists, was marked complete, and has not changed since."""
    checksum = _checksum_path(path)
    return path.is_file() and checksum.is_file() and checksum.read_text("utf-8") == _checksum(path)


def sealed_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files anywhere below a folder that were marked complete: those that have changed since or
    are missing, and those that are as they were."""
    parts: tuple[list[Path], list[Path]] = [], []
    for checksum in sorted(folder.rglob(_checksum_path(Path("*")).name)):
        path = checksum.with_suffix("")
        parts[is_complete(path)].append(path)
    return parts


def remove_complete(path: Path) -> None:
    """Remove a file that was marked complete, its checksum first."""
    _checksum_path(path).unlink(missing_ok=True)
    path.unlink()


def publish_shards(paths: Sequence[Path], out: Path) -> None:
    """Link or copy finished shards into an output folder that then holds nothing else."""
    publish_files({path.name: path for path in paths}, out)


def publish_files(paths: Mapping[str, Path], out: Path) -> None:
    """Link or copy finished files, by the names that they get there, into an output folder that
    then holds nothing else."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    for name, path in paths.items():
        link_or_copy(path, out / name)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make `target`, which must not exist, a hard link to the file `source`, or a copy of it where
    the two are on different file systems or links cannot be made."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")

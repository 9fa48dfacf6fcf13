"""The local files that an experiment reads: the section `inputs` of params.yaml.

DVC cannot depend on a path that stands deep inside params and may be null. So every local file or
folder is an entry of `inputs`, whose own stage depends on it, and the stages that read files depend
on what those stages write.
"""

from collections.abc import Mapping
from pathlib import Path

from boltlm.errors import UserError
from boltlm.fingerprint import hash_path


def describe_input(path: Path) -> dict[str, int | str]:
    """The number of files, their size in bytes, and the digest of a file or folder.

    Raises UserError where it does not exist or holds no file.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise UserError(f"inputs: {path} does not exist or has no files; correct params.yaml")
    size = sum(file.stat().st_size for file in files)
    return {"files": len(files), "bytes": size, "digest": hash_path(path)}


def require_input(key: str, path: str, inputs: Mapping[str, str]) -> None:
    """Raises UserError unless `path`, a path or glob pattern found at `key`, is an entry of
    `inputs` or lies in one."""
    absolute = Path(path).absolute()
    if not any(absolute.is_relative_to(Path(entry).absolute()) for entry in inputs.values()):
        raise UserError(
            f"{key}: '{path}' is not among `inputs`, so DVC would not notice when it changes; add"
            f" it or its folder to params.yaml, for example inputs: {{corpus: {path}}}"
        )

"""Names for work by what it depends on: facts, files, and the code that does it."""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Modules that cannot change what a stage writes: what they show, say, time or log, and
# how a process ends. Neither DVC's
# dependencies (dvc.yaml, checked by a test) nor the keys of unfinished work hold them.
NEUTRAL_MODULES = frozenset(
    {
        "boltlm.errors",
        "boltlm.interruption",
        "boltlm.progress",
        "boltlm.preflight.check",
        "boltlm.timing",
        "boltlm.evaluation.validation",
        "boltlm.reporting.live_logging",
        "boltlm.training.hardware",
    }
)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A name for work by the JSON-ready facts that it depends on."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hash_path(path: Path) -> str:
    """A digest of a file, or of the files of a folder with their names."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files or [path]:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


@cache
def hash_code(module: str) -> str:
    """A digest of a module and of all modules of the package that it imports, directly or not, but
    for NEUTRAL_MODULES. It is taken of the syntax tree: a comment or a line break leaves it as it
    is, any other change makes older work unknown."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(import_closure(module)):
        digest.update(name.encode())
        digest.update(ast.dump(_syntax_tree(_source_file(name))).encode())
    return digest.hexdigest()


def import_closure(module: str) -> set[str]:
    """A module of the package and those that it imports, directly or not, also inside functions;
    NEUTRAL_MODULES, and what only they import, are not among them."""
    closure: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in closure | NEUTRAL_MODULES:
            closure.add(name)
            waiting += imported_modules(_source_file(name))
    return closure


def imported_modules(path: Path) -> set[str]:
    """The modules of the package `boltlm`, packages' own files aside, that a file imports."""
    modules: set[str] = set()
    for node in ast.walk(_syntax_tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        modules |= {name for name in names if name.startswith("boltlm.") and _is_module(name)}
    return modules


@cache
def _syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _package_parent() -> Path:
    return Path(__file__).parent.parent


def _source_file(module: str) -> Path:
    return _package_parent().joinpath(*module.split(".")).with_suffix(".py")


def _is_module(name: str) -> bool:
    return _source_file(name).is_file()

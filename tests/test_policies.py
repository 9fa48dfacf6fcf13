"""The house's rules, held by the machine."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.params import load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "boltlm"
ROOMS = ["corpus", "latents", "sequences", "model", "sampling", "evaluation", "figures"]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


def imports(path: Path) -> set[Path]:
    """The files of the package that a file imports, wherever in it."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("boltlm"):
            assert node.module is not None
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            file = ROOT / "src" / Path(*name.split("."))
            found |= {p for p in (file.with_suffix(".py"), file / "__init__.py") if p.is_file()}
    return found


def closure(path: Path) -> set[Path]:
    """All files of the package that are read when `path` runs, but for bare room files."""
    seen: set[Path] = set()
    left = [path]
    while left:
        for found in imports(left.pop()) - seen:
            seen.add(found)
            left.append(found)
    return {found for found in seen if found.name != "__init__.py"}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_all_that_it_imports_and_on_no_more(name: str) -> None:
    """A missing dep keeps stale results; a needless one throws good ones away."""
    stage = STAGES[name].get("do", STAGES[name])
    deps = [ROOT / dep for dep in stage["deps"] if dep.startswith(("src/", "stages/"))]
    script = ROOT / re.findall(r"stages/\w+\.py", stage["cmd"])[0]
    needed = closure(script) | {script}
    for path in needed:
        assert any(path.is_relative_to(dep) for dep in deps), f"{name} misses {path}"
    for dep in deps:
        assert any(path.is_relative_to(dep) for path in needed), f"{name} does not need {dep}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above(room: str) -> None:
    """The order of the rooms is the order in which data flows; the EM loop closes in dvc.yaml."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for path in (PACKAGE / room).glob("*.py"):
        for found in imports(path):
            place = found.relative_to(PACKAGE).parts[0]
            assert place in allowed or place.endswith(".py"), f"{path.name} imports {found}"


def test_shared_modules_do_not_import_rooms() -> None:
    """records, params, … lie under all rooms."""
    for path in PACKAGE.glob("*.py"):
        for found in imports(path):
            assert found.parent == PACKAGE, f"{path.name} imports {found}"


def test_the_key_of_samples_covers_the_code_that_draws_them() -> None:
    """What an E-step's draws import is in the key of its shards; what only reads params, paths
    or references is not."""
    from boltlm.sampling.shards import CODE

    reading = {PACKAGE / name for name in ("engine.py", "errors.py", "params.py", "progress.py")}
    covered = [ROOT / "src" / Path(*name.split(".")) for name in CODE]
    for path in closure(PACKAGE / "sampling" / "estep.py") - reading:
        assert any(path == c.with_suffix(".py") or path.is_relative_to(c) for c in covered), path


def test_files_are_short() -> None:
    """A file that no longer fits on a few screens is two files."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "stages").glob("*.py")]:
        limit = 60 if path.parent.name == "stages" else 300
        assert len(path.read_text("utf-8").splitlines()) <= limit, path


def keys(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {key for name, inner in value.items() for key in keys(inner, f"{prefix}.{name}")}


FREE = (
    ".corpus.",
    ".corpora.",
    ".questions.source",
    ".base.",
    ".teachers.",
    ".latents.",
    ".models.",
    ".train.evaluate",
    ".benchmarks",
    ".finetune.runs",
)  # sections whose keys depend on a kind, are names, or may be null


def fixed_keys(params: dict[str, Any]) -> set[str]:
    return {key for key in keys(params) if not key.startswith(FREE)}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_have_the_keys_of_params(preset: Path) -> None:
    """A preset replaces params.yaml as a whole, so it must say all that params.yaml says."""
    ours, theirs = load(ROOT / "params.yaml"), load(preset)
    assert ours.keys() == theirs.keys()
    assert fixed_keys(ours) == fixed_keys(theirs)


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PRESETS], ids=lambda path: path.stem)
def test_params_resolve(path: Path) -> None:
    """Every entry is built by the dataclass that reads it and points at entries that exist."""
    from boltlm.corpus.benchmarks import chosen
    from boltlm.corpus.sources import source
    from boltlm.corpus.split import Corpus
    from boltlm.evaluation.downstream import Spec
    from boltlm.evaluation.finetune import FinetuneConfig
    from boltlm.evaluation.measure import EvaluateConfig
    from boltlm.latents.teachers import teacher
    from boltlm.model.runs import settings
    from boltlm.params import build
    from boltlm.sampling.shards import LatentsEntry

    params = load(path)
    for name, values in params["corpora"].items():
        build(Corpus, values, f"corpora.{name}")
        source(params, name)
    for name in params["teachers"]:
        assert teacher(params, name).corpus in params["corpora"]
    for name, values in params["latents"].items():
        entry = build(LatentsEntry, values, f"latents.{name}")
        assert entry.model in params["models"]
        assert entry.corpus in params["corpora"]
    for name in params["models"]:
        entry, _ = settings(params, name)
        assert entry.parent in {"base", *params["models"]}
        assert {entry.corpus, entry.mix_corpus} <= params["corpora"].keys()
        assert is_made(params, entry.data)
    chosen(params)
    evaluate = build(EvaluateConfig, params["evaluate"], "evaluate")
    assert {evaluate.corpus, *evaluate.beside} <= params["corpora"].keys()
    for task in evaluate.tasks:
        assert Spec.of(task).task in {"questions", *params["benchmarks"]}
    for entry in build(FinetuneConfig, params["finetune"], "finetune").runs.values():
        assert entry.model in {"base", *params["models"]}
        assert entry.corpus in params["corpora"]
        assert is_made(params, entry.data)


def is_made(params: dict[str, Any], data: str) -> bool:
    """Whether a stage makes this folder under data/."""
    kind, _, of = data.partition("/")
    return of in params[{"teacher": "teachers", "latents": "latents", "split": "corpora"}[kind]]


def test_readme_commands_exist() -> None:
    """README's make targets and files are there, and it is short enough to be read."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for target in re.findall(r"(?:^    |`)make (\w+)", readme, re.M):
        assert target in targets, target
    for path in re.findall(r"\]\(([\w./-]+)\)|`((?:presets|stages|src|metrics)/[\w./-]+)`", readme):
        assert (ROOT / (path[0] or path[1])).exists(), path

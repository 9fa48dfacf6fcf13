"""The repository's own rules, checked by tests."""

import ast
import itertools
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

from boltlm.fingerprint import NEUTRAL_MODULES, import_closure, imported_modules
from boltlm.params import load, settings_keys
from boltlm.preflight.check import params_findings
from boltlm.preflight.settings import STAGE_SETTINGS
from tests.stage_deps import DVC_YAML, SCRIPT, required_sources, rewritten

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "boltlm"
PACKAGES = [
    "corpus",
    "sequences",
    "teachers",
    "training",
    "estep",
    "evaluation",
    "reporting",
    "preflight",
]
STAGES = yaml.safe_load(DVC_YAML.read_text("utf-8"))["stages"]
PARAMS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = ("compare", "seeds", "verify", "verify-weights", "browse")
SCRIPTS = sorted((ROOT / "stages").glob("*.py"))


def definition(stage: str) -> dict[str, Any]:
    return STAGES[stage].get("do", STAGES[stage])


def script_of(stage: str) -> str:
    match = SCRIPT.search(definition(stage)["cmd"])
    assert match is not None
    return match[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


# --- What DVC knows of each stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_that_can_change_its_output(stage: str) -> None:
    """A missing source keeps stale results; a needless one discards good ones."""
    sources = [dep for dep in definition(stage)["deps"] if dep.startswith(("src/", "stages/"))]
    assert sources == required_sources(script_of(stage)), "run: make deps"


def test_make_deps_changes_nothing_that_is_up_to_date() -> None:
    """The command that writes the lists and the test above agree."""
    text = DVC_YAML.read_text("utf-8")
    assert rewritten(text) == text


def test_neutral_modules_exist_and_are_few() -> None:
    """Each of them is a module of the package; the list may not swallow code that computes."""
    for name in NEUTRAL_MODULES:
        assert (ROOT / "src" / Path(*name.split("."))).with_suffix(".py").is_file(), name
    assert not NEUTRAL_MODULES & {"boltlm.params", "boltlm.records", "boltlm.shard_store"}


@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_of_a_neutral_module_makes_no_stage_stale(stage: str) -> None:
    """Progress, messages, timing, in-training validation, live logging, commands that compare."""
    deps = set(definition(stage)["deps"])
    compare = [] if stage == "report" else ["boltlm.evaluation.compare"]  # its summary compares
    for name in (*NEUTRAL_MODULES, "boltlm.cli", *compare):
        assert f"src/{name.replace('.', '/')}.py" not in deps


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage in STAGE_SETTINGS])
def test_a_stage_depends_on_exactly_the_params_that_it_reads(stage: str) -> None:
    """The keys of a stage's settings class are its `params` in dvc.yaml."""
    declared = {key.replace("${key}", "{name}") for key in definition(stage)["params"]}
    assert declared == settings_keys(STAGE_SETTINGS[stage])


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_params_build_the_settings_of_every_stage(path: Path) -> None:
    """Every entry has the right keys and types, and names entries that exist."""
    params = load(path)
    assert list(params_findings(params)) == []


@pytest.mark.parametrize("path", PARAMS[1:], ids=lambda path: path.stem)
def test_presets_have_the_sections_of_params(path: Path) -> None:
    """A preset replaces params.yaml as a whole, so it must say all that params.yaml says."""
    assert load(PARAMS[0]).keys() == load(path).keys()


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)
def test_an_override_leaves_the_layout_of_params_alone(path: Path) -> None:
    """`dvc exp run -S` writes the whole file anew. Ours is what DVC writes, but for `null`, for
    which it leaves the place empty."""
    text = path.read_text("utf-8")
    written = dumps_yaml(parse_yaml_for_update(text, str(path)))
    for ours, theirs in zip_longest(text.splitlines(), written.splitlines(), fillvalue=""):
        assert theirs in (ours, re.sub(r": null\b", ":     ", ours).rstrip())


# --- How the code is organised


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_itself_and_packages_before_it(package: str) -> None:
    """The order of the packages is that of the data; the EM loop closes in dvc.yaml."""
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    for path in (PACKAGE / package).rglob("*.py"):
        for name in imported_modules(path):
            parts = name.split(".")
            assert len(parts) == 2 or parts[1] in allowed, f"{path.name} imports {name}"
            assert name != "boltlm.cli", f"{path.name} imports the command line"


def test_shared_modules_import_no_package() -> None:
    """records, params, … are below all packages; the command line is above them."""
    for path in PACKAGE.glob("*.py"):
        for name in imported_modules(path) if path.stem != "cli" else ():
            assert name.count(".") == 1, f"{path.name} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """No import cycle, not even inside a package or inside functions."""
    for path in SOURCES:
        if path.name != "__init__.py":
            for name in imported_modules(path) - NEUTRAL_MODULES:
                assert module_name(path) not in import_closure(name), f"{path.name} and {name}"


def public_names(path: Path) -> Iterator[str]:
    """What a module defines at its top level under a public name."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            targets = itertools.chain.from_iterable(map(ast.walk, node.targets))
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_public_name_is_defined_in_two_modules() -> None:
    """A name that is searched for leads to one definition."""
    modules: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        for name in public_names(path):
            modules[name].append(module_name(path))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_and_files_are_short() -> None:
    """A function fits on a screen, a file on a few."""
    for path in [*SOURCES, *SCRIPTS]:
        limit = 60 if path.parent.name == "stages" else 300
        assert len(path.read_text("utf-8").splitlines()) <= limit, path
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 50, f"{path}: {node.name} has {lines} lines"


def test_only_entry_points_read_params() -> None:
    """Below the stages and the command line nothing takes params as a raw mapping."""
    readers = {"load", "load_settings", "build_settings"}
    for path in SOURCES:
        if path.name in ("params.py", "param_values.py", "cli.py") or path.parent.name in (
            "commands",
            "preflight",
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "boltlm.params":
                assert not readers & {alias.name for alias in node.names}, path
        for node in functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                raw = argument.annotation and "Mapping[str, Any]" in ast.unparse(
                    argument.annotation
                )
                assert not (raw and argument.arg in ("params", "values", "config")), path


UNSAFE = (
    r"\bimport (pickle|dill|shelve|marshal)\b",
    r"\bfrom (pickle|dill|shelve|marshal)\b",
    r"trust_remote_code\s*=\s*True",
    r"yaml\.(unsafe_load|full_load)\(|yaml\.load\((?!.*SafeLoader\))",
    r"torch\.load\((?![^)]*weights_only=True)",
    r"allow_pickle\s*=\s*True",
    r"(?<![.\w])(eval|exec)\(",
    r"shell\s*=\s*True",
)


@pytest.mark.parametrize("pattern", UNSAFE)
def test_no_file_that_is_read_can_run_code(pattern: str) -> None:
    """No pickle, no code of a model's repository, no YAML with objects, no shell."""
    for path in [*SOURCES, *SCRIPTS]:
        assert not re.search(pattern, path.read_text("utf-8")), path


# --- Documents


def test_readme_is_short_and_its_commands_exist() -> None:
    """Make targets, stages and sub-commands that a reader is told to use."""
    readme = (ROOT / "README.md").read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    params = load(ROOT / "params.yaml")
    sources = [path.read_text("utf-8") for path in (PACKAGE / "commands").glob("*.py")]
    declared = r'(?:add_command|add_parser)\((?:\w+, )?"([\w-]+)"'
    commands = set(re.findall(declared, "".join(sources)))
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        for target in re.findall(r"(?:^ *|`)make (\w+)", text, re.M):
            assert target in targets, f"{path.name}: make {target}"
        for command in re.findall(r"(?:^ *|`)boltlm ([a-z][\w-]*)", text, re.M):
            assert command in commands, f"{path.name}: {command}"
        sections = {"train": "models", "evaluate": "models", "teacher": "teachers"}
        for stage, name in re.findall(r"dvc repro (\w+)@(\w+)", text):
            assert name in params[sections.get(stage) or stage], f"{path.name}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_refer_to_files_that_exist(path: Path) -> None:
    """Links and paths in backticks."""
    text = path.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", text):
        assert (path.parent / target).exists(), target
    inside = r"`((?:presets|stages|src|tests|docs|benchmarks|boltlm)/[\w./-]*\w)`"
    for target in re.findall(inside, text):
        place = PACKAGE.parent / target if target.startswith("boltlm/") else ROOT / target
        assert place.exists(), target
    for name in re.findall(r"`(boltlm(?:\.\w+)+)`", text):
        parts = name.split(".")
        places = [PACKAGE.parent.joinpath(*parts[:n]) for n in (len(parts), len(parts) - 1)]
        assert any(p.with_suffix(".py").is_file() or p.is_dir() for p in places), name


def test_code_refers_to_documents_that_exist() -> None:
    """And never to one that is not in the repository."""
    for path in [*SOURCES, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))]:
        text = path.read_text("utf-8")
        assert not re.search(r"\bSPEC\b(?!\w)", text) or path.name == "test_policies.py", path
        for target in re.findall(r"\b(docs/\w+\.md)", text):
            assert (ROOT / target).is_file(), f"{path}: {target}"


def test_code_refers_to_sections_and_equations_of_the_method_that_exist() -> None:
    """`docs/method.md, 4.1` and `eq. (3)` lead somewhere."""
    method = (ROOT / "docs" / "method.md").read_text("utf-8")
    sections = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", method, re.M))
    equations = set(re.findall(r"\((\d+)\)", method))
    for path in SOURCES:
        text = re.sub(r"\s+", " ", path.read_text("utf-8"))
        for section in re.findall(r"docs/method\.md, (?:section )?(\d+(?:\.\d+)?)", text):
            assert section in sections, f"{path}: section {section}"
        for equation in re.findall(r"[Ee]q\. \((\d+)\)", text):
            assert equation in equations, f"{path}: equation {equation}"


def test_readme_draws_the_graph_that_dvc_has() -> None:
    """Every edge between two kinds of stages, and no other."""
    command = [sys.executable, "-m", "dvc", "dag", "--dot"]
    dag = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    edges = re.findall(r'"([\w@]+)" -> "([\w@]+)"', dag)
    kinds = {(one.split("@")[0], other.split("@")[0]) for one, other in edges}
    readme = (ROOT / "README.md").read_text("utf-8")
    (graph,) = re.findall(r"```mermaid\n(.*?)```", readme, re.S)
    drawn: set[tuple[str, str]] = set()
    for line in graph.splitlines():
        sides = [re.findall(r"[a-z]\w+", side) for side in line.split("-->")]
        for left, right in itertools.pairwise(sides):
            drawn |= set(itertools.product(left, right))
    assert drawn == kinds

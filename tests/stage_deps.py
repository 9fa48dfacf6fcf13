"""The source files that the dependencies of each stage in dvc.yaml must name: exactly those whose
code can change what the stage writes.

    python -m tests.stage_deps     # rewrites these lists in dvc.yaml (make deps)

The lists are made from imports (`boltlm.fingerprint.import_closure`); modules that cannot change an
output, NEUTRAL_MODULES, are not among them.
"""

import re
from pathlib import Path

from boltlm.fingerprint import NEUTRAL_MODULES, import_closure, imported_modules

ROOT = Path(__file__).resolve().parents[1]
DVC_YAML = ROOT / "dvc.yaml"
SCRIPT = re.compile(r"stages/\w+\.py")
# Data files of the package that modules read: the code that reads them, and what it reads.
PACKAGE_DATA = {
    "boltlm.evaluation.downstream": "src/boltlm/evaluation/tasks",
    "boltlm.reporting.html_report": "src/boltlm/reporting/report.html",
}


def required_sources(script: str) -> list[str]:
    """The sources that a stage's script can execute, and that can change an output; sorted paths
    relative to the repository."""
    modules: set[str] = set()
    for name in imported_modules(ROOT / script) - NEUTRAL_MODULES:
        modules |= import_closure(name)
    files = {f"src/{name.replace('.', '/')}.py" for name in modules}
    folders = {path for name, path in PACKAGE_DATA.items() if name in modules}
    covered = {file for file in files for folder in folders if file.startswith(f"{folder}/")}
    return [script, *sorted((files - covered) | folders)]


def rewritten(text: str) -> str:
    """dvc.yaml with the source files of every stage brought up to date."""
    lines: list[str] = []
    script = ""
    for line in text.splitlines():
        match = SCRIPT.search(line)
        if match and not line.strip().startswith("- "):
            script = match[0]
        if line.strip().startswith(("- src/", "- stages/")):
            continue
        lines.append(line)
        if line.strip() == "deps:":
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            lines += [f"{indent}- {path}" for path in required_sources(script)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DVC_YAML.write_text(rewritten(DVC_YAML.read_text("utf-8")), encoding="utf-8")

"""The check of an experiment, before any of it costs time or money.

Every stage begins with `check_params`, the stage `check` with `check_data` besides, and `boltlm
check` adds what the machine must have. Nothing here can change what a stage writes.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.param_values import Finding
from boltlm.params import load
from boltlm.preflight.graph import graph_findings
from boltlm.preflight.settings import settings_findings


def check_params(path: Path) -> None:
    """Raises UserError, one line for each finding, where a params file cannot be run: its keys,
    values, names, or the graph of its entries."""
    _refuse(path, params_findings(load(path)))


def check_data(path: Path) -> None:
    """As `check_params`; the files that params name must be there too and have the columns and
    tensors that are wanted of them."""
    from boltlm.preflight.data import data_findings

    params = load(path)
    _refuse(path, (*params_findings(params), *data_findings(params)))


def check_experiment(path: Path) -> None:
    """As `check_data`; the machine must have what the settings need too: packages, GPUs,
    servers, room on the disk of the current folder."""
    from boltlm.preflight.data import data_findings
    from boltlm.preflight.disk import disk_findings
    from boltlm.preflight.machine import machine_findings

    params = load(path)
    findings = [*params_findings(params)]
    if not findings:
        findings += disk_findings(params, Path.cwd())
    _refuse(path, (*findings, *data_findings(params), *machine_findings(params)))


def params_findings(params: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong in params themselves."""
    yield from settings_findings(params)
    yield from graph_findings(params)


def _refuse(path: Path, findings: Iterable[Finding]) -> None:
    """Raises UserError where there are findings, each of them once."""
    lines = list(dict.fromkeys(" ".join(f"{path}: {finding}".split()) for finding in findings))
    if lines:
        raise UserError("\nerror: ".join(lines))

"""The numbers of the whole experiment, read from the metrics folder; what is not there is absent.

    <metrics>/eval/<model>.json   <metrics>/latents/<entry>.json   <metrics>/train/<model>.csv
    <metrics>/finetune/<run>.json

Only what params.yaml names is read: files that another preset left are not part of the experiment.
"""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boltlm.figures.arms import Arm, arms, chain
from boltlm.params import section

Numbers = Mapping[str, float]
Point = tuple[str, float, int]  # metric, value, step: as tracking.py takes them


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A measure and its standard error, None where the measure has none."""

    value: float
    se: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """`measures` by model, `finetuned` by run of `finetune`, `diagnostics` by entry of `latents`,
    `generators`: who drew each of those, `histograms` of their log w; `curves` by model and by what
    models start from: the lines of a training curve. Nulls and texts are not in them."""

    arms: tuple[Arm, ...]
    measures: Mapping[str, Numbers]
    finetuned: Mapping[str, Numbers]
    diagnostics: Mapping[str, Numbers]
    generators: Mapping[str, str]
    curves: Mapping[str, list[dict[str, float]]]
    histograms: Mapping[str, list[dict[str, float]]]

    def number(self, model: str, metric: str) -> Number | None:
        """A model's measure, or None where it has none."""
        found = self.measures[model]
        if metric not in found:
            return None
        return Number(value=found[metric], se=found.get(f"{metric}_se"))

    def tasks(self) -> list[str]:
        """The tasks with an accuracy, but for the corpus's own questions."""
        keys = dict.fromkeys(key for measures in self.measures.values() for key in measures)
        found = [key.removesuffix("/accuracy") for key in keys if key.endswith("/accuracy")]
        return [task for task in found if not task.startswith("questions/")]

    def bound_sizes(self) -> list[int]:
        """Every K for which some model has a bound, rising."""
        keys = {key for measures in self.measures.values() for key in measures}
        found = (re.fullmatch(r"elbo_per_token_k(\d+)", key) for key in keys)
        return sorted(int(match[1]) for match in found if match)


def read(params: Mapping[str, Any], metrics: Path) -> Results:
    """What is there of the experiment's numbers."""
    found = arms(params)
    names = [arm.name for arm in found]
    parents = [section(params, f"models.{name}.parent") for name in names]
    curved = dict.fromkeys([parent for parent in parents if parent not in names] + names)
    entries = list(section(params, "latents"))
    runs = section(params, "finetune.runs")
    return Results(
        arms=found,
        measures={name: _numbers(metrics / "eval" / f"{name}.json") for name in names},
        finetuned={name: _numbers(metrics / "finetune" / f"{name}.json") for name in runs},
        diagnostics={name: _numbers(metrics / "latents" / f"{name}.json") for name in entries},
        generators={name: section(params, f"latents.{name}.model") for name in entries},
        curves={name: _curve(metrics / "train" / f"{name}.csv") for name in curved},
        histograms={name: _curve(metrics / "latents" / f"{name}.csv") for name in entries},
    )


def points(results: Results) -> list[Point]:
    """The chain's measures with the iteration as step, every model's as `<model>/<metric>`, every
    fine-tuning's as `finetune/<run>/<metric>`."""
    line = [
        (metric, value, arm.iteration or 0)
        for arm in chain(results.arms)
        for metric, value in results.measures[arm.name].items()
    ]
    each = [
        (f"{model}/{metric}", value, 0)
        for model, measures in results.measures.items()
        for metric, value in measures.items()
    ]
    tuned = [
        (f"finetune/{run}/{metric}", value, 0)
        for run, measures in results.finetuned.items()
        for metric, value in measures.items()
    ]
    return line + each + tuned


def parts(results: Results) -> dict[str, list[Point]]:
    """By model its training curve by step, and its measures; by `latents/<entry>` the
    diagnostics of those latents."""
    found: dict[str, list[Point]] = {}
    for model, lines in results.curves.items():
        curve = [
            (column, value, int(line["step"]))
            for line in lines
            for column, value in line.items()
            if column != "step"
        ]
        measures = results.measures.get(model, {})
        found[model] = curve + [(metric, value, 0) for metric, value in measures.items()]
    for run, measures in results.finetuned.items():
        found[f"finetune/{run}"] = [(metric, value, 0) for metric, value in measures.items()]
    for entry, diagnostics in results.diagnostics.items():
        found[f"latents/{entry}"] = [(metric, value, 0) for metric, value in diagnostics.items()]
    return found


def _numbers(path: Path) -> Numbers:
    if not path.exists():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: value
        for key, value in facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _curve(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [{key: float(value) for key, value in line.items() if value} for line in lines]

"""The settings of every stage: params.yaml as a whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from boltlm.corpus.split import SplitSettings
from boltlm.estep.config import EStepSettings
from boltlm.evaluation.config import BaseEvaluateSettings, CurveSettings, EvaluateSettings
from boltlm.evaluation.finetune_config import FinetuneSettings
from boltlm.param_types import CommandText, Name, Text
from boltlm.param_values import Finding, ParamsError
from boltlm.params import build_settings, from_key, settings_keys
from boltlm.reporting.arms import ReportSettings
from boltlm.reporting.experiment import FigureSettings
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.plan_config import PlanConfig
from boltlm.reporting.seed_tables import SeedsSettings
from boltlm.teachers.config import TeacherSettings
from boltlm.training.base_config import BaseSettings
from boltlm.training.config import TrainSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphSettings:
    """What dvc.yaml itself and `boltlm plan` read. `launcher`: the command that starts the stage
    `train`, such as `python` or `accelerate launch …`; it is executed as it stands."""

    launcher: Text
    inputs: Mapping[Name, CommandText]
    teacher_prompts: CommandText = from_key("prompts.teacher")
    fewshot_prompts: CommandText = from_key("prompts.fewshot")
    plan: PlanConfig


# The settings class of each stage that has one, besides `track`, which logs whatever params hold.
STAGE_SETTINGS: Mapping[str, type[Any]] = {
    "base": BaseSettings,
    "split": SplitSettings,
    "teacher": TeacherSettings,
    "train": TrainSettings,
    "latents": EStepSettings,
    "evaluate_base": BaseEvaluateSettings,
    "evaluate": EvaluateSettings,
    "curves": CurveSettings,
    "finetune": FinetuneSettings,
    "seeds": SeedsSettings,
    "figures": FigureSettings,
    "summary": ReportSettings,
    "report": HtmlReportSettings,
}
# The section of each stage that has an instance for every entry.
STAGE_SECTIONS: Mapping[str, str] = {
    "teacher": "teachers",
    "train": "models",
    "latents": "latents",
    "evaluate": "models",
    "curves": "curves",
    "finetune": "finetune.runs",
}


def section_entries(params: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """The entries of a section, given by a dotted key; none where it is not a mapping."""
    value: Any = params
    for part in section.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def settings_findings(params: Mapping[str, Any]) -> Iterator[Finding]:
    """Everything that the settings of a stage do not allow, and keys that no stage has."""
    yield from _unknown_keys(params)
    yield from _build_findings(GraphSettings, params, "")
    for stage, kind in STAGE_SETTINGS.items():
        section = STAGE_SECTIONS.get(stage)
        names = [""] if section is None else section_entries(params, section)
        for name in names:
            # Other names are findings of the whole section; dots and braces in them are no keys.
            if isinstance(name, str) and not set(name) & set(".{}"):
                yield from _build_findings(kind, params, name)


def _build_findings(kind: type[Any], params: Mapping[str, Any], name: str) -> Iterator[Finding]:
    try:
        build_settings(kind, params, name=name)
    except ParamsError as error:
        yield from error.findings


def _unknown_keys(params: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys at the top, or in a section of which stages read single keys, that no stage reads. The
    keys in other sections are those of the section's own settings class."""
    keys = {
        key for kind in [GraphSettings, *STAGE_SETTINGS.values()] for key in settings_keys(kind)
    }
    top = sorted({key.partition(".")[0] for key in keys})
    for name in params:
        if name not in top:
            yield Finding(str(name), f"; known here: {', '.join(top)}", "unknown key ")
    for name in sorted(set(top) - keys):
        known = sorted({key.split(".")[1] for key in keys if key.startswith(f"{name}.")})
        for inner in section_entries(params, name):
            if inner not in known:
                after = f"; known here: {', '.join(known)}"
                yield Finding(f"{name}.{inner}", after, "unknown key ")

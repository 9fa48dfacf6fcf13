"""The files that params.yaml names: corpora, benchmarks, prompts and a base model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from boltlm.corpus import sources
from boltlm.corpus.benchmarks import read_benchmark
from boltlm.corpus.readers import is_file_name
from boltlm.corpus.split import SplitSettings
from boltlm.errors import UserError
from boltlm.evaluation.fewshot import fewshot_examples
from boltlm.evaluation.task_spec import TaskSpec
from boltlm.param_values import Finding, ParamsError
from boltlm.params import build_settings
from boltlm.preflight.models import checkpoint_findings
from boltlm.preflight.settings import GraphSettings, section_entries
from boltlm.teachers.prompts import PARAPHRASE_STYLES, PromptTemplate


def data_findings(params: Mapping[str, Any]) -> Iterator[Finding]:
    """What is wrong with local files and folders, judged by their first row or their headers.
    Settings that cannot be built have findings of their own and are left out here."""
    try:
        graph = build_settings(GraphSettings, params)
    except ParamsError:
        return
    for name, path in graph.inputs.items():
        if not Path(path).exists():
            yield Finding(f"inputs.{name}", f": '{path}' does not exist; correct the path")
    yield from _prompt_findings(params, graph)
    try:
        settings = build_settings(SplitSettings, params)
    except ParamsError:
        settings = None
    if settings is not None:
        yield from _source_findings(settings)
    base = section_entries(params, "base")
    if base.get("kind") == "checkpoint" and isinstance(base.get("model"), str):
        yield from checkpoint_findings("base.model", base["model"])


def _source_findings(settings: SplitSettings) -> Iterator[Finding]:
    by_key = {f"corpora.{name}.source": entry.source for name, entry in settings.corpora.items()}
    if settings.questions.count:
        by_key["questions.source"] = settings.questions.source
    for key, source in by_key.items():
        if sources.local_path(source) is not None:
            unshuffled = dataclasses.replace(source, shuffle_buffer=0)
            read = sources.read_questions if key.startswith("q") else sources.read_documents
            yield from _first_row(key, lambda read=read, s=unshuffled: read(s, settings.data_seed))
    for name, path in settings.benchmarks.items():
        if is_file_name(path):
            key = f"benchmarks.{name}"
            yield from _first_row(key, lambda name=name, path=path: read_benchmark(name, path))


def _first_row(key: str, read: Callable[[], Iterator[Any]]) -> Iterator[Finding]:
    """A finding where a source has no row or a first row that cannot be used."""
    try:
        if next(iter(read()), None) is None:
            yield Finding(key, ": the source has no row; name another file")
    except (UserError, OSError) as error:
        yield Finding(key, f": {error}")


def _prompt_findings(params: Mapping[str, Any], graph: GraphSettings) -> Iterator[Finding]:
    """Templates of teachers that ask a model, and the examples of the prompt set `synthetic`."""
    for entry in section_entries(params, "teachers").values():
        task = entry.get("task") if isinstance(entry, Mapping) else None
        names = [f"wrap_orig.{style}" for style in PARAPHRASE_STYLES]
        for name in names if task == "wrap_orig" else [task] if isinstance(task, str) else []:
            try:
                PromptTemplate.read(Path(graph.teacher_prompts), name)
            except UserError as error:
                yield Finding("", str(error))
    tasks = section_entries(params, "evaluate").get("tasks")
    for text in tasks if isinstance(tasks, list) else []:
        try:
            spec = TaskSpec.parse(str(text))
        except UserError:
            continue
        if spec.prompts == "synthetic":
            try:
                fewshot_examples(spec.task, spec.prompts, "", Path(graph.fewshot_prompts))
            except UserError as error:
                yield Finding("", str(error))

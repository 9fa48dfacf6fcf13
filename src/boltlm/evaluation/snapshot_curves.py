"""The stage `curves`: every snapshot of a training (`boltlm.training.snapshots`) is evaluated as
the stage `evaluate` evaluates a model, after the training and apart from it."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.estep.config import SamplingConfig
from boltlm.estep.worker_processes import Workers, run_tasks, threads_per_worker
from boltlm.evaluation.config import CurveSettings
from boltlm.evaluation.curve_points import CurvePoint
from boltlm.evaluation.run import EvaluationPaths, evaluate_model
from boltlm.evaluation.task_runner import task_data, task_facts
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.progress import Progress
from boltlm.records import Chunk, Document, read_shard, shard_paths, write_json, write_shard
from boltlm.shard_store import exclusive_lock
from boltlm.training.continual import RAW_TOKENS_KEY, TRAINING_FILE


@dataclass(frozen=True, slots=True)
class CurvePaths:
    """The folder of a model's snapshots, the splits and the chunks of all corpora, the file of the
    synthetic few-shot examples, and the folder of unfinished work."""

    snapshots: Path
    split: Path
    chunks: Path
    fewshot: Path
    work: Path


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A snapshot to evaluate, the facts of its TRAINING_FILE, and the file of its metrics."""

    settings: CurveSettings
    paths: CurvePaths
    folder: Path
    facts: Mapping[str, int]
    result: Path

    @property
    def label(self) -> str:
        return f"curves {self.settings.name}, step {self.facts['steps']}"

    def measure(self, wait: bool) -> bool:
        """Write the metrics; see `run_tasks`."""
        with exclusive_lock(self.result, self.label, wait=wait) as is_held:
            if is_held and not self.result.is_file():
                tables = self.result.with_suffix(".tables")  # of no use when the metrics are known
                paths = self.paths
                evaluated = EvaluationPaths(
                    self.folder, paths.split, paths.chunks, paths.fewshot, paths.work, tables
                )
                evaluation = self.settings.evaluation(self.facts["steps"])
                likelihood = self.settings.entry.likelihood
                write_json(
                    self.result, evaluate_model(evaluation, evaluated, with_likelihood=likelihood)
                )
                shutil.rmtree(tables)
            return is_held


def measure_curves(settings: CurveSettings, paths: CurvePaths) -> list[CurvePoint]:
    """The metrics of every snapshot, in the order of their steps.

    Several are evaluated at once where `sampling.workers` says so. The metrics of a finished
    snapshot are stored in `paths.work` under a fingerprint of all that they depend on, and within a
    snapshot finished work is stored too. Raises UserError where there are no snapshots, or the
    process of a worker dies.
    """
    snapshots = _find_snapshots(settings, paths)
    missing = {s.label: s for s in snapshots if not s.result.is_file()}
    what = f"curves {settings.name}"
    with Progress(what=what, total=len(snapshots), unit="snapshots") as progress:
        progress.advance(len(snapshots) - len(missing))
        if missing:
            workers, sampling = _divide_workers(settings, len(missing))
            part = replace(settings, sampling=sampling)
            tasks = {label: replace(s, settings=part) for label, s in missing.items()}
            for _ in run_tasks(_Snapshot.measure, tasks, workers):
                progress.advance(1)
    return [
        point
        for snapshot in snapshots
        for point in _points(
            snapshot.facts, json.loads(snapshot.result.read_text(encoding="utf-8"))
        )
    ]


def _find_snapshots(settings: CurveSettings, paths: CurvePaths) -> list[_Snapshot]:
    folders = sorted(paths.snapshots.glob("step-*"))
    if not folders:
        raise UserError(
            f"{paths.snapshots}: no snapshots in it; set models.{settings.name}.train.snapshots to"
            " {every: …, precision: bfloat16}, or remove the entry from `curves`"
        )
    paths = _first_documents(settings, paths)
    shared = _shared_facts(settings, paths)
    with ThreadPoolExecutor(settings.sampling.workers) as pool:
        digests = list(pool.map(hash_path, folders))
    snapshots: list[_Snapshot] = []
    for folder, digest in zip(folders, digests, strict=True):
        facts = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
        result = paths.work / "curves" / f"{fingerprint({**shared, 'model': digest})}.json"
        snapshots.append(_Snapshot(settings, paths, folder, facts, result))
    return snapshots


def _divide_workers(settings: CurveSettings, num_snapshots: int) -> tuple[Workers, SamplingConfig]:
    """The workers over snapshots, and the section `sampling` for each of them: `sampling.workers`
    evaluate as many snapshots at once, and where there are fewer snapshots the draws of each have
    an equal part of the workers. On a Ray cluster only draws have several workers."""
    config = settings.sampling
    is_local = config.executor == "local"
    count = min(config.workers, num_snapshots) if is_local else 1
    inner = config.workers // count
    threads = threads_per_worker(config.threads, config.workers) if is_local else config.threads
    workers = Workers(
        count=count,
        gpus_per_worker=int(config.gpus_per_worker) * inner if is_local else 0,
        threads=threads,
        isolated=settings.entry.evaluate.backend == "vllm",
        key="sampling.workers",
    )
    return workers, replace(config, workers=inner, threads=threads)


def _points(facts: Mapping[str, int], metrics: Mapping[str, float | None]) -> list[CurvePoint]:
    """The points of one snapshot. `facts`: its TRAINING_FILE."""
    return [
        CurvePoint(
            step=facts["steps"],
            tokens=facts["tokens"],
            raw_tokens=facts[RAW_TOKENS_KEY],
            metric=name,
            value=value,
            se=metrics.get(f"{name}_se"),
        )
        for name, value in metrics.items()
        if not name.endswith("_se")
    ]


def _shared_facts(settings: CurveSettings, paths: CurvePaths) -> dict[str, Any]:
    """Everything that the metrics depend on besides the snapshot."""
    config, specs = settings.entry.evaluate, settings.evaluation(0).task_specs
    folders: list[Path] = []
    for corpus in (config.corpus, *config.extra_corpora) if settings.entry.likelihood else ():
        folders += [paths.split / corpus, paths.chunks / corpus]
    return {
        "entry": asdict(settings.entry),
        "draws": [settings.seed, settings.context_chunks, settings.max_latent_tokens],
        "sampling": settings.sampling.fingerprint_facts,
        "format": settings.model.format,
        "fewshot": hash_path(paths.fewshot),
        "data": [hash_path(folder) for folder in folders],
        "tasks": [
            task_facts(spec, task_data(spec, settings.benchmarks, paths.split)) for spec in specs
        ],
        "code": hash_code("boltlm.evaluation.snapshot_curves"),
    }


def _first_documents(settings: CurveSettings, paths: CurvePaths) -> CurvePaths:
    """The paths to evaluate on the first `documents` of each held-out corpus, which are stored
    in the work folder; `paths` itself where all of them are wanted."""
    entry = settings.entry
    if entry.documents is None or not entry.likelihood:
        return paths
    corpora = (entry.evaluate.corpus, *entry.evaluate.extra_corpora)
    data = [hash_path(root / corpus) for corpus in corpora for root in (paths.split, paths.chunks)]
    questions = paths.split / "questions"
    facts = {"documents": entry.documents, "data": data, "questions": hash_path(questions)}
    folder = paths.work / "curves" / f"first-{fingerprint(facts)}"
    with exclusive_lock(folder, f"curves {settings.name}"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a killed process
            target = partial / "split" / "questions"
            shutil.copytree(questions, target, copy_function=shutil.copyfile)
            for corpus in corpora:
                _write_first_documents(paths, corpus, entry.documents, partial)
            partial.replace(folder)
    return replace(paths, split=folder / "split", chunks=folder / "chunks")


def _write_first_documents(paths: CurvePaths, corpus: str, count: int, folder: Path) -> None:
    """Write the first `count` documents of a corpus and their chunks to `folder`."""
    remaining = count
    for path in shard_paths(paths.chunks / corpus):
        documents = read_shard(paths.split / corpus / path.name, Document)[:remaining]
        if not documents:
            break
        remaining -= len(documents)
        doc_ids = {document.doc_id for document in documents}
        chunks = [chunk for chunk in read_shard(path, Chunk) if chunk.doc_id in doc_ids]
        write_shard(folder / "split" / corpus / path.name, Document, documents)
        write_shard(folder / "chunks" / corpus / path.name, Chunk, chunks)

"""The stage `curves`: every snapshot of a training (`boltlm.training.snapshots`) is evaluated as
the stage `evaluate` evaluates a model, after the training and apart from it."""

import glob
import json
import multiprocessing
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.evaluation.config import BaseEvaluateSettings, CurveSettings
from boltlm.evaluation.curve_points import CurvePoint
from boltlm.evaluation.downstream import TASK_DIR
from boltlm.evaluation.run import EvaluationPaths, evaluate_model
from boltlm.evaluation.task_spec import TaskSpec
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


def measure_curves(settings: CurveSettings, paths: CurvePaths) -> list[CurvePoint]:
    """The metrics of every snapshot, in the order of their steps.

    The metrics of a finished snapshot are stored in `paths.work` under a fingerprint of all that
    they depend on, and within a snapshot finished work is stored too. Raises UserError where there
    are no snapshots.
    """
    folders = sorted(paths.snapshots.glob("step-*"))
    if not folders:
        raise UserError(
            f"{paths.snapshots}: no snapshots in it; set models.{settings.name}.train.snapshots to"
            " {every: …, precision: bfloat16}, or remove the entry from `curves`"
        )
    paths = _first_documents(settings, paths)
    shared = _shared_facts(settings, paths)
    points: list[CurvePoint] = []
    with Progress(what=f"curves {settings.name}", total=len(folders), unit="snapshots") as progress:
        for folder in folders:
            facts = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
            key = fingerprint({**shared, "model": hash_path(folder)})
            result = paths.work / "curves" / f"{key}.json"
            with exclusive_lock(result, f"curves {settings.name}"):
                if not result.is_file():
                    tables = result.with_suffix(".tables")  # of no use when the metrics are known
                    evaluated = EvaluationPaths(
                        folder, paths.split, paths.chunks, paths.fewshot, paths.work, tables
                    )
                    evaluation = settings.evaluation(facts["steps"])
                    write_json(result, _evaluate(evaluation, evaluated, settings.entry.likelihood))
                    shutil.rmtree(tables)
            points += _points(facts, json.loads(result.read_text(encoding="utf-8")))
            progress.advance(1)
    return points


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


def _evaluate(
    settings: BaseEvaluateSettings, paths: EvaluationPaths, with_likelihood: bool
) -> dict[str, float]:
    """The metrics of one snapshot. vLLM gives memory back only when its process ends, so that each
    snapshot has a process of its own where vLLM is used."""
    if "vllm" not in (settings.evaluate.backend, settings.sampling.sampler):
        return evaluate_model(settings, paths, with_likelihood=with_likelihood)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            arguments = (settings, paths)
            future = pool.submit(evaluate_model, *arguments, with_likelihood=with_likelihood)
            return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"curves {settings.name}: the process died (killed, or out of memory); what is finished"
            " is stored, run again to resume"
        ) from error


def _shared_facts(settings: CurveSettings, paths: CurvePaths) -> dict[str, Any]:
    """Everything that the metrics depend on besides the snapshot."""
    config = settings.entry.evaluate
    folders = [paths.split / "questions"]
    for corpus in (config.corpus, *config.extra_corpora) if settings.entry.likelihood else ():
        folders += [paths.split / corpus, paths.chunks / corpus]
    sources = settings.benchmarks.items()
    return {
        "entry": asdict(settings.entry),
        "draws": [settings.seed, settings.context_chunks, settings.max_latent_tokens],
        "sampling": settings.sampling.fingerprint_facts,
        "format": settings.model.format,
        "fewshot": hash_path(paths.fewshot),
        "data": [hash_path(folder) for folder in folders],
        "benchmarks": {
            task: [hash_path(Path(path)) for path in sorted(glob.glob(source))] or source
            for task, source in sources
        },
        "tasks": [
            (TASK_DIR / f"{TaskSpec.parse(task).task}.yaml").read_text(encoding="utf-8")
            for task in config.tasks
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

"""The stage `evaluate`: likelihood measures and task accuracies of one model.

`models.<name>` becomes the metrics of docs/method.md, sections 5 and 6, and tables with every
sampled latent, every document's score and every answer.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boltlm import checkpoint
from boltlm.corpus.benchmarks import STEM_SUBJECTS
from boltlm.corpus.reference_latents import reference_latents
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.run import draw_latents, shard_task
from boltlm.estep.shard_worker import group_by_chunk
from boltlm.evaluation import downstream, fewshot, likelihood
from boltlm.evaluation.config import BaseEvaluateSettings, LargeKConfig
from boltlm.evaluation.downstream import TaskAnswer, TaskOptions
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.evaluation.task_runner import TaskRunner, task_data
from boltlm.evaluation.task_spec import TaskSpec
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import (
    Chunk,
    Document,
    Sample,
    read_shard,
    read_table,
    shard_name,
    shard_paths,
    write_shard,
)
from boltlm.shard_store import mark_complete, run_shards
from boltlm.tokens import TextCoder

# The tables in the output folder of a model; the first two have a folder for each held-out corpus,
# the third for the main one.
RAW_TABLE, LATENT_TABLE, LARGE_K_TABLE, ANSWER_TABLE = "raw", "likelihood", "large_k", "answers"


@dataclass(frozen=True, slots=True)
class EvaluationPaths:
    """The model's folder, the splits and the chunks of all corpora, the file of the synthetic
    few-shot examples, the folder of unfinished work, and the output folder of the tables."""

    model: Path
    split: Path
    chunks: Path
    fewshot: Path
    work: Path
    out: Path


def evaluate_model(
    settings: BaseEvaluateSettings, paths: EvaluationPaths, *, with_likelihood: bool = True
) -> dict[str, float]:
    """Evaluate a model on the held-out corpora and the tasks; write the tables, return the metrics.

    A model without latents has no ELBO and is not evaluated in latent space. `with_likelihood`:
    false leaves out the held-out corpora. Finished work is stored in `paths.work` under a
    fingerprint of everything that it depends on, so that an interrupted evaluation resumes where it
    stopped. Raises UserError where a task has no questions, or a corpus no chunks.
    """
    weights = checkpoint.final_weights(paths.model)
    model_digest = hash_path(weights)
    config, label = settings.evaluate, f"evaluate {settings.name}"
    tasks = [(spec, _task_options(settings, spec, weights, paths)) for spec in settings.task_specs]
    metrics: dict[str, float] = {}
    for corpus in (config.corpus, *config.extra_corpora) if with_likelihood else ():
        corpus_metrics = _evaluate_corpus(settings, corpus, paths, model_digest, label)
        prefix = "" if corpus == config.corpus else f"{corpus}/"
        metrics |= {f"{prefix}{name}": value for name, value in corpus_metrics.items()}
    if with_likelihood and settings.has_latents and config.large_k:
        metrics |= _large_k_metrics(settings, config.large_k, paths, label)
    runner = TaskRunner(
        weights,
        model_digest=model_digest,
        backend=config.backend,
        batch_size=config.batch_size,
        sampling=settings.sampling,
        seed=settings.seed,
        work=paths.work,
        label=label,
    )
    if (paths.out / ANSWER_TABLE).exists():
        shutil.rmtree(paths.out / ANSWER_TABLE)
    for index, (spec, options) in enumerate(tasks):
        answers = runner.run(spec, options)
        write_shard(paths.out / ANSWER_TABLE / shard_name(index), TaskAnswer, answers)
        metrics |= downstream.task_metrics(answers, label)
    return metrics


def _task_options(
    settings: BaseEvaluateSettings, spec: TaskSpec, weights: Path, paths: EvaluationPaths
) -> TaskOptions:
    """How a task is run. The corpus's own questions need no thought in raw space: the answer is the
    next sentence, and a model with latents is told by SoL EoL that no latent comes before it."""
    config = settings.evaluate
    # Fails before any work is done where the installed lm-eval lacks the few-shot examples.
    fewshot.fewshot_examples(spec.task, spec.prompts, STEM_SUBJECTS[0], paths.fewshot)
    thoughtless = spec.task == "questions" and spec.space == "raw"
    return TaskOptions(
        data_path=task_data(spec, settings.benchmarks, paths.split),
        fewshot=paths.fewshot,
        tokenizer=weights,
        max_answer_tokens=config.max_answer_tokens
        + (0 if thoughtless else config.max_thought_tokens),
        no_latent=thoughtless and settings.has_latents,
        cues=config.cues,
        limit=config.limit,
    )


def _evaluate_corpus(
    settings: BaseEvaluateSettings,
    corpus: str,
    paths: EvaluationPaths,
    model_digest: str,
    label: str,
) -> dict[str, float]:
    """The likelihood measures on one held-out corpus; with the ELBO where the model has latents."""
    chunks, label = paths.chunks / corpus, f"{label}, {corpus}"
    scores = _score_text(settings, chunks, paths, model_digest, label)
    metrics = likelihood.nll_metrics(scores)
    if settings.has_latents:
        sizes = settings.evaluate.k_samples
        out = paths.out / LATENT_TABLE / corpus
        task = shard_task(
            settings,
            "evaluate",
            model=paths.model,
            chunks=chunks,
            work=paths.work,
            num_samples=max(sizes),
        )
        draw_latents(task, out, f"{label}, bounds")
        groups = group_by_chunk(iter(read_table(out, Sample)))
        lengths = [len(chunk.tokens) for chunk in read_table(chunks, Chunk)]
        clusters = {score.doc_id: score.cluster for score in scores}
        metrics |= likelihood.elbo_metrics(groups, lengths, sizes, clusters)
        diagnostics = WeightDiagnostics(groups, reference_latents(paths.split / corpus, chunks))
        metrics |= diagnostics.diagnostics() | diagnostics.exact_match_metrics()
    return metrics


def _large_k_metrics(
    settings: BaseEvaluateSettings, config: LargeKConfig, paths: EvaluationPaths, label: str
) -> dict[str, float]:
    """The bound with a large K, and with the largest of `k_samples` from the same draws, on the
    first documents of the main held-out corpus; names begin with `subset/`."""
    corpus = settings.evaluate.corpus
    scores = list(read_table(paths.out / RAW_TABLE / corpus, DocumentScore))[: config.documents]
    clusters = {score.doc_id: score.cluster for score in scores}
    chunks = [c for c in read_table(paths.chunks / corpus, Chunk) if c.doc_id in clusters]
    facts = {"chunks": hash_path(paths.chunks / corpus), "documents": config.documents}
    subset = paths.work / "evaluate" / fingerprint(facts)
    write_shard(subset / shard_name(0), Chunk, chunks)
    out = paths.out / LARGE_K_TABLE / corpus
    task = shard_task(
        settings,
        "evaluate",
        model=paths.model,
        chunks=subset,
        work=paths.work,
        num_samples=config.k_samples,
    )
    draw_latents(task, out, f"{label}, {corpus}, K = {config.k_samples}")
    groups = group_by_chunk(read_table(out, Sample))
    lengths = [len(chunk.tokens) for chunk in chunks]
    sizes = (max(settings.evaluate.k_samples), config.k_samples)
    metrics = likelihood.elbo_metrics(groups, lengths, sizes, clusters)
    metrics = {name: value for name, value in metrics.items() if name.startswith("elbo_per_token")}
    metrics |= {"documents": len(scores), "clusters": len(set(clusters.values()))}
    return {f"subset/{name}": value for name, value in metrics.items()}


def _score_text(
    settings: BaseEvaluateSettings,
    chunks: Path,
    paths: EvaluationPaths,
    model_digest: str,
    label: str,
) -> list[DocumentScore]:
    """The scores of every document of a corpus, a shard at a time."""
    names = [path.name for path in shard_paths(chunks)]
    sampling, split = settings.sampling, paths.split / chunks.name
    facts = {
        "model": model_digest,
        "has_latents": settings.has_latents,
        "context": [settings.context_chunks, settings.max_latent_tokens],
        "documents": hash_path(split),
        "chunks": hash_path(chunks),
        "precision": sampling.precision,
        "code": hash_code("boltlm.evaluation.likelihood"),
    }
    work = paths.work / "evaluate" / fingerprint(facts)

    def score_shards(missing: list[str]) -> Iterator[None]:
        checkpoint.keep_freed_memory()
        weights = checkpoint.final_weights(paths.model)
        model, coder = checkpoint.load_model(weights, sampling.precision), TextCoder(weights)
        for name in missing:
            documents = read_shard(split / name, Document)
            scores = likelihood.score_documents(
                model,
                coder,
                settings,
                documents,
                read_shard(chunks / name, Chunk),
                has_latents=settings.has_latents,
            )
            write_shard(work / name, DocumentScore, scores)
            mark_complete(work / name)
            yield

    out = paths.out / RAW_TABLE / chunks.name
    run_shards(names, score_shards, work=work, out=out, what=f"{label}, text")
    return list(read_table(out, DocumentScore))

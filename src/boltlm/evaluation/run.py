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
from boltlm.estep.run import draw_latents
from boltlm.estep.shard_worker import group_by_chunk
from boltlm.evaluation import downstream, fewshot, likelihood
from boltlm.evaluation.config import EvaluateSettings
from boltlm.evaluation.downstream import TaskAnswer, TaskOptions
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.evaluation.task_runner import TaskRunner, task_data
from boltlm.evaluation.task_spec import TaskSpec
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import (
    Chunk,
    Sample,
    read_shard,
    read_table,
    shard_name,
    shard_paths,
    write_shard,
)
from boltlm.shard_store import mark_complete, run_shards
from boltlm.tokens import TextCoder

# The tables in the output folder of a model; the first two have a folder for each held-out corpus.
RAW_TABLE, LATENT_TABLE, ANSWER_TABLE = "raw", "likelihood", "answers"


@dataclass(frozen=True, slots=True)
class EvaluationPaths:
    """The model's folder, the splits and the chunks of all corpora, the folder of unfinished work,
    and the output folder of the tables."""

    model: Path
    split: Path
    chunks: Path
    work: Path
    out: Path


def evaluate_model(settings: EvaluateSettings, paths: EvaluationPaths) -> dict[str, float]:
    """Evaluate a model on the held-out corpora and the tasks; write the tables, return the metrics.

    A model without latents has no ELBO and is evaluated in raw space only. Finished work is stored
    in `paths.work` under a fingerprint of everything that it depends on, so that an interrupted
    evaluation resumes where it stopped. Raises UserError where a task has no questions, or a corpus
    no chunks.
    """
    weights = checkpoint.final_weights(paths.model)
    model_digest = hash_path(weights)
    config, label = settings.evaluate, f"evaluate {settings.name}"
    tasks = [
        (spec, _task_options(settings, spec, weights, paths.split)) for spec in settings.task_specs
    ]
    metrics: dict[str, float] = {}
    for corpus in (config.corpus, *config.extra_corpora):
        corpus_metrics = _evaluate_corpus(settings, corpus, paths, model_digest, label)
        prefix = "" if corpus == config.corpus else f"{corpus}/"
        metrics |= {f"{prefix}{name}": value for name, value in corpus_metrics.items()}
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
    settings: EvaluateSettings, spec: TaskSpec, weights: Path, split: Path
) -> TaskOptions:
    """How a task is run. The corpus's own questions need no thought in raw space: the answer is the
    next sentence, and a model with latents is told by SoL EoL that no latent comes before it."""
    config = settings.evaluate
    # Fails before any work is done where the installed lm-eval lacks the few-shot examples.
    fewshot.fewshot_examples(spec.task, spec.prompts, STEM_SUBJECTS[0])
    thoughtless = spec.task == "questions" and spec.space == "raw"
    return TaskOptions(
        data_path=task_data(spec, settings.benchmarks, split),
        tokenizer=weights,
        max_answer_tokens=config.max_answer_tokens
        + (0 if thoughtless else config.max_thought_tokens),
        no_latent=thoughtless and settings.has_latents,
        limit=config.limit,
    )


def _evaluate_corpus(
    settings: EvaluateSettings, corpus: str, paths: EvaluationPaths, model_digest: str, label: str
) -> dict[str, float]:
    """The likelihood measures on one held-out corpus; with the ELBO where the model has latents."""
    chunks, label = paths.chunks / corpus, f"{label}, {corpus}"
    scores = _score_raw_text(settings, chunks, paths, model_digest, label)
    metrics = likelihood.nll_metrics(scores)
    metrics["heldout_documents"] = len(scores)
    metrics["heldout_tokens"] = sum(score.tokens for score in scores)
    if settings.has_latents:
        sizes = settings.evaluate.k_samples
        out = paths.out / LATENT_TABLE / corpus
        draw_latents(
            settings,
            "evaluate",
            model=paths.model,
            chunks=chunks,
            work=paths.work,
            out=out,
            num_samples=max(sizes),
            what=f"{label}, bounds",
        )
        groups = group_by_chunk(iter(read_table(out, Sample)))
        lengths = [len(chunk.tokens) for chunk in read_table(chunks, Chunk)]
        metrics |= likelihood.elbo_metrics(groups, lengths, sizes)
        diagnostics = WeightDiagnostics(groups, reference_latents(paths.split / corpus, chunks))
        metrics |= diagnostics.diagnostics() | diagnostics.exact_match_metrics()
    return metrics


def _score_raw_text(
    settings: EvaluateSettings, chunks: Path, paths: EvaluationPaths, model_digest: str, label: str
) -> list[DocumentScore]:
    """−log p of the raw text of every document of a corpus, a shard at a time."""
    names = [path.name for path in shard_paths(chunks)]
    sampling = settings.sampling
    facts = {
        "model": model_digest,
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
            documents = likelihood.join_chunks(read_shard(chunks / name, Chunk))
            scores = likelihood.score_documents(
                model, coder.special_tokens, documents, coder.context_length, sampling.batch_tokens
            )
            write_shard(work / name, DocumentScore, scores)
            mark_complete(work / name)
            yield

    out = paths.out / RAW_TABLE / chunks.name
    run_shards(names, score_shards, work=work, out=out, what=f"{label}, raw")
    return list(read_table(out, DocumentScore))

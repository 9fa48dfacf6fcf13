"""The E-step over a corpus: the stage `latents`, which writes `data/latents/<name>`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from boltlm import checkpoint
from boltlm.estep.config import DrawSettings, EStepOptions, EStepSettings
from boltlm.estep.contexts import Throughput
from boltlm.estep.diagnostics import UNUSABLE_FRACTION, WeightDiagnostics
from boltlm.estep.executors import execute_shards
from boltlm.estep.shard_summary import ShardSummary, summarize_shard
from boltlm.estep.shard_worker import ShardTask
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import shard_paths
from boltlm.shard_store import run_shards


def run_estep(
    settings: EStepSettings,
    *,
    model: Path,
    split: Path,
    chunks: Path,
    previous: Path,
    previous_model: Path,
    work: Path,
    out: Path,
    histogram_path: Path,
) -> tuple[dict[str, int | float], dict[str, float]]:
    """Sample, weight and select latents for every chunk of a corpus (docs/method.md, section 4).

    Writes the samples to `out` and the histogram of log w to `histogram_path` (CSV). Returns the
    diagnostics of section 4.3, with exact-match fractions where the data set provides latents, and
    the wall-clock figures of the draws made in this run (empty if none were made). Random numbers
    are keyed by the name of the model, so entries with the same model share their draws.
    `previous`, `previous_model`: latents to reuse and the model that drew them, read only where
    the estimator does so. Raises UserError where the model or the chunks are missing, or a worker
    process dies.
    """
    reuse = settings.options.reuse
    task = shard_task(
        settings,
        f"estep {settings.entry.model}",
        model=model,
        chunks=chunks,
        work=work,
        num_samples=settings.num_samples,
        previous=previous if reuse != "none" else None,
        previous_model=previous_model if reuse == "draws" else None,
    )
    summarize = partial(summarize_shard, task, split.resolve())
    throughputs = draw_latents(task, out, f"latents {settings.name}", finish=summarize)
    total = ShardSummary()
    for path in shard_paths(chunks):
        total.add(summarize(path.name))
    _write_histogram(histogram_path, total.diagnostics)
    metrics = total.diagnostics.diagnostics() | total.diagnostics.exact_match_metrics()
    metrics["forward_tokens"] = total.forward_tokens
    _warn_of_forced_draws(settings, metrics["forced_fraction"])
    if not settings.options.extra_draws and reuse != "draws":  # with them the mean is biased
        metrics["bound_per_token"] = total.diagnostics.sums["log_mean_weight"] / total.text_tokens
    return metrics, _wall_clock_figures(throughputs)


def _warn_of_forced_draws(settings: EStepSettings, forced_fraction: float) -> None:
    if forced_fraction > UNUSABLE_FRACTION:
        print(
            f"warning: latents.{settings.name}: {forced_fraction:.0%} of the latents were cut at"
            f" max_latent_tokens ({settings.max_latent_tokens}), so most are no complete thoughts;"
            f" train {settings.entry.model} longer, raise max_latent_tokens, or take a larger base"
            " model (boltlm try shows some)",
            file=sys.stderr,
            flush=True,
        )


def _write_histogram(path: Path, diagnostics: WeightDiagnostics) -> None:
    bins = (",".join(map(str, line)) for line in diagnostics.histogram())
    lines = ["from_nats,to_nats,count", *bins]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shard_task(
    settings: DrawSettings,
    purpose: str,
    *,
    model: Path,
    chunks: Path,
    work: Path,
    num_samples: int,
    previous: Path | None = None,
    previous_model: Path | None = None,
) -> ShardTask:
    """The task of drawing `num_samples` samples of every chunk in `chunks`. `purpose` keys their
    random numbers.

    Its work folder is named by a fingerprint of the model's and the chunks' contents, the settings
    and the code: an interrupted run resumes, and one with another number of samples or other
    options of the estimator reuses the draws from the proposal that exist.
    """
    facts = {
        "purpose": purpose,
        "model": hash_path(checkpoint.final_weights(model)),
        "chunks": hash_path(chunks),
        "seed": settings.seed,
        "context_chunks": settings.context_chunks,
        "max_latent_tokens": settings.max_latent_tokens,
        "sampling": [settings.sampling.fingerprint_facts, settings.options.temperature],
        "code": hash_code("boltlm.estep.shard_worker"),
    }
    return ShardTask(
        settings=settings,
        purpose=purpose,
        model=model.resolve(),
        chunks=chunks.resolve(),
        folder=(work / "latents" / fingerprint(facts)).resolve(),
        variant=_variant(settings.options, previous, previous_model),
        num_samples=num_samples,
        previous=previous and previous.resolve(),
        previous_model=previous_model and previous_model.resolve(),
    )


def draw_latents(
    task: ShardTask, out: Path, what: str, *, finish: Callable[[str], object] | None = None
) -> list[Throughput]:
    """Write the samples of `task` to `out`, one shard per shard of its chunks; finished shards are
    saved in its work folder. `what` labels the progress display; `finish` is called with each shard
    by the worker that has drawn it. Returns the throughput of each shard that this run drew."""
    return run_shards(
        [path.name for path in shard_paths(task.chunks)],
        lambda shards: execute_shards(task, shards, finish),
        work=task.samples_folder(task.num_samples),
        out=out,
        what=what,
        workers=task.settings.sampling.workers,
    )


def _variant(options: EStepOptions, previous: Path | None, previous_model: Path | None) -> str:
    """A name for the estimator that does not depend on K."""
    facts: dict[str, object] = asdict(options)
    if previous is not None:
        facts["previous"] = hash_path(previous)
    if previous_model is not None:
        facts["previous_model"] = hash_path(checkpoint.final_weights(previous_model))
    return fingerprint(facts)


def _wall_clock_figures(throughputs: Sequence[Throughput]) -> dict[str, float]:
    """Totals over the draws made in this run, by all workers; empty if there were none."""
    sampled_tokens = sum(throughput.sampled_tokens for throughput in throughputs)
    if not sampled_tokens:
        return {}
    sample_seconds = sum(throughput.sample_seconds for throughput in throughputs)
    score_seconds = sum(throughput.score_seconds for throughput in throughputs)
    scored_tokens = sum(throughput.scored_tokens for throughput in throughputs)
    seconds = sample_seconds + score_seconds
    return {
        "seconds": seconds,
        "sampled_tokens_per_second": sampled_tokens / max(sample_seconds, 1e-9),
        "scored_tokens_per_second": scored_tokens / max(score_seconds, 1e-9),
        "sampling_time_fraction": sample_seconds / max(seconds, 1e-9),
    }

"""The E-step over a corpus: the stage `latents`, which writes `data/latents/<name>`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from boltlm import checkpoint
from boltlm.corpus.reference_latents import shard_reference_latents
from boltlm.estep.config import DrawSettings, EStepOptions, EStepSettings
from boltlm.estep.contexts import Throughput, chunks_in_context, forward_tokens
from boltlm.estep.diagnostics import UNUSABLE_FRACTION, WeightDiagnostics
from boltlm.estep.executors import execute_shards
from boltlm.estep.shard_worker import ShardTask, context_token_budget, group_by_chunk
from boltlm.estep.smc import smc_forward_tokens
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import Chunk, Sample, read_shard, shard_paths
from boltlm.shard_store import run_shards
from boltlm.tokens import TextCoder


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
    throughputs = draw_latents(
        settings,
        f"estep {settings.entry.model}",
        model=model,
        chunks=chunks,
        work=work,
        out=out,
        num_samples=settings.num_samples,
        what=f"latents {settings.name}",
        previous=previous if reuse != "none" else None,
        previous_model=previous_model if reuse == "draws" else None,
    )
    diagnostics, text_tokens = WeightDiagnostics(), 0
    coder, forwarded = TextCoder(checkpoint.final_weights(model)), 0
    for path in shard_paths(chunks):
        groups = group_by_chunk(read_shard(out / path.name, Sample))
        shard = read_shard(path, Chunk)
        forwarded += _count_forward_tokens(settings, coder, shard, groups)
        text_tokens += sum(len(chunk.tokens) for chunk in shard)
        diagnostics.add(groups, shard_reference_latents(split / path.name, path))
    _write_histogram(histogram_path, diagnostics)
    metrics = diagnostics.diagnostics() | diagnostics.exact_match_metrics()
    _warn_of_cut_draws(settings, metrics["forced_fraction"])
    metrics["forward_tokens"] = forwarded
    if not settings.options.extra_draws and reuse != "draws":  # with them the mean is biased
        metrics["bound_per_token"] = diagnostics.sums["log_mean_weight"] / text_tokens
    return metrics, _wall_clock_figures(throughputs)


def _warn_of_cut_draws(settings: EStepSettings, fraction: float) -> None:
    if fraction > UNUSABLE_FRACTION:
        print(
            f"WARNING: latents {settings.name}: {fraction:.0%} of the draws did not end within"
            f" max_latent_tokens ({settings.max_latent_tokens}) and were cut. A model that is"
            " trained on them learns from cut-off text; train the model that draws them for longer,"
            " or raise max_latent_tokens.",
            file=sys.stderr,
        )


def _write_histogram(path: Path, diagnostics: WeightDiagnostics) -> None:
    bins = (",".join(map(str, line)) for line in diagnostics.histogram())
    lines = ["from_nats,to_nats,count", *bins]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _count_forward_tokens(
    settings: EStepSettings,
    coder: TextCoder,
    chunks: Sequence[Chunk],
    groups: Sequence[Sequence[Sample]],
) -> int:
    special, context_chunks = coder.special_tokens, settings.context_chunks
    budget = context_token_budget(coder, settings.max_latent_tokens)
    if settings.options.method == "smc":
        return smc_forward_tokens(
            special, chunks, groups, context_chunks=context_chunks, token_budget=budget
        )
    in_context = chunks_in_context(chunks, context_chunks, budget)
    pairs = zip(in_context, groups, strict=True)
    return sum(forward_tokens(special, chunk, group) for chunk, group in pairs)


def draw_latents(
    settings: DrawSettings,
    purpose: str,
    *,
    model: Path,
    chunks: Path,
    work: Path,
    out: Path,
    num_samples: int,
    what: str,
    previous: Path | None = None,
    previous_model: Path | None = None,
) -> list[Throughput]:
    """Write `num_samples` samples of every chunk in `chunks` to `out`, one shard per shard there.

    `purpose` keys their random numbers; `what` labels the progress display. Finished shards are
    saved below `work` under a fingerprint of the model's and the chunks' contents, the settings and
    the code: an interrupted run resumes, and one with another number of samples or other options of
    the estimator reuses the draws from the proposal that exist. Returns the throughput of each
    shard that this run processed.
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
    task = ShardTask(
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
    return run_shards(
        [path.name for path in shard_paths(chunks)],
        lambda shards: execute_shards(task, shards),
        work=task.samples_folder(num_samples),
        out=out,
        what=what,
        workers=settings.sampling.workers,
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

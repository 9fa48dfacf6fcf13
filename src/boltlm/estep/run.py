"""The E-step over a corpus: the stage `latents`, which writes `data/latents/<name>`."""

from collections.abc import Sequence
from pathlib import Path

from boltlm import checkpoint
from boltlm.corpus.reference_latents import shard_reference_latents
from boltlm.estep.config import DrawSettings, EStepSettings
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.estep import Throughput, chunks_in_context, forward_tokens
from boltlm.estep.executors import execute_shards
from boltlm.estep.shard_worker import ShardTask, context_token_budget, group_by_chunk
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
    work: Path,
    out: Path,
    histogram_path: Path,
) -> tuple[dict[str, int | float], dict[str, float]]:
    """Sample, weight and select latents for every chunk of a corpus (docs/method.md, section 4).

    Writes the samples to `out` and the histogram of log w to `histogram_path` (CSV). Returns the
    diagnostics of section 4.3, with exact-match fractions where the data set provides latents, and
    the wall-clock figures of the draws made in this run (empty if none were made). Random numbers
    are keyed by the name of the model, so entries with the same model share their draws.
    Raises UserError where the model or the chunks are missing, or a worker process dies.
    """
    throughputs = draw_latents(
        settings,
        f"estep {settings.entry.model}",
        model=model,
        chunks=chunks,
        work=work,
        out=out,
        num_samples=settings.num_samples,
        what=f"latents {settings.name}",
    )
    diagnostics, tokens = WeightDiagnostics(), 0
    token_budget = context_token_budget(
        TextCoder(checkpoint.final_weights(model)), settings.max_latent_tokens
    )
    for path in shard_paths(chunks):
        groups = group_by_chunk(read_shard(out / path.name, Sample))
        shard = read_shard(path, Chunk)
        in_context = chunks_in_context(shard, settings.context_chunks, token_budget)
        tokens += sum(map(forward_tokens, in_context, groups))
        diagnostics.add(groups, shard_reference_latents(split / path.name, path))
    bins = (",".join(map(str, line)) for line in diagnostics.histogram())
    lines = ["from_nats,to_nats,count", *bins]
    histogram_path.parent.mkdir(parents=True, exist_ok=True)
    histogram_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    metrics = diagnostics.diagnostics() | diagnostics.exact_match_metrics()
    metrics["forward_tokens"] = tokens
    return metrics, _wall_clock_figures(throughputs)


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
) -> list[Throughput]:
    """Write `num_samples` samples of every chunk in `chunks` to `out`, one shard per shard there.

    `purpose` keys their random numbers; `what` labels the progress display. Finished shards are
    saved below `work` under a fingerprint of the model's and the chunks' contents, the settings and
    the code: an interrupted run can be resumed, and a run with another number of samples or another
    selection reuses the ones that exist. Returns the throughput of each shard that this run
    processed.
    """
    facts = {
        "purpose": purpose,
        "model": hash_path(checkpoint.final_weights(model)),
        "chunks": hash_path(chunks),
        "seed": settings.seed,
        "context_chunks": settings.context_chunks,
        "max_latent_tokens": settings.max_latent_tokens,
        "sampling": settings.sampling.fingerprint_facts,
        "code": hash_code("boltlm.estep.shard_worker"),
    }
    task = ShardTask(
        settings=settings,
        purpose=purpose,
        model=model.resolve(),
        chunks=chunks.resolve(),
        folder=(work / "latents" / fingerprint(facts)).resolve(),
        num_samples=num_samples,
    )
    return run_shards(
        [path.name for path in shard_paths(chunks)],
        lambda shards: execute_shards(task, shards),
        work=task.samples_folder(num_samples),
        out=out,
        what=what,
        workers=settings.sampling.workers,
    )


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

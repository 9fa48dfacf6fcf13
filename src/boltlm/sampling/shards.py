"""The E-step over a corpus, a shard at a time: `latents.<name>` becomes `data/latents/<name>`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from boltlm import engine
from boltlm.latents.dataset import shard_references
from boltlm.model import checkpoint
from boltlm.params import build, section
from boltlm.records import Chunk, Sample, read_shard, shards, write_shard
from boltlm.sampling import engines
from boltlm.sampling.estep import Effort, EStep, SamplingConfig, items
from boltlm.sampling.weights import Summary
from boltlm.tokens import TextCoder, most_chunk_tokens

# What a sample depends on beside the model and the chunks: settings, and the code that draws.
SETTINGS = ("seed", "context_chunks", "max_latent_tokens")
CODE = (
    "boltlm.records",
    "boltlm.seeds",
    "boltlm.tokens",
    "boltlm.sequences.layouts",
    "boltlm.model.checkpoint",
    "boltlm.sampling",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsEntry:
    """Params entry `latents.<name>`: which model draws latents for which corpus."""

    model: str
    corpus: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """All that a worker needs to make shards, wherever it runs. `folder`: where finished shards
    lie, one subfolder for each K."""

    params: Mapping[str, Any]
    name: str
    model: Path
    chunks: Path
    folder: Path
    draws: int

    def place(self, shard: str, draws: int) -> Path:
        return self.folder / f"k{draws}" / shard

    def known(self, shard: str) -> list[list[Sample]] | None:
        """The samples of this shard that were drawn for another K: the most that are there."""
        counts = sorted(
            (int(path.name[1:]) for path in self.folder.glob("k*") if path.name[1:].isdigit()),
            reverse=True,
        )
        for count in counts:
            path = self.place(shard, count)
            if count != self.draws and engine.is_whole(path):
                return by_chunk(iter(read_shard(path, Sample)))
        return None


class Maker:
    """Makes shards of one task; holds the model."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.estep = make_estep(task.params, task.model, purpose=task.name)
        self.room = context_room(self.estep.coder, task.params)

    def __call__(self, shard: str) -> Effort:
        """Write one shard, whole, and seal it."""
        task, estep = self.task, self.estep
        estep.effort = Effort()
        context = section(task.params, "context_chunks")
        found = items(read_shard(task.chunks / shard, Chunk), context, self.room)
        groups = estep.run(found, task.draws, task.known(shard))
        path = task.place(shard, task.draws)
        write_shard(path, Sample, [sample for group in groups for sample in group])
        engine.seal(path)
        return estep.effort


def run(
    params: Mapping[str, Any],
    name: str,
    *,
    model: Path,
    split: Path,
    chunks: Path,
    work: Path,
    out: Path,
    histogram_path: Path,
) -> dict[str, int | float]:
    """Draw, weigh and select latents for every chunk; return the diagnostics, and write the
    histogram of log w as CSV."""
    build(LatentsEntry, section(params, f"latents.{name}"), f"latents.{name}")
    efforts = draw(
        params,
        name,
        model=model,
        chunks=chunks,
        work=work,
        out=out,
        draws=section(params, "k_samples"),
        what=f"latents {name}",
    )
    summary = Summary()
    for path in shards(chunks):
        groups = by_chunk(iter(read_shard(out / path.name, Sample)))
        summary.add(groups, shard_references(split / path.name, path))
    bins = (",".join(map(str, line)) for line in summary.histogram())
    lines = ["from_nats,to_nats,count", *bins]
    histogram_path.parent.mkdir(parents=True, exist_ok=True)
    histogram_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return summary.diagnostics() | summary.exact_fractions() | _rates(efforts)


def draw(
    params: Mapping[str, Any],
    purpose: str,
    *,
    model: Path,
    chunks: Path,
    work: Path,
    out: Path,
    draws: int,
    what: str,
) -> list[Effort]:
    """Fill `out` with the samples of every chunk; `purpose` keys their random numbers.

    Finished shards are kept in `work` under a key made of the model's and the chunks' content,
    the settings and the code: a killed run goes on where it was, another K takes over the draws
    that are there.
    """
    config = build(SamplingConfig, section(params, "sampling"), "sampling")
    facts = {
        "purpose": purpose,
        "model": engine.content(checkpoint.final(model)),
        "chunks": engine.content(chunks),
        "sampling": config.drawing,
        "code": engine.code(CODE),
        **{key: section(params, key) for key in SETTINGS},
    }
    task = Task(
        params=params,
        name=purpose,
        model=model.resolve(),
        chunks=chunks.resolve(),
        folder=(work / "latents" / engine.key(facts)).resolve(),
        draws=draws,
    )
    return engine.run_shards(
        [path.name for path in shards(chunks)],
        lambda left: engines.run(task, left, config),
        work=task.place("", task.draws),
        out=out,
        what=what,
        workers=config.workers,
    )


def _rates(efforts: Sequence[Effort]) -> dict[str, float]:
    """Of the draws made in this run, over all workers."""
    sampled = sum(effort.sample_seconds for effort in efforts)
    scored = sum(effort.score_seconds for effort in efforts)
    tokens = sum(effort.sampled_tokens for effort in efforts)
    scores = sum(effort.scored_tokens for effort in efforts)
    return {
        "seconds": sampled + scored,
        "sampled_tokens_per_second": tokens / max(sampled, 1e-9),
        "scored_tokens_per_second": scores / max(scored, 1e-9),
        "sampling_time_fraction": sampled / max(sampled + scored, 1e-9),
    }


def make_estep(params: Mapping[str, Any], model: Path, *, purpose: str) -> EStep:
    """An E-step with the model in a folder; `purpose` keys its random numbers."""
    checkpoint.prepare_cpu()
    model = checkpoint.final(model)
    config = build(SamplingConfig, section(params, "sampling"), "sampling")
    coder = TextCoder(model)
    length, seed = section(params, "max_latent_tokens"), section(params, "seed")
    sampler = None
    if config.sampler == "vllm":
        from boltlm.sampling.vllm_sampler import VllmSampler

        sampler = VllmSampler(
            model,
            coder.markers,
            max_latent_tokens=length,
            window=coder.window,
            precision=config.precision,
            memory_fraction=config.vllm_memory_fraction,
            seed=seed,
        )
    return EStep(
        checkpoint.load(model, config.precision),
        coder,
        config,
        max_latent_tokens=length,
        seed=seed,
        purpose=purpose,
        sampler=sampler,
    )


def context_room(coder: TextCoder, params: Mapping[str, Any]) -> int:
    """What the window leaves to the context and the chunk together."""
    return most_chunk_tokens(coder.window, section(params, "max_latent_tokens"))


def by_chunk(samples: Iterator[Sample]) -> list[list[Sample]]:
    return [list(group) for _, group in groupby(samples, lambda s: (s.doc_id, s.chunk))]

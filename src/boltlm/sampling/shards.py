"""The E-step over a corpus, a shard at a time: `latents.<name>` becomes `data/latents/<name>`."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from boltlm import engine
from boltlm.latents.dataset import references
from boltlm.model import checkpoint
from boltlm.params import build, section
from boltlm.records import Chunk, Sample, read, read_shard, shards, write_shard
from boltlm.sampling.estep import EStep, SamplingConfig, items
from boltlm.sampling.weights import diagnostics, exact_fractions, histogram
from boltlm.tokens import TextCoder, most_chunk_tokens

# What a shard depends on beside the model and the chunks: settings, and the code that draws.
SETTINGS = ("seed", "k_samples", "context_chunks", "max_latent_tokens")
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
    histogram of log w as CSV.

    Finished shards are kept in `work` under a key made of the model's and the chunks' content,
    the settings and the code: a killed run goes on where it was.
    """
    build(LatentsEntry, section(params, f"latents.{name}"), f"latents.{name}")
    estep = make_estep(params, model, purpose=name)
    draws = section(params, "k_samples")
    facts = {
        "purpose": name,
        "model": engine.content(model),
        "chunks": engine.content(chunks),
        "sampling": asdict(estep.config),
        "code": engine.code(CODE),
        **{key: section(params, key) for key in SETTINGS},
    }
    room = context_room(estep.coder, params)
    counts: Counter[str] = Counter()
    seconds = 0.0

    def compute(shard: str, path: Path) -> None:
        nonlocal seconds
        started = time.monotonic()
        found = items(read_shard(chunks / shard, Chunk), section(params, "context_chunks"), room)
        groups = estep.run(found, draws)
        write_shard(path, Sample, [sample for group in groups for sample in group])
        seconds += time.monotonic() - started
        counts["tokens"] += sum(len(s.tokens) + 1 for group in groups for s in group)

    names = [path.name for path in shards(chunks)]
    folder = work / "latents" / engine.key(facts)
    engine.run_shards(names, compute, work=folder, out=out, what=f"latents {name}")
    groups = by_chunk(read(out, Sample))
    measured = diagnostics(groups) | exact_fractions(groups, references(split, chunks))
    lines = ["from_nats,to_nats,count", *(",".join(map(str, line)) for line in histogram(groups))]
    histogram_path.parent.mkdir(parents=True, exist_ok=True)
    histogram_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rates = {"seconds": seconds, "sampled_tokens_per_second": counts["tokens"] / max(seconds, 1e-9)}
    return measured | rates


def make_estep(params: Mapping[str, Any], model: Path, *, purpose: str) -> EStep:
    """An E-step with the model in a folder; `purpose` keys its random numbers."""
    checkpoint.prepare_cpu()
    config = build(SamplingConfig, section(params, "sampling"), "sampling")
    return EStep(
        checkpoint.load(model, config.precision),
        TextCoder(model),
        config,
        max_latent_tokens=section(params, "max_latent_tokens"),
        seed=section(params, "seed"),
        purpose=purpose,
    )


def context_room(coder: TextCoder, params: Mapping[str, Any]) -> int:
    """What the window leaves to the context and the chunk together."""
    return most_chunk_tokens(coder.window, section(params, "max_latent_tokens"))


def by_chunk(samples: Iterator[Sample]) -> Sequence[list[Sample]]:
    return [list(group) for _, group in groupby(samples, lambda s: (s.doc_id, s.chunk))]

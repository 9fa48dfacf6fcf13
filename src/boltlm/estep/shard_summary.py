"""The statistics of an E-step, shard by shard: made by the worker that has drawn a shard, stored
beside it, and added up in moments when all shards are there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boltlm import checkpoint
from boltlm.corpus.reference_latents import shard_reference_latents
from boltlm.estep.contexts import chunks_in_context, forward_tokens
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.shard_worker import ShardTask, context_token_budget, group_by_chunk
from boltlm.estep.smc import smc_forward_tokens
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import Chunk, Sample, read_shard
from boltlm.shard_store import atomic_write, is_complete, mark_complete
from boltlm.tokens import TextCoder


@dataclass(slots=True)
class ShardSummary:
    """Of the samples of some shards: the diagnostics of docs/method.md, 4.3, the tokens of the
    chunks, and those that had to run through the model, eq. (15)."""

    diagnostics: WeightDiagnostics = field(default_factory=WeightDiagnostics)
    text_tokens: int = 0
    forward_tokens: int = 0

    def add(self, other: "ShardSummary") -> None:
        self.diagnostics.merge(other.diagnostics)
        self.text_tokens += other.text_tokens
        self.forward_tokens += other.forward_tokens


def summarize_shard(task: ShardTask, split: Path, shard: str) -> ShardSummary:
    """The summary of a complete shard of `task`. `split`: the folder of the corpus's documents,
    which may have reference latents. A summary of the same samples and documents that was stored
    before is read."""
    samples = task.samples_folder(task.num_samples) / shard
    facts = {
        "samples": hash_path(samples),
        "documents": hash_path(split / shard),
        "code": hash_code("boltlm.estep.shard_summary"),
    }
    stored = samples.parent / "summaries" / f"{fingerprint(facts)}.json"
    if is_complete(stored):
        state = json.loads(stored.read_text(encoding="utf-8"))
        diagnostics = WeightDiagnostics.from_json(state["diagnostics"])
        return ShardSummary(diagnostics, state["text_tokens"], state["forward_tokens"])
    groups = group_by_chunk(read_shard(samples, Sample))
    chunks = read_shard(task.chunks / shard, Chunk)
    references = shard_reference_latents(split / shard, task.chunks / shard)
    summary = ShardSummary(
        WeightDiagnostics(groups, references),
        sum(len(chunk.tokens) for chunk in chunks),
        _count_forward_tokens(task, chunks, groups),
    )
    state = {
        "diagnostics": summary.diagnostics.to_json(),
        "text_tokens": summary.text_tokens,
        "forward_tokens": summary.forward_tokens,
    }
    with atomic_write(stored) as temporary:
        temporary.write_text(
            json.dumps(state), encoding="utf-8"
        )  # keeps NaN, as `write_json` does not
    mark_complete(stored)
    return summary


def _count_forward_tokens(
    task: ShardTask, chunks: Sequence[Chunk], groups: Sequence[Sequence[Sample]]
) -> int:
    settings, coder = task.settings, TextCoder(checkpoint.final_weights(task.model))
    special, context_chunks = coder.special_tokens, settings.context_chunks
    budget = context_token_budget(coder, settings.max_latent_tokens)
    if settings.options.method == "smc":
        return smc_forward_tokens(
            special, chunks, groups, context_chunks=context_chunks, token_budget=budget
        )
    in_context = chunks_in_context(chunks, context_chunks, budget)
    pairs = zip(in_context, groups, strict=True)
    return sum(forward_tokens(special, chunk, group) for chunk, group in pairs)

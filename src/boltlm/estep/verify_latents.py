"""Compares stored log q and log p of latents with a recomputation in float64 from stored ids."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from boltlm.checkpoint import final_weights
from boltlm.errors import UserError
from boltlm.estep.config import EStepSettings
from boltlm.estep.contexts import ChunkInContext, chunks_in_context
from boltlm.estep.shard_worker import context_token_budget, group_by_chunk
from boltlm.estep.verify_weights import exact_log_prob
from boltlm.records import Chunk, Sample, read_shard, shard_paths
from boltlm.seeds import generator
from boltlm.sequences import layouts
from boltlm.tokens import SpecialTokens, TextCoder

# The largest difference, nats, that rounding makes in a chunk of some hundred tokens.
MAX_ERROR = {"float32": 0.01, "bfloat16": 1.0}


@dataclass(frozen=True, slots=True)
class LatentErrors:
    """Of some draws of some chunks: the largest differences in log q (nats; 0 where another
    distribution than q made all of them) and in log p(Z, X | C), and how large they may be."""

    chunks: int
    draws: int
    log_q: float
    log_p: float
    limit: float

    @property
    def hold(self) -> bool:
        """Whether the stored numbers are those of the model."""
        return max(self.log_q, self.log_p) <= self.limit


@torch.inference_mode()
def latent_errors(
    settings: EStepSettings, *, model: Path, chunks: Path, latents: Path, count: int, seed: int
) -> LatentErrors | None:
    """The errors of the draws of `count` chunks of the table `latents`, chosen at random by `seed`.
    None for particles of SMC, whose context has latents.

    Raises UserError where the two tables do not have the same chunks.
    """
    if settings.options.method == "smc":
        return None
    folder = final_weights(model)
    coder = TextCoder(folder)
    exact: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    exact.eval().to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    budget = context_token_budget(coder, settings.max_latent_tokens)
    errors: dict[str, list[float]] = defaultdict(list)
    chosen = _choose(shard_paths(chunks), count, seed)
    for path, num_chunks in chosen.items():
        in_context = chunks_in_context(read_shard(path, Chunk), settings.context_chunks, budget)
        groups = group_by_chunk(read_shard(latents / path.name, Sample))
        if _names(in_context) != _names([group[0] for group in groups]):
            raise UserError(f"{latents / path.name}: does not have the chunks of {path}")
        picks = generator(seed, "verify", path.name).permutation(len(groups))[:num_chunks]
        for index in picks:
            for sample in groups[index]:
                tempered = settings.options.temperature != 1
                _compare(exact, coder.special_tokens, in_context[index], sample, tempered, errors)
    return LatentErrors(
        chunks=sum(chosen.values()),
        draws=len(errors["log_p"]),
        log_q=max(errors["log_q"], default=0.0),
        log_p=max(errors["log_p"], default=0.0),
        limit=MAX_ERROR[settings.sampling.precision],
    )


def _names(rows: Sequence[ChunkInContext] | Sequence[Sample]) -> list[tuple[str, int]]:
    return [(row.doc_id, row.chunk) for row in rows]


def _choose(paths: list[Path], count: int, seed: int) -> dict[Path, int]:
    """How many chunks of which shards: `count` of them, of as few chunks as a shard may have."""
    order = generator(seed, "verify").permutation(len(paths))
    return {paths[index]: max(1, count // len(paths)) for index in order[:count]}


def _compare(
    model: PreTrainedModel,
    special: SpecialTokens,
    chunk: ChunkInContext,
    sample: Sample,
    tempered: bool,
    errors: dict[str, list[float]],
) -> None:
    """Add the errors of a draw. Where `tempered`, or where another distribution made it, its log q
    is not that of the posterior mode."""
    ended = [*sample.tokens, special.eol]
    prior = layouts.prior_prompt(special, chunk.context)
    log_p = exact_log_prob(model, prior, [*ended, *chunk.text])
    errors["log_p"].append(abs(log_p - sample.log_p_latent - sample.log_p_text))
    drawn = ended if sample.finish == "stop" else sample.tokens
    if sample.source == "proposal" and not tempered and drawn:
        posterior = layouts.posterior_prompt(special, chunk.context, chunk.text)
        log_q = exact_log_prob(model, posterior, drawn, special.barred)
        errors["log_q"].append(abs(log_q - sample.log_q))

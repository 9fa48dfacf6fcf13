"""The E-step: K latents a chunk from q, weighed by p/q, one kept (SPEC section 4)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.model.checkpoint import Precision
from boltlm.records import Chunk, Sample
from boltlm.sampling.samplers import Draw, Sampler, TransformersSampler
from boltlm.sampling.scoring import token_log_probs
from boltlm.sampling.weights import log_weight, select
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers, TextCoder


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Params section `sampling`. `batch_tokens`: tokens held at once in one batch; `rescore_q`:
    log q by the scorer, not by the sampler, for where the two disagree (bfloat16);
    `vllm_memory_fraction`: of a GPU, the rest is the scorer's.

    `engine`: where shards are worked on, by `workers` processes of `gpus_per_worker` GPUs and
    `threads` cores each (null: OMP_NUM_THREADS, or the cores here shared out, on Ray one; a sum's
    last bit hangs on it);
    `address`: of a Ray cluster that is there, null to start one here.
    """

    sampler: Literal["transformers", "vllm"]
    precision: Precision
    batch_tokens: int
    rescore_q: bool
    vllm_memory_fraction: float
    engine: Literal["local", "ray"]
    workers: int
    gpus_per_worker: float
    threads: int | None
    address: str | None

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise UserError(f"batch_tokens must be 1 or more, found {self.batch_tokens}")
        if self.workers < 1:
            raise UserError(f"workers must be 1 or more, found {self.workers}")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads must be 1 or more, or null, found {self.threads}")
        if not 0 < self.vllm_memory_fraction < 1:
            raise UserError(
                f"vllm_memory_fraction lies in (0, 1), found {self.vllm_memory_fraction}"
            )

    @property
    def drawing(self) -> dict[str, str | int | bool]:
        """What the samples depend on; where they are drawn is no part of it."""
        return {
            "sampler": self.sampler,
            "precision": self.precision,
            "batch_tokens": self.batch_tokens,
            "rescore_q": self.rescore_q,
        }


@dataclass(frozen=True, slots=True)
class Item:
    """A chunk X and its context C, as ids."""

    doc_id: str
    chunk: int
    context: tuple[int, ...]
    text: tuple[int, ...]


def items(chunks: Sequence[Chunk], context_chunks: int, room: int) -> list[Item]:
    """Chunks with their raw context. `room`: what the window leaves to C and X together."""
    made: list[Item] = []
    before: list[Ids] = []
    doc_id = None
    for chunk in chunks:
        if chunk.doc_id != doc_id:
            doc_id, before = chunk.doc_id, []
        context = layouts.context(before, context_chunks, room - len(chunk.tokens))
        made.append(Item(chunk.doc_id, chunk.chunk, tuple(context), chunk.tokens))
        before.append(chunk.tokens)
    return made


@dataclass(frozen=True, slots=True)
class Scores:
    """log p(Z, EoL | BOS C SoL Prior) and log p(X | BOS C SoL Prior Z EoL), nats."""

    latent: float
    text: float


@dataclass(slots=True)
class Effort:
    """Seconds of drawing and scoring, and the tokens that they were for (endings and texts
    included), of every draw also where draws shared their rows."""

    sampled_tokens: int = 0
    scored_tokens: int = 0
    sample_seconds: float = 0.0
    score_seconds: float = 0.0


class EStep:
    """Draws, scores and selects with one model, which is both q and p. `sampler` null: draws with
    the model itself. `effort` sums up over runs."""

    def __init__(
        self,
        model: PreTrainedModel,
        coder: TextCoder,
        config: SamplingConfig,
        *,
        max_latent_tokens: int,
        seed: int,
        purpose: str,
        sampler: Sampler | None = None,
    ) -> None:
        self.model, self.coder, self.config = model, coder, config
        self.markers, self.seed, self.purpose = coder.markers, seed, purpose
        self.max_latent_tokens = max_latent_tokens
        self.sampler: Sampler = sampler or TransformersSampler(
            model, coder.markers, max_latent_tokens, config.batch_tokens, seed
        )
        self.effort = Effort()

    def run(
        self, found: Sequence[Item], draws: int, known: Sequence[Sequence[Sample]] | None = None
    ) -> list[list[Sample]]:
        """K samples of each chunk, one of them selected. The draws depend on (seed, purpose,
        document, chunk, k), so more of them leave the first ones as they are: of the `known`
        samples of each chunk the first K are taken over, and only what they lack is drawn."""
        first = min((len(group) for group in known), default=0) if known else 0
        before = [list(group[: min(first, draws)]) for group in known] if known and first else None
        new = self._draw(found, draws - first, first) if draws > first else None
        nothing: list[list[Sample]] = [[] for _ in found]
        return [
            self._select([*old, *fresh])
            for old, fresh in zip(before or nothing, new or nothing, strict=True)
        ]

    def _draw(self, found: Sequence[Item], draws: int, first: int) -> list[list[Sample]]:
        m = self.markers
        prompts = [layouts.posterior_prefix(m, item.context, item.text) for item in found]
        keys = [("sample", self.purpose, item.doc_id, item.chunk) for item in found]
        started = time.monotonic()
        drawn = self.sampler.sample(prompts, keys, draws, first)
        sampled = time.monotonic()
        if self.config.rescore_q:
            drawn = rescored(self.model, m, prompts, drawn, self.config.batch_tokens)
        scored = joint_scores(self.model, m, found, drawn, self.config.batch_tokens)
        effort, ended = self.effort, time.monotonic()
        effort.sample_seconds += sampled - started
        effort.score_seconds += ended - sampled
        for item, group in zip(found, drawn, strict=True):
            effort.sampled_tokens += sum(len(draw.tokens) + 1 for draw in group)
            kept = [len(draw.tokens) + 1 for draw in group if draw.finish == "stop"]
            effort.scored_tokens += sum(kept) + len(kept) * len(item.text)
        return [
            [
                self._sample(item, first + k, draw, score)
                for k, (draw, score) in enumerate(zip(group, scores, strict=True))
            ]
            for item, group, scores in zip(found, drawn, scored, strict=True)
        ]

    def _sample(self, item: Item, number: int, draw: Draw, score: Scores) -> Sample:
        return Sample(
            doc_id=item.doc_id,
            chunk=item.chunk,
            sample=number,
            latent=self.coder.decode(list(draw.tokens)),
            tokens=draw.tokens,
            finish=draw.finish,
            log_q=draw.log_q,
            log_p_latent=score.latent,
            log_p_text=score.text,
            log_weight=log_weight(draw.log_q, score.latent, score.text, draw.finish),
            selected=False,
        )

    def _select(self, samples: list[Sample]) -> list[Sample]:
        log_w_K = np.array([sample.log_weight for sample in samples])
        doc_id, chunk = samples[0].doc_id, samples[0].chunk
        kept = select(log_w_K, self.seed, "select", self.purpose, doc_id, chunk)
        return [replace(sample, selected=k == kept) for k, sample in enumerate(samples)]


def rescored(
    model: PreTrainedModel,
    m: Markers,
    prompts: Sequence[Ids],
    drawn: Sequence[Sequence[Draw]],
    batch_tokens: int,
) -> list[list[Draw]]:
    """The same draws with log q(Z, EoL | …) by the scorer; what is no latent stays as it is."""
    branches = [
        [(*draw.tokens, m.eol) if draw.finish == "stop" else () for draw in group]
        for group in drawn
    ]
    logs = token_log_probs(model, prompts, branches, batch_tokens)
    return [
        [
            replace(draw, log_q=float(log.sum())) if draw.finish == "stop" else draw
            for draw, log in zip(group, logs_K, strict=True)
        ]
        for group, logs_K in zip(drawn, logs, strict=True)
    ]


def joint_scores(
    model: PreTrainedModel,
    m: Markers,
    found: Sequence[Item],
    drawn: Sequence[Sequence[Draw]],
    batch_tokens: int,
) -> list[list[Scores]]:
    """The joint's two factors for every draw, from the very ids that were drawn; NaN for draws
    that are no latent."""
    prefixes = [layouts.prior_prefix(m, item.context) for item in found]
    branches = [
        [(*draw.tokens, m.eol, *item.text) if draw.finish == "stop" else () for draw in group]
        for item, group in zip(found, drawn, strict=True)
    ]
    logs = token_log_probs(model, prefixes, branches, batch_tokens)
    return [
        [
            Scores(
                float(log[: len(draw.tokens) + 1].sum()), float(log[len(draw.tokens) + 1 :].sum())
            )
            if draw.finish == "stop"
            else Scores(float("nan"), float("nan"))
            for draw, log in zip(group, logs_K, strict=True)
        ]
        for group, logs_K in zip(drawn, logs, strict=True)
    ]

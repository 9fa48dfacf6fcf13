"""The E-step: K latents a chunk from q, weighed by p/q, one kept (SPEC section 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from boltlm.errors import UserError
from boltlm.records import Chunk, Sample
from boltlm.sampling.samplers import Draw, Sampler, TransformersSampler
from boltlm.sampling.scoring import token_log_probs
from boltlm.sampling.weights import log_weight, select
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers, TextCoder


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Params section `sampling`. `batch_tokens`: tokens held at once in one batch."""

    sampler: Literal["transformers"]
    precision: Literal["float32", "bfloat16"]
    batch_tokens: int

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise UserError(f"batch_tokens must be 1 or more, found {self.batch_tokens}")


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


class EStep:
    """Draws, scores and selects with one model, which is both q and p."""

    def __init__(
        self,
        model: PreTrainedModel,
        coder: TextCoder,
        config: SamplingConfig,
        *,
        max_latent_tokens: int,
        seed: int,
        purpose: str,
    ) -> None:
        self.model, self.coder, self.config = model, coder, config
        self.markers, self.seed, self.purpose = coder.markers, seed, purpose
        self.max_latent_tokens = max_latent_tokens
        self.sampler: Sampler = TransformersSampler(
            model, coder.markers, max_latent_tokens, config.batch_tokens, seed
        )

    def run(self, found: Sequence[Item], draws: int) -> list[list[Sample]]:
        """K samples of each chunk, one of them selected. The draws depend on (seed, purpose,
        document, chunk, k), so more of them leave the first ones as they are."""
        m = self.markers
        prompts = [layouts.posterior_prefix(m, item.context, item.text) for item in found]
        keys = [("sample", self.purpose, item.doc_id, item.chunk) for item in found]
        drawn = self.sampler.sample(prompts, keys, draws)
        scored = joint_scores(self.model, m, found, drawn, self.config.batch_tokens)
        return [
            self._weigh(item, group, scores)
            for item, group, scores in zip(found, drawn, scored, strict=True)
        ]

    def _weigh(self, item: Item, drawn: list[Draw], scores: list[Scores]) -> list[Sample]:
        log_w_K = np.array(
            [
                log_weight(draw.log_q, score.latent, score.text, draw.finish)
                for draw, score in zip(drawn, scores, strict=True)
            ]
        )
        kept = select(log_w_K, self.seed, "select", self.purpose, item.doc_id, item.chunk)
        return [
            Sample(
                doc_id=item.doc_id,
                chunk=item.chunk,
                sample=k,
                latent=self.coder.decode(list(draw.tokens)),
                tokens=draw.tokens,
                finish=draw.finish,
                log_q=draw.log_q,
                log_p_latent=scores[k].latent,
                log_p_text=scores[k].text,
                log_weight=float(log_w_K[k]),
                selected=k == kept,
            )
            for k, draw in enumerate(drawn)
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

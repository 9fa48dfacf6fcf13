"""Sampling latents from q (docs/method.md, sections 4.1 and 4.2): K token sequences for each
prompt, their log-probabilities, and why each of them ended.

Shapes: B batch rows, D draws of a batch, K draws of a row, L positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from boltlm.estep.kv_cache import PreallocatedCacheLayer, batch_by_length, prefill
from boltlm.seeds import generator
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens

FinishReason = Literal["stop", "length", "eos", "special"]
SampleKey = tuple[str | int, ...]
MIN_ACTIVE_FRACTION = 0.7  # finished rows leave the batch when fewer of its rows are active


@dataclass(frozen=True, slots=True)
class Draw:
    """One sequence sampled from q.

    `tokens` excludes the token that ended it; `log_q`, in nats, covers all sampled tokens including
    that one, eq. (1). Only a draw whose `finish` is "stop" (it ended with EoL) is a latent.
    """

    tokens: tuple[int, ...]
    finish: FinishReason
    log_q: float


class Sampler(Protocol):
    """What EStep needs of a sampler."""

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        """Draws k = `first_index`, `first_index` + 1, … of each prompt, `num_samples` of them, at
        temperature 1 without top-k or top-p. Draw k of prompt i depends on (seed, keys[i], k)."""
        ...


@dataclass(frozen=True, slots=True)
class StopTokens:
    """The tokens that end a draw, with the finish reason of each."""

    finish_reasons: dict[int, FinishReason]

    @classmethod
    def for_latents(cls, special: SpecialTokens) -> "StopTokens":
        """EoL ends a latent; EOS and every token that a latent must not contain end an invalid
        draw."""
        forbidden: dict[int, FinishReason] = dict.fromkeys(special.forbidden, "special")
        return cls({**forbidden, special.eos: "eos", special.eol: "stop"})


@dataclass(slots=True)
class TransformersSampler:
    """Samples with a Hugging Face model by inverse transform sampling.

    Each draw has its own uniform number for each step, so it does not depend on the rest of its
    batch. Draws of a prompt that agree so far share one row of the batch: the prompt, and every
    common prefix of draws, is computed once. `greedy` takes the most probable token instead.
    """

    model: PreTrainedModel
    special_tokens: SpecialTokens
    max_latent_tokens: int
    batch_tokens: int
    seed: int
    greedy: bool = False
    stop_tokens: StopTokens = field(init=False)

    def __post_init__(self) -> None:
        self.stop_tokens = StopTokens.for_latents(self.special_tokens)

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        """As `Sampler.sample`."""
        draws: list[list[Draw]] = [[] for _ in prompts]
        lengths = [len(prompt) + self.max_latent_tokens for prompt in prompts]
        for batch in batch_by_length(lengths, [num_samples] * len(prompts), self.batch_tokens):
            noise_DL = self._uniform_noise([keys[i] for i in batch], num_samples, first_index)
            draws_D = self._sample_batch([prompts[i] for i in batch], noise_DL, num_samples)
            for row, index in enumerate(batch):
                draws[index] = draws_D[row * num_samples : (row + 1) * num_samples]
        return draws

    def _uniform_noise(
        self, keys: Sequence[SampleKey], num_samples: int, first_index: int
    ) -> np.ndarray:
        steps = self.max_latent_tokens + 1
        indices = range(first_index, first_index + num_samples)
        return np.stack(
            [generator(self.seed, *key, k).random(steps) for key in keys for k in indices]
        )

    @torch.inference_mode()
    def _sample_batch(
        self, prompts: list[TokenIds], noise_DL: np.ndarray, num_samples: int
    ) -> list[Draw]:
        """The draws of a batch, those of a prompt one after the other."""
        tokens: list[list[int]] = [[] for _ in noise_DL]
        log_q_D = np.zeros(len(tokens))
        finish: list[FinishReason] = ["length"] * len(tokens)
        logits_BV, cache, mask_BL = prefill(self.model, prompts, PreallocatedCacheLayer)
        # The draws that each row of the batch stands for; an empty list: all of them have ended.
        rows = [list(range(i * num_samples, (i + 1) * num_samples)) for i in range(len(prompts))]
        for step in range(self.max_latent_tokens + 1):
            next_tokens, log_probs = self._choose_tokens(logits_BV, rows, noise_DL[:, step])
            # Of each row: its unfinished draws, grouped by their next token.
            branches: list[dict[int, list[int]]] = []
            for row, token_K, log_prob_K in zip(rows, next_tokens, log_probs, strict=True):
                branches.append({})
                for draw, token, log_prob in zip(row, token_K, log_prob_K, strict=False):
                    log_q_D[draw] += log_prob
                    reason = self.stop_tokens.finish_reasons.get(token)
                    if reason is not None:
                        finish[draw] = reason
                        continue
                    tokens[draw].append(token)
                    branches[-1].setdefault(token, []).append(draw)
            if not any(branches) or step == self.max_latent_tokens:
                break
            rows, input_ids, mask_BL = _branch_rows(cache, mask_BL, branches)
            logits_BV = self.model(
                input_ids=torch.tensor(input_ids, device=mask_BL.device)[:, None],
                attention_mask=mask_BL,
                position_ids=mask_BL.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        # A draw that reaches the length limit has one token more than a latent may have.
        return [
            Draw(tuple(token_L[: self.max_latent_tokens]), reason, float(log_q))
            for token_L, reason, log_q in zip(tokens, finish, log_q_D, strict=True)
        ]

    def _choose_tokens(
        self, logits_BV: torch.Tensor, rows: list[list[int]], noise_D: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The next token of each row's draws and its log-probability, both (B, K) with K the
        maximum number of draws of a row; shorter rows are padded."""
        log_probs_BV = logits_BV.float().log_softmax(-1)
        noise_BK = np.zeros((len(rows), max(map(len, rows))))
        for index, row in enumerate(rows):
            noise_BK[index, : len(row)] = noise_D[row]
        if self.greedy:
            tokens_BK = log_probs_BV.argmax(-1, keepdim=True).expand(noise_BK.shape)
        else:
            noise = torch.from_numpy(noise_BK).to(log_probs_BV.device)
            tokens_BK = inverse_cdf(log_probs_BV, noise)
        return tokens_BK.tolist(), log_probs_BV.gather(1, tokens_BK).tolist()


def _branch_rows(
    cache: Cache, mask_BL: torch.Tensor, branches: list[dict[int, list[int]]]
) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """The rows of the next step, the input token of each, and their attention mask.

    A row continues with the first of its tokens; each further token gets a copy of the row. Rows
    whose draws have all ended are removed once fewer than MIN_ACTIVE_FRACTION are active.
    """
    parents = [row for row, by_token in enumerate(branches) for _ in list(by_token)[1:]]
    active = [row for row, by_token in enumerate(branches) if by_token]
    if len(active) < MIN_ACTIVE_FRACTION * len(branches):
        order = torch.tensor(active + parents, device=mask_BL.device)
        cache.batch_select_indices(order)
        mask_BL, branches = mask_BL[order], [branches[row] for row in active]
    elif parents:
        order = torch.tensor(parents, device=mask_BL.device)
        for layer in cache.layers:
            assert isinstance(layer, PreallocatedCacheLayer)
            layer.append(order)
        mask_BL = torch.cat([mask_BL, mask_BL[order]])
    first = [next(iter(by_token.items()), (0, [])) for by_token in branches]
    further = [pair for by_token in branches for pair in list(by_token.items())[1:]]
    rows = first + further
    mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], 1)
    return [draws for _, draws in rows], [token for token, _ in rows], mask_BL


def inverse_cdf(log_probs_BV: torch.Tensor, noise_BK: torch.Tensor) -> torch.Tensor:
    """The tokens, shape (B, K), at which the cumulative probability of a row first exceeds its
    uniform numbers in [0, 1)."""
    cumulative_BV = log_probs_BV.double().exp().cumsum(-1)
    threshold_BK = noise_BK * cumulative_BV[:, -1:]
    tokens_BK = torch.searchsorted(cumulative_BV, threshold_BK, right=True)
    return tokens_BK.clamp_max(log_probs_BV.shape[-1] - 1)

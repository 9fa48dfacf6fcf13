"""Sampling latents from q′ (docs/method.md, sections 4.1 and 4.2): K token sequences for each
prompt, their log-probabilities, and how each of them ended.

Shapes: B batch rows, D draws of a batch, K draws of a row, L positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from boltlm.estep.kv_cache import PreallocatedCacheLayer, batch_by_length, prefill
from boltlm.seeds import generator
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens

FinishReason = Literal["stop", "length"]
SampleKey = tuple[str | int, ...]
MIN_ACTIVE_FRACTION = 0.7  # finished rows leave the batch when fewer of its rows are active


@dataclass(frozen=True, slots=True)
class Draw:
    """One latent sampled from q′: `tokens`, without the EoL that ended it.

    `finish` is "stop" where EoL was drawn and "length" where it was forced, after the maximum
    number of tokens. In nats: `log_q` is log q′, eq. (1); `log_allowed`, at most 0, is what the
    model's own log q(Z, EoL) has beyond it, eq. (1a). A sampler that cannot know it gives NaN.
    """

    tokens: tuple[int, ...]
    finish: FinishReason
    log_q: float
    log_allowed: float


class Sampler(Protocol):
    """What EStep needs of a sampler."""

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        """Draws k = `first_index`, `first_index` + 1, … of each prompt, `num_samples` of them, from
        q′. Draw k of prompt i depends on (seed, keys[i], k)."""
        ...


@dataclass(slots=True)
class TransformersSampler:
    """Samples with a Hugging Face model by inverse transform sampling.

    Each draw has its own uniform number for each step, so it does not depend on the rest of its
    batch. Draws of a prompt that agree so far share one row of the batch: the prompt, and every
    common prefix of draws, is computed once. `temperature` divides the logits.
    """

    model: PreTrainedModel
    special_tokens: SpecialTokens
    max_latent_tokens: int
    batch_tokens: int
    seed: int
    temperature: float = 1.0

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
        steps = self.max_latent_tokens
        indices = range(first_index, first_index + num_samples)
        return np.stack(
            [generator(self.seed, *key, k).random(steps) for key in keys for k in indices]
        )

    @torch.inference_mode()
    def _sample_batch(
        self, prompts: list[TokenIds], noise_DL: np.ndarray, num_samples: int
    ) -> list[Draw]:
        """The draws of a batch, those of a prompt one after the other."""
        eol = self.special_tokens.eol
        tokens: list[list[int]] = [[] for _ in noise_DL]
        log_q_D, log_allowed_D = np.zeros(len(tokens)), np.zeros(len(tokens))
        logits_BV, cache, mask_BL = prefill(self.model, prompts, PreallocatedCacheLayer)
        # The draws that each row of the batch stands for; an empty list: all of them have ended.
        rows = [list(range(i * num_samples, (i + 1) * num_samples)) for i in range(len(prompts))]
        for noise_D in noise_DL.T:
            chosen = self._choose_tokens(logits_BV, rows, noise_D)
            # Of each row: its unfinished draws, grouped by their next token.
            branches: list[dict[int, list[int]]] = []
            for row, token_K, log_q_K, log_allowed in zip(rows, *chosen, strict=True):
                branches.append({})
                for draw, token, log_q in zip(row, token_K, log_q_K, strict=False):
                    log_q_D[draw] += log_q
                    log_allowed_D[draw] += log_allowed
                    if token != eol:
                        tokens[draw].append(token)
                        branches[-1].setdefault(token, []).append(draw)
            if not any(branches):
                break
            rows, input_ids, mask_BL = _branch_rows(cache, mask_BL, branches)
            logits_BV = self.model(
                input_ids=torch.tensor(input_ids, device=mask_BL.device)[:, None],
                attention_mask=mask_BL,
                position_ids=mask_BL.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        else:  # some draws have reached the limit: EoL follows with probability 1
            log_eol_B = self._log_probs(logits_BV)[:, eol].tolist()
            for row, log_eol in zip(rows, log_eol_B, strict=True):
                log_allowed_D[row] += log_eol
        return [
            Draw(
                tuple(token_L),
                "stop" if len(token_L) < self.max_latent_tokens else "length",
                float(log_q),
                float(log_allowed),
            )
            for token_L, log_q, log_allowed in zip(tokens, log_q_D, log_allowed_D, strict=True)
        ]

    def _log_probs(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return (logits_BV.float() / self.temperature).log_softmax(-1)

    def _choose_tokens(
        self, logits_BV: torch.Tensor, rows: list[list[int]], noise_D: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]], list[float]]:
        """The next token of each row's draws and its log q′, both (B, K) with K the maximum number
        of draws of a row (shorter rows are padded), and the log of the probability that q gives to
        all allowed tokens, (B,)."""
        log_probs_BV = self._log_probs(logits_BV)
        log_probs_BV[:, list(self.special_tokens.barred)] = -torch.inf
        noise_BK = np.zeros((len(rows), max(map(len, rows))))
        for index, row in enumerate(rows):
            noise_BK[index, : len(row)] = noise_D[row]
        noise = torch.from_numpy(noise_BK).to(log_probs_BV.device)
        tokens_BK, log_allowed_B1 = inverse_cdf(log_probs_BV, noise)
        log_q_BK = log_probs_BV.gather(1, tokens_BK) - log_allowed_B1
        return tokens_BK.tolist(), log_q_BK.tolist(), log_allowed_B1[:, 0].clamp_max(0).tolist()


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


def inverse_cdf(
    log_probs_BV: torch.Tensor, noise_BK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, shape (B, K), at which the cumulative probability of a row first exceeds its
    uniform numbers in [0, 1) times its total, and the log of that total, shape (B, 1). A token of
    probability 0 is never chosen."""
    cumulative_BV = log_probs_BV.double().exp().cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
    threshold_BK = torch.minimum(noise_BK * total_B1, below_B1)
    return torch.searchsorted(cumulative_BV, threshold_BK, right=True), total_B1.log()

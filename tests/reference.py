"""A slow reference implementation of docs/method.md, 3 and 4, that the library is compared with.

Prompts are written out once more, by hand. A log-probability is one full forward pass in float64
over one sequence, without a cache, padding or a batch.

Shape suffixes: L positions of a sequence, V vocabulary, B bins of a histogram.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel

from boltlm.tokens import SpecialTokens

Ids = Sequence[int]


def double(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in float64."""
    return copy.deepcopy(model).double().eval()


def log_probs(
    model64: PreTrainedModel,
    prompt: Ids,
    tokens: Ids,
    barred: Ids = (),
    temperature: float = 1.0,
) -> np.ndarray:
    """log p(token | prompt, the tokens before it) for each of `tokens`, in nats, when logits are
    divided by `temperature`, the tokens `barred` have probability 0 and the others are
    renormalised."""
    ids_1L = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits_LV = model64(input_ids=ids_1L, use_cache=False).logits[0]
        logits_LV /= temperature
        logits_LV[:, list(barred)] = -torch.inf
        log_probs_LV = logits_LV.log_softmax(-1)
    positions = torch.arange(len(prompt) - 1, ids_1L.shape[1] - 1)
    return log_probs_LV[positions, ids_1L[0, len(prompt) :]].numpy()


def next_probs(model64: PreTrainedModel, prompt: Ids) -> np.ndarray:
    """p(token | prompt) over the vocabulary."""
    with torch.no_grad():
        logits_V = model64(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1]
    return logits_V.softmax(-1).numpy()


def barred_tokens(special: SpecialTokens) -> list[int]:
    """What a latent cannot contain; EoL ends it."""
    return [special.bos, special.eos, special.sol, special.prior, special.post]


def posterior_prompt(special: SpecialTokens, context: Ids, text: Ids) -> list[int]:
    """BOS C SoL EoL X SoL Post"""
    return [special.bos, *context, special.sol, special.eol, *text, special.sol, special.post]


def prior_prompt(special: SpecialTokens, context: Ids) -> list[int]:
    """BOS C SoL Prior"""
    return [special.bos, *context, special.sol, special.prior]


def log_proposal(
    model64: PreTrainedModel,
    special: SpecialTokens,
    prompt: Ids,
    latent: Ids,
    max_tokens: int,
    temperature: float = 1.0,
) -> float:
    """log q′(Z, EoL | prompt), in which a latent has at most `max_tokens` tokens."""
    tokens = latent if len(latent) == max_tokens else [*latent, special.eol]
    barred = barred_tokens(special)
    return float(log_probs(model64, prompt, tokens, barred, temperature).sum())


@dataclass(frozen=True)
class Parts:
    """log q′(Z, EoL | C, X), log q(Z, EoL | C, X), log p(Z, EoL | C) and log p(X | C, Z) of one
    latent, in nats; `is_forced`: whether q′ forces its EoL."""

    log_q: float
    log_q_unmasked: float
    is_forced: bool
    log_p_latent: float
    log_p_text: float

    @property
    def log_w(self) -> float:
        """The log importance weight, eq. (3)."""
        return self.log_p_latent + self.log_p_text - self.log_q


def parts(
    model64: PreTrainedModel,
    special: SpecialTokens,
    context: Ids,
    text: Ids,
    latent: Ids,
    max_tokens: int,
) -> Parts:
    """The log-probabilities of a latent of the chunk `text`, eqs. (1) to (2), if a latent has at
    most `max_tokens` tokens."""
    latent_eol = [*latent, special.eol]
    posterior = posterior_prompt(special, context, text)
    log_joint = log_probs(model64, prior_prompt(special, context), [*latent_eol, *text])
    return Parts(
        log_q=log_proposal(model64, special, posterior, latent, max_tokens),
        log_q_unmasked=log_probs(model64, posterior, latent_eol).sum(),
        is_forced=len(latent) == max_tokens,
        log_p_latent=log_joint[: len(latent_eol)].sum(),
        log_p_text=log_joint[len(latent_eol) :].sum(),
    )


@dataclass(frozen=True)
class Table:
    """Latents and their parts. Sums over the table are exact where it holds every latent that can
    be drawn."""

    latents: list[tuple[int, ...]]
    parts: list[Parts]

    @property
    def q(self) -> np.ndarray:
        """q′(Z, EoL | C, X), which sums to 1."""
        return np.exp([part.log_q for part in self.parts])

    @property
    def q_unmasked(self) -> np.ndarray:
        """q(Z, EoL | C, X). The sum falls short of 1 by the probability that a draw from the model
        ends otherwise than by EoL within the limit."""
        return np.exp([part.log_q_unmasked for part in self.parts])

    @property
    def forced(self) -> np.ndarray:
        """Which latents have the maximum length."""
        return np.array([part.is_forced for part in self.parts])

    @property
    def log_w(self) -> np.ndarray:
        """The log importance weights, eq. (3)."""
        return np.array([part.log_w for part in self.parts])

    @property
    def joint(self) -> float:
        """Σ_Z p(Z, EoL | C) p(X | C, Z), which is p(X | C) but for latents outside the table."""
        return float(np.exp([part.log_p_latent + part.log_p_text for part in self.parts]).sum())


def latents(ordinary: Ids, max_tokens: int) -> list[tuple[int, ...]]:
    """Every latent of up to `max_tokens` tokens."""
    lengths = range(max_tokens + 1)
    return [z for length in lengths for z in itertools.product(ordinary, repeat=length)]


def chi2(observed: Sequence[float] | np.ndarray, expected: Sequence[float] | np.ndarray) -> float:
    """The p-value of a chi-squared test; bins expected fewer than five times are pooled."""
    counts, means = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    is_rare = means < 5
    if is_rare.any():
        counts = np.append(counts[~is_rare], counts[is_rare].sum())
        means = np.append(means[~is_rare], means[is_rare].sum())
    return float(stats.chisquare(counts, means).pvalue)


def same_law(counts_2B: np.ndarray) -> float:
    """The p-value of two histograms under one distribution; bins with fewer than ten counts are
    pooled."""
    is_rare = counts_2B.sum(0) < 10
    pooled = np.column_stack([counts_2B[:, ~is_rare], counts_2B[:, is_rare].sum(1)])
    pooled = pooled[:, pooled.sum(0) > 0]
    return float(stats.chi2_contingency(pooled)[1]) if pooled.shape[1] > 1 else 1.0  # pyright: ignore[reportArgumentType]

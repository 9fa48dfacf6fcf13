"""A slow and plain reading of SPEC sections 2 to 5: what the library is compared with.

Prompts are written out here once more, by hand. A log-probability is one full forward pass in
float64 over one sequence, without a cache, padding or a batch.
"""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from transformers import PreTrainedModel

from boltlm.tokens import Markers

Ids = Sequence[int]


def double(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).double().eval()


def log_probs(model64: PreTrainedModel, prompt: Ids, tokens: Ids) -> np.ndarray:
    """log p(token | prompt, tokens before it) for every one of `tokens`, nats."""
    ids_1L = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logs_LV = model64(input_ids=ids_1L, use_cache=False).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids_1L.shape[1] - 1)
    return logs_LV[places, ids_1L[0, len(prompt) :]].numpy()


def next_probs(model64: PreTrainedModel, prompt: Ids) -> np.ndarray:
    """p(token | prompt) over the vocabulary."""
    with torch.no_grad():
        logits_V = model64(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1]
    return logits_V.softmax(-1).numpy()


def posterior_prompt(m: Markers, context: Ids, text: Ids) -> list[int]:
    return [m.bos, *context, m.sol, m.eol, *text, m.sol, m.post]


def prior_prompt(m: Markers, context: Ids) -> list[int]:
    return [m.bos, *context, m.sol, m.prior]


@dataclass(frozen=True)
class Parts:
    """log q(Z, EoL | C, X), log p(Z, EoL | C) and log p(X | C, Z) of one latent, nats."""

    log_q: float
    log_p_latent: float
    log_p_text: float

    @property
    def log_w(self) -> float:
        return self.log_p_latent + self.log_p_text - self.log_q


def parts(model64: PreTrainedModel, m: Markers, context: Ids, text: Ids, latent: Ids) -> Parts:
    ended = [*latent, m.eol]
    joint = log_probs(model64, prior_prompt(m, context), [*ended, *text])
    return Parts(
        log_q=log_probs(model64, posterior_prompt(m, context, text), ended).sum(),
        log_p_latent=joint[: len(ended)].sum(),
        log_p_text=joint[len(ended) :].sum(),
    )


@dataclass(frozen=True)
class Table:
    """Latents and their parts; where these are all that may end with EoL, the sums are exact."""

    latents: list[tuple[int, ...]]
    parts: list[Parts]

    @property
    def q(self) -> np.ndarray:
        """q(Z, EoL); what it leaves of 1 is draws that are no latent."""
        return np.exp([part.log_q for part in self.parts])

    @property
    def log_w(self) -> np.ndarray:
        return np.array([part.log_w for part in self.parts])

    @property
    def joint(self) -> float:
        """Σ_Z p(Z, EoL | C) p(X | C, Z): p(X | C), but for latents that are not in the table."""
        return float(np.exp([part.log_p_latent + part.log_p_text for part in self.parts]).sum())


def latents(ordinary: Ids, most: int) -> list[tuple[int, ...]]:
    """Every latent of up to `most` tokens."""
    lengths = range(most + 1)
    return [z for length in lengths for z in itertools.product(ordinary, repeat=length)]


def chi2(observed: Sequence[float] | np.ndarray, expected: Sequence[float] | np.ndarray) -> float:
    """The p-value of counts; what is expected fewer than five times is taken together."""
    seen, wanted = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    rare = wanted < 5
    if rare.any():
        seen = np.append(seen[~rare], seen[rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
    return float(stats.chisquare(seen, wanted).pvalue)


def same_law(counts_2B: np.ndarray) -> float:
    """The p-value of two samples' counts under one law; rare bins are taken together."""
    rare = counts_2B.sum(0) < 10
    kept = np.column_stack([counts_2B[:, ~rare], counts_2B[:, rare].sum(1)])
    kept = kept[:, kept.sum(0) > 0]
    return float(stats.chi2_contingency(kept)[1]) if kept.shape[1] > 1 else 1.0  # pyright: ignore[reportArgumentType]

"""Compares log-probabilities and importance weights of the E-step with a recomputation in float64,
one sequence at a time and without a key–value cache.

Shapes: L positions, V vocabulary, K samples of a chunk.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from boltlm.checkpoint import final_weights
from boltlm.estep.config import DrawSettings
from boltlm.estep.contexts import ChunkInContext, chunks_in_context
from boltlm.estep.importance import normalized_weights
from boltlm.estep.shard_worker import build_estep, context_token_budget
from boltlm.records import Chunk, Sample, read_shard, shard_paths
from boltlm.sequences import layouts
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens


@torch.inference_mode()
def exact_log_prob(
    model: PreTrainedModel, prefix: TokenIds, branch: TokenIds, barred: Sequence[int] = ()
) -> float:
    """log p(branch | prefix) in nats, by one forward pass in the model's own precision. `barred`:
    tokens that have probability 0, the others being renormalised."""
    ids_1L = torch.tensor([[*prefix, *branch]], device=model.device)
    logits_LV = model(input_ids=ids_1L).logits[0, len(prefix) - 1 : -1]
    logits_LV[:, list(barred)] = -torch.inf
    log_probs_LV = logits_LV.log_softmax(-1)
    return float(log_probs_LV.gather(1, ids_1L[0, len(prefix) :, None]).sum())


def exact_log_weight(
    model: PreTrainedModel,
    special: SpecialTokens,
    chunk: ChunkInContext,
    latent: TokenIds,
    finish: str,
) -> tuple[float, float]:
    """(log q′, log w) of a latent given by its token ids: eqs. (1) to (3) of docs/method.md. If its
    `finish` is "length", EoL was forced and has probability 1 in q′."""
    ended = [*latent, special.eol]
    posterior = layouts.posterior_prompt(special, chunk.context, chunk.text)
    drawn = ended if finish == "stop" else latent
    log_q = exact_log_prob(model, posterior, drawn, special.barred)
    prior = layouts.prior_prompt(special, chunk.context)
    log_p = exact_log_prob(model, prior, [*ended, *chunk.text])
    return log_q, log_p - log_q


def weight_errors(
    model: PreTrainedModel,
    special: SpecialTokens,
    chunks: Sequence[ChunkInContext],
    groups: Sequence[Sequence[Sample]],
) -> dict[str, float]:
    """Absolute errors of stored log q′ and log w (nats) against those of `model`, over the samples
    of each chunk, and the total variation distance between the two distributions of eq. (4) from
    which the chunk's latent is selected."""
    log_q_errors, log_w_errors, total_variations = [], [], []
    for chunk, group in zip(chunks, groups, strict=True):
        exact_K2 = np.array(
            [exact_log_weight(model, special, chunk, s.tokens, s.finish) for s in group]
        )
        stored_K2 = np.array([(sample.log_q, sample.log_weight) for sample in group])
        log_q_errors += list(np.abs(exact_K2 - stored_K2)[:, 0])
        log_w_errors += list(np.abs(exact_K2 - stored_K2)[:, 1])
        difference_K = normalized_weights(exact_K2[:, 1]) - normalized_weights(stored_K2[:, 1])
        total_variations.append(np.abs(difference_K).sum() / 2)
    return {
        "samples": len(log_w_errors),
        "log_q_error_max": max(log_q_errors),
        **{f"log_weight_error_p{p}": float(np.percentile(log_w_errors, p)) for p in (50, 90, 99)},
        "log_weight_error_max": max(log_w_errors),
        "total_variation_mean": float(np.mean(total_variations)),
        "total_variation_max": float(np.max(total_variations)),
    }


def verify_weights(
    settings: DrawSettings, k_samples: int, model: Path, chunks: Path, limit: int
) -> dict[str, float]:
    """Draw `k_samples` latents for the first `limit` chunks of the first shard in `chunks` as the
    E-step does, and return their errors as `weight_errors` does.

    Raises UserError where the model or the chunks are missing.
    """
    estep = build_estep(settings, model, purpose="precision")
    token_budget = context_token_budget(estep.coder, settings.max_latent_tokens)
    first_shard = read_shard(shard_paths(chunks)[0], Chunk)
    in_context = chunks_in_context(first_shard, settings.context_chunks, token_budget)[:limit]
    groups = estep.run(in_context, k_samples)
    weights = final_weights(model)
    exact: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float64)
    return weight_errors(exact.eval(), estep.special_tokens, in_context, groups)

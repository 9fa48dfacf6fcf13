"""Held-out measures of a model that is still in training, for its curve."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from boltlm.evaluation import likelihood
from boltlm.params import build, section
from boltlm.records import Chunk, read
from boltlm.sampling.estep import EStep, SamplingConfig, items
from boltlm.sampling.shards import context_room
from boltlm.tokens import TextCoder


def measures(
    params: Mapping[str, Any],
    *,
    latent: bool,
    documents: int,
    k_samples: int,
    tokenizer: Path,
    heldout: Path,
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """A function of the model: −log p of the first `documents` held-out documents' raw text a
    token, and where it writes latents their bound with K = `k_samples`, nats a token; as the
    stage `evaluate` does, on a small sample."""
    coder = TextCoder(tokenizer)
    config = build(SamplingConfig, section(params, "sampling"), "sampling")
    of_document = groupby(read(heldout, Chunk), lambda chunk: chunk.doc_id)
    chunks = [chunk for _, group in islice(of_document, documents) for chunk in group]
    found = items(chunks, section(params, "context_chunks"), context_room(coder, params))
    whole = likelihood.documents_of(chunks)

    def measure(model: PreTrainedModel) -> dict[str, float]:
        raw = likelihood.raw_scores(model, coder.markers, whole, coder.window, config.batch_tokens)
        measured = {"heldout_nll": likelihood.raw_nll(raw)["nll_per_token"]}
        if latent:
            estep = EStep(
                model,
                coder,
                replace(config, sampler="transformers"),
                max_latent_tokens=section(params, "max_latent_tokens"),
                seed=section(params, "seed"),
                purpose="during",
            )
            groups = estep.run(found, k_samples)
            lengths = [len(chunk.tokens) for chunk in chunks]
            bounds = likelihood.bounds(groups, lengths, [k_samples])
            measured["heldout_elbo"] = bounds["elbo_per_token"]
        return measured

    return measure

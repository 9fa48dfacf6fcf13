"""Held-out measures of a model while it is trained, for its learning curve."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from boltlm.estep.config import DrawSettings
from boltlm.estep.contexts import chunks_in_context
from boltlm.estep.estep import EStep
from boltlm.estep.shard_worker import context_token_budget
from boltlm.evaluation import likelihood
from boltlm.records import Chunk, read_table
from boltlm.tokens import TextCoder
from boltlm.training.config import ValidationConfig
from boltlm.training.trainer import ValidationHook

# For the stage `train`, whose outputs do not depend on this module or on the settings of draws.
ValidationSettings = DrawSettings


def validation_hook(
    settings: DrawSettings,
    config: ValidationConfig,
    *,
    latent: bool,
    tokenizer: Path,
    heldout: Path,
) -> ValidationHook:
    """A function that measures a model on the first `config.documents` documents of a held-out
    corpus, with the estimators of the stage `evaluate` (docs/method.md, section 5).

    It returns `val_nll`, eq. (10), and for a model with latents `val_elbo`, eq. (7) with K =
    `config.k_samples`; both in nats per token. `tokenizer` is a model folder, `heldout` the folder
    of the corpus's chunks.
    """
    coder = TextCoder(tokenizer)
    groups_by_document = groupby(read_table(heldout, Chunk), lambda chunk: chunk.doc_id)
    chunks = [chunk for _, group in islice(groups_by_document, config.documents) for chunk in group]
    token_budget = context_token_budget(coder, settings.max_latent_tokens)
    chunks_with_context = chunks_in_context(chunks, settings.context_chunks, token_budget)
    num_tokens = sum(len(chunk.tokens) for chunk in chunks)
    documents = likelihood.join_chunks(chunks)
    # vLLM cannot sample from a model whose weights change.
    sampling = replace(settings.sampling, sampler="transformers")

    def validate(model: PreTrainedModel) -> Mapping[str, float]:
        nlls = likelihood.document_nlls(
            model, coder.special_tokens, documents, coder.context_length, sampling.batch_tokens
        )
        metrics = {"val_nll": sum(nlls.values()) / num_tokens}
        if latent:
            estep = EStep(
                model,
                coder,
                sampling,
                max_latent_tokens=settings.max_latent_tokens,
                seed=settings.seed,
                purpose="validation",
            )
            groups = estep.run(chunks_with_context, config.k_samples)
            log_w_CK = np.array([[sample.log_weight for sample in group] for group in groups])
            bound_C = likelihood.chunk_bounds(log_w_CK, config.k_samples)
            metrics["val_elbo"] = float(bound_C.sum()) / num_tokens
        return metrics

    return validate

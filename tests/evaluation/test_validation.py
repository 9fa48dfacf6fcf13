"""Held-out measures during training, compared with exact values."""

import math
from pathlib import Path

import numpy as np
import pytest

from boltlm.evaluation import validation
from boltlm.params import build_settings, load
from boltlm.records import Chunk, write_shard
from boltlm.training.config import ValidationConfig
from tests import reference, tiny

MAX_LATENT_TOKENS = 3


def test_the_measures_are_near_the_exact_ones(enumerable: tiny.Tiny, tmp_path: Path) -> None:
    """With many samples the bound approaches Σ log p(X | C), summed over all latents that can end,
    and val_nll is the plain one. The third document is left out; raw models have no bound."""
    special = enumerable.special_tokens
    folder = Path(enumerable.model.name_or_path or tmp_path / "model")
    documents = {"a": [(1, 4), (7,)], "b": [(4, 4, 1)], "c": [(1, 1, 1, 1)]}
    chunks = [
        Chunk(doc_id=doc_id, chunk=index, text="x", tokens=tokens)
        for doc_id, texts in documents.items()
        for index, tokens in enumerate(texts)
    ]
    write_shard(tmp_path / "heldout" / "00000.parquet", Chunk, chunks)
    enumerable.model.save_pretrained(folder)
    enumerable.coder.tokenizer.save(str(folder / "tokenizer.json"))
    params = load(tiny.ROOT / "params.yaml")
    params |= {"max_latent_tokens": MAX_LATENT_TOKENS, "context_chunks": 3}
    settings = build_settings(validation.ValidationSettings, params)

    def validate(latent: bool) -> dict[str, float]:
        hook = validation.validation_hook(
            settings,
            ValidationConfig(every=1, documents=2, k_samples=3000),
            latent=latent,
            tokenizer=folder,
            heldout=tmp_path / "heldout",
        )
        return dict(hook(enumerable.model))

    model64 = reference.double(enumerable.model)
    bound = log_prob = 0.0
    for doc_id in ("a", "b"):
        context: list[int] = []
        for tokens in documents[doc_id]:
            parts = [
                reference.parts(model64, special, context, tokens, latent, MAX_LATENT_TOKENS)
                for latent in reference.latents(tiny.ORDINARY, MAX_LATENT_TOKENS)
            ]
            joint = [part.log_p_latent + part.log_p_text for part in parts]
            bound += float(np.logaddexp.reduce(joint))
            context += tokens
        log_prob += float(reference.log_probs(model64, [special.bos], context).sum())
    metrics = validate(latent=True)
    assert metrics["val_nll"] == pytest.approx(-log_prob / 6, abs=1e-5)
    assert metrics["val_elbo"] == pytest.approx(bound / 6, abs=0.05)
    assert math.isfinite(metrics["val_elbo"])
    assert list(validate(latent=False)) == ["val_nll"]

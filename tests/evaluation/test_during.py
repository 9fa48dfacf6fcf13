"""Held-out measures during training: those of the first documents, near their exact values."""

import math
from pathlib import Path

import numpy as np
import pytest

from boltlm.evaluation import during
from boltlm.params import load
from boltlm.records import Chunk, write_shard
from tests import exact, tiny

MOST = 3  # tokens of a latent


def test_the_measures_are_near_the_exact_ones(enumerable: tiny.Tiny, tmp_path: Path) -> None:
    """With many draws the bound comes near Σ log p(X | C) over all latents that can end; the raw
    likelihood is the plain one; a third document is left out; raw models have no bound."""
    m, folder = enumerable.markers, Path(enumerable.model.name_or_path or tmp_path / "model")
    texts = {"a": [(1, 4), (7,)], "b": [(4, 4, 1)], "c": [(1, 1, 1, 1)]}
    chunks = [
        Chunk(doc_id=name, chunk=index, text="x", tokens=tokens)
        for name, found in texts.items()
        for index, tokens in enumerate(found)
    ]
    write_shard(tmp_path / "heldout" / "00000.parquet", Chunk, chunks)
    enumerable.model.save_pretrained(folder)
    enumerable.coder.tokenizer.save(str(folder / "tokenizer.json"))
    params = load(tiny.ROOT / "params.yaml") | {"max_latent_tokens": MOST, "context_chunks": 3}

    def measured(latent: bool) -> dict[str, float]:
        return during.measures(
            params,
            latent=latent,
            documents=2,
            k_samples=3000,
            tokenizer=folder,
            heldout=tmp_path / "heldout",
        )(enumerable.model)

    slow = exact.double(enumerable.model)
    bound = raw = 0.0
    for name in ("a", "b"):
        context: list[int] = []
        for tokens in texts[name]:
            parts = [
                exact.parts(slow, m, context, tokens, latent)
                for latent in exact.latents(tiny.ORDINARY, MOST)
            ]
            joint = [part.log_p_latent + part.log_p_text for part in parts]
            bound += float(np.logaddexp.reduce(joint))
            context += tokens
        raw += float(exact.log_probs(slow, [m.bos], context).sum())
    found = measured(latent=True)
    assert found["heldout_nll"] == pytest.approx(-raw / 6, abs=1e-5)
    assert found["heldout_elbo"] == pytest.approx(bound / 6, abs=0.05)
    assert math.isfinite(found["heldout_elbo"])
    assert list(measured(latent=False)) == ["heldout_nll"]

"""An experiment with latents for the tests of the HTML report: settings, tables and models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boltlm.params import build_settings, load
from boltlm.records import Chunk, Sample, shard_name, write_shard
from boltlm.reporting.html_config import HtmlReportSettings
from tests.reporting.experiment import chain_params
from tests.tiny import ROOT, enumerable

CHAIN = ("m0", "m1", "m2")
KEYS = ("seed", "k_samples", "context_chunks", "max_latent_tokens", "sampling")
HOSTILE = '</script><script>alert(1)</script><!--<img src=x onerror="alert(2)"> & "\u2028\U0001f600'
LONG_WORD = "x" * 5000
NUM_DOCUMENTS, NUM_SHARDS, NUM_CHUNKS = 6, 2, 2
LOG_WEIGHTS = (-3.0, -1.0, -2.0)  # of the three draws of a chunk


def page_settings(**report: Any) -> HtmlReportSettings:
    """Settings of the chain m0 → m1 → m2, in which `by_m0` and `by_m1` are the latents of the
    iterations 1 and 2; `report` changes the section `report`."""
    params = load(ROOT / "params.yaml")
    section = {"documents": 40, "token_gains": True, "max_megabytes": 10, **report}
    values = {**chain_params(CHAIN), **{key: params[key] for key in KEYS}, "report": section}
    return build_settings(HtmlReportSettings, values)


def doc_name(index: int) -> str:
    return f"d{index}"


def write_tables(root: Path, texts: Sequence[str] = ("a b", "c a")) -> None:
    """data/chunks/em, data/latents/by_m0 and by_m1 with the chunks `texts` in every document. Of
    the three draws of a chunk the second is selected; one of document 1 was cut at the limit, and
    from iteration 1 to 2 the selected latents of document 2 change."""
    for shard in range(NUM_SHARDS):
        documents = range(shard, NUM_DOCUMENTS, NUM_SHARDS)
        chunks = [(d, c) for d in documents for c in range(NUM_CHUNKS)]
        rows = [Chunk(doc_id=doc_name(d), chunk=c, text=texts[c], tokens=(1, 4)) for d, c in chunks]
        write_shard(root / "data/chunks/em" / shard_name(shard), Chunk, rows)
        for entry in ("by_m0", "by_m1"):
            samples = [
                Sample(
                    doc_id=doc_name(d),
                    chunk=c,
                    sample=k,
                    latent=f"{texts[c]} changed" if (d, entry) == (2, "by_m1") else texts[c],
                    tokens=(7, 1)[:k],
                    finish="length" if (d, k) == (1, 2) else "stop",
                    log_q=-1.0,
                    log_allowed=0.0,
                    log_p_latent=-2.0,
                    log_p_text=log_weight + 1,
                    log_weight=log_weight,
                    selected=k == 1,
                )
                for d, c in chunks
                for k, log_weight in enumerate(LOG_WEIGHTS)
            ]
            write_shard(root / "data/latents" / entry / shard_name(shard), Sample, samples)


def write_models(root: Path) -> None:
    """The models m0 and m1."""
    for name in CHAIN[:2]:
        enumerable(root / "models" / name)

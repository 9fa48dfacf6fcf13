"""The distinct latents among the K draws of a chunk, with their weights (docs/method.md, 3.5)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boltlm.errors import UserError
from boltlm.records import Sample, read_column, read_tokens
from boltlm.sequences.layouts import TokenIds

NEGLIGIBLE_WEIGHT = 1e-4  # of a latent, as a fraction of the largest weight of its chunk


@dataclass(frozen=True, slots=True)
class WeightedLatent:
    """One of the distinct latents drawn for a chunk, and its normalised weight ŵ, eq. (4)."""

    latent: TokenIds
    weight: float


def read_draws(path: Path, min_weight: float) -> dict[tuple[str, int], list[WeightedLatent]]:
    """The `weighted_latents` in one shard of `data/latents/<name>`, by document and chunk.

    Raises UserError where the shard is another kind of table, or has particles: their weights are
    those of documents so far, not of the latents of a chunk.
    """
    table, log_weights = read_tokens(path, Sample), read_column(path, Sample, "log_weight")
    if (read_column(path, Sample, "source") == "particle").any():
        raise UserError(
            f"{path}: these latents are particles (estep.method smc), of which only those of the"
            " selected one belong together; use draws: selected"
        )
    rows: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(table.doc_ids, table.chunks, strict=True)):
        rows[key].append(row)
    return {
        key: weighted_latents([table.ids(row) for row in draws], log_weights[draws], min_weight)
        for key, draws in rows.items()
    }


def weighted_latents(
    latents: Sequence[TokenIds], log_w_K: np.ndarray, min_weight: float
) -> list[WeightedLatent]:
    """The distinct latents among the K of a chunk, in their order, with ŵ of eq. (4). Equal ones
    become one latent with the sum of their weights.

    `log_w_K`: log w in nats. A latent whose weight is below the fraction `min_weight` of the
    chunk's largest gets the weight 0, and the others are normalised again.
    """
    totals: dict[bytes, float] = defaultdict(float)
    for latent, w in zip(latents, np.exp(log_w_K - log_w_K.max()), strict=True):
        totals[np.asarray(latent, np.int32).tobytes()] += float(w)
    minimum = min_weight * max(totals.values())
    kept = {ids: w if w >= minimum else 0.0 for ids, w in totals.items()}
    total = sum(kept.values())
    return [WeightedLatent(np.frombuffer(ids, np.int32), w / total) for ids, w in kept.items()]

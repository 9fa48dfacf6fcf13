"""How far stored log-probabilities lie from a recomputation in float64.

    python -m boltlm.sampling.precision --params params.yaml --model models/em1 \
        --chunks data/chunks/em --limit 50

Draws with the section `sampling` of params.yaml, for the first chunks of the corpus, and prints one
JSON object. `total_variation`: between the two distributions from which a chunk's latent is kept.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from boltlm.errors import UserError, stage
from boltlm.params import load, section
from boltlm.records import Chunk, Sample, read_shard, shards
from boltlm.sampling.estep import Item, items
from boltlm.sampling.shards import context_room, make_estep
from boltlm.sampling.weights import normalised
from boltlm.sequences import layouts
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers


@torch.inference_mode()
def log_prob(model: PreTrainedModel, prefix: Ids, branch: Ids) -> float:
    """log p(branch | prefix), one sequence at a time, without a cache, in the model's own type."""
    ids_1L = torch.tensor([[*prefix, *branch]], device=model.device)
    logits_LV = model(input_ids=ids_1L).logits[0, len(prefix) - 1 : -1]
    logs_LV = logits_LV.log_softmax(-1)
    return float(logs_LV.gather(1, ids_1L[0, len(prefix) :, None]).sum())


def log_weight(model: PreTrainedModel, m: Markers, item: Item, tokens: Ids) -> tuple[float, float]:
    """(log q, log w) of a latent, from its ids."""
    ended = [*tokens, m.eol]
    log_q = log_prob(model, layouts.posterior_prefix(m, item.context, item.text), ended)
    log_p = log_prob(model, layouts.prior_prefix(m, item.context), [*ended, *item.text])
    return log_q, log_p - log_q


def errors(
    model: PreTrainedModel,
    m: Markers,
    found: Sequence[Item],
    groups: Sequence[Sequence[Sample]],
) -> dict[str, float]:
    """Stored values against those of a float64 model, over the draws that are latents."""
    of_q, of_w, variation = [], [], []
    for item, group in zip(found, groups, strict=True):
        kept = [sample for sample in group if sample.finish == "stop"]
        if not kept:
            continue
        exact = np.array([log_weight(model, m, item, sample.tokens) for sample in kept])
        stored = np.array([(sample.log_q, sample.log_weight) for sample in kept])
        of_q += list(np.abs(exact - stored)[:, 0])
        of_w += list(np.abs(exact - stored)[:, 1])
        gap = normalised(exact[:, 1]) - normalised(stored[:, 1])
        variation.append(np.abs(gap).sum() / 2)
    if not of_w:
        raise UserError("no draw ended with the end of a latent; raise --limit, or train the model")
    return {
        "samples": len(of_w),
        "log_q_error_max": max(of_q),
        **{f"log_weight_error_p{p}": float(np.percentile(of_w, p)) for p in (50, 90, 99)},
        "log_weight_error_max": max(of_w),
        "total_variation_mean": float(np.mean(variation)),
        "total_variation_max": float(np.max(variation)),
    }


def measure(params: Mapping[str, Any], model: Path, chunks: Path, limit: int) -> dict[str, float]:
    """Draw for the first `limit` chunks as params say, and compare."""
    estep = make_estep(params, model, purpose="precision")
    room = context_room(estep.coder, params)
    first = read_shard(shards(chunks)[0], Chunk)
    found = items(first, section(params, "context_chunks"), room)[:limit]
    groups = estep.run(found, section(params, "k_samples"))
    exact: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    return errors(exact.eval(), estep.markers, found, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--model", "--chunks"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50, help="chunks")
    args = parser.parse_args()
    print(json.dumps(measure(load(args.params), args.model, args.chunks, args.limit)))


if __name__ == "__main__":
    stage(main)

"""The compute of an E-step (docs/method.md, 7.3)."""

from pathlib import Path

from boltlm.checkpoint import final_weights
from boltlm.estep.config import EStepSettings
from boltlm.estep.estep import chunks_in_context
from boltlm.estep.shard_worker import context_token_budget, group_by_chunk
from boltlm.records import Chunk, Sample, read_shard, shard_paths
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder
from boltlm.training.compute import read_compute, write_compute


def count_estep_tokens(settings: EStepSettings, *, model: Path, chunks: Path, out: Path) -> int:
    """The forward tokens of the E-step that wrote `out`, eq. (14): for each chunk the posterior
    prompt and Z EoL of each draw, and the joint prompt and Z EoL X of each draw."""
    coder = TextCoder(final_weights(model))
    token_budget = context_token_budget(coder, settings.max_latent_tokens)
    tokens = 0
    for path in shard_paths(chunks):
        shard = read_shard(path, Chunk)
        in_context = chunks_in_context(shard, settings.context_chunks, token_budget)
        groups = group_by_chunk(read_shard(out / path.name, Sample))
        for chunk, group in zip(in_context, groups, strict=True):
            proposal = layouts.posterior_prompt(coder.special_tokens, chunk.context, chunk.text)
            joint = layouts.prior_prompt(coder.special_tokens, chunk.context)
            drawn = sum(len(sample.tokens) + 1 for sample in group)
            tokens += len(proposal) + len(joint) + 2 * drawn + len(group) * len(chunk.text)
    return tokens


def record_estep_compute(
    name: str, forward_tokens: int, *, model: Path, out: Path
) -> dict[str, int]:
    """Write the ComputeRecord of data/latents/<name>, `out`, and return its metrics. A forward pass
    takes a third of the FLOPs of a training step."""
    drawn_by = read_compute(model)
    record = write_compute(
        out,
        f"latents/{name}",
        flops=forward_tokens * drawn_by.flops_per_token // 3,
        flops_per_token=drawn_by.flops_per_token,
        history=[drawn_by.lineage],
    )
    return {"estep_flops": record.own_flops, "history_flops": record.history_flops}

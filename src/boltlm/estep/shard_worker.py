"""The E-step for one shard: a table of chunks becomes a table of samples.

A shard's samples depend on its chunks, the model, the settings and the code, and on nothing else
(docs/method.md, section 4.4).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import median

from transformers import PreTrainedModel

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.estep.config import DrawSettings
from boltlm.estep.contexts import ChunkInContext, Throughput, chunks_in_context
from boltlm.estep.estep import EStep
from boltlm.estep.mixture import PreviousDraws
from boltlm.estep.smc import run_smc
from boltlm.records import Chunk, Sample, read_shard, write_shard
from boltlm.sequences import layouts
from boltlm.shard_store import is_complete, mark_complete
from boltlm.tokens import TextCoder, chunk_token_budget

# Median difference of stored and recomputed log q over the draws of a chunk, nats: rounding in
# bfloat16 makes it some hundredths, another model several nats.
MAX_DENSITY_ERROR = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """What a worker needs to process shards, in whichever process or on whichever node it runs.

    `model` and `chunks`: the folders of the checkpoint and of the table of chunks. `folder`: the
    work folder of the draws, with a subfolder of finished shards for each `variant` of the
    estimator and number of samples: draws from the proposal are shared, all else is not.
    `previous`, `previous_model`: the folders of the latents of the iteration before and of the
    model that drew them, where the estimator reuses them.
    """

    settings: DrawSettings
    purpose: str
    model: Path
    chunks: Path
    folder: Path
    variant: str
    num_samples: int
    previous: Path | None = None
    previous_model: Path | None = None

    def samples_folder(self, num_samples: int) -> Path:
        return self.folder / f"{self.variant}-k{num_samples}"

    def reusable_samples(self, shard: str) -> list[list[Sample]] | None:
        """The draws of a shard from the proposal that were made for another K or another variant,
        by chunk: those of the largest such K whose shard is complete, or None."""
        folders = [path for path in self.folder.glob("*-k*") if path.is_dir()]
        counts = {path: int(path.name.rpartition("-k")[2]) for path in folders}
        for folder in sorted(counts, key=lambda path: (counts[path], path.name), reverse=True):
            path = folder / shard
            if folder != self.samples_folder(self.num_samples) and is_complete(path):
                groups = group_by_chunk(read_shard(path, Sample))
                drawn = [[s for s in group if s.source == "proposal"] for group in groups]
                if all(drawn):
                    return drawn
        return None


class ShardWorker:
    """Processes the shards of one task, with the model loaded once."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.estep = build_estep(task.settings, task.model, purpose=task.purpose)
        self.token_budget = context_token_budget(self.estep.coder, task.settings.max_latent_tokens)

    def __call__(self, shard: str) -> Throughput:
        """Write the samples of one shard to the work folder and mark it complete, unless it is: a
        worker may have died between that and its answer."""
        task, estep = self.task, self.estep
        estep.throughput = Throughput()
        path = task.samples_folder(task.num_samples) / shard
        if is_complete(path):
            return estep.throughput
        chunks = read_shard(task.chunks / shard, Chunk)
        size, context_chunks = task.num_samples, task.settings.context_chunks
        if task.settings.options.method == "smc":
            groups = run_smc(
                estep,
                chunks,
                size,
                context_chunks=context_chunks,
                token_budget=self.token_budget,
            )
        else:
            in_context = chunks_in_context(chunks, context_chunks, self.token_budget)
            previous = self._previous_draws(shard, in_context)
            groups = estep.run(in_context, size, task.reusable_samples(shard), previous)
        write_shard(path, Sample, [sample for group in groups for sample in group])
        mark_complete(path)
        return estep.throughput

    @cached_property
    def _previous_model(self) -> PreTrainedModel | None:
        folder = self.task.previous_model
        if folder is None:
            return None
        precision = self.task.settings.sampling.precision
        return checkpoint.load_model(checkpoint.final_weights(folder), precision)

    def _previous_draws(self, shard: str, chunks: Sequence[ChunkInContext]) -> PreviousDraws | None:
        """The samples of the iteration before. Raises UserError where the table lacks the shard, or
        where other settings or another model made its draws."""
        if self.task.previous is None:
            return None
        path = self.task.previous / shard
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; `previous` must name latents of the same corpus"
            )
        groups = {(g[0].doc_id, g[0].chunk): g for g in group_by_chunk(read_shard(path, Sample))}
        previous = PreviousDraws(groups, self._previous_model)
        if previous.model is not None and chunks:
            self._check_densities(previous, previous.model, chunks[0], path)
        return previous

    def _check_densities(
        self, previous: PreviousDraws, model: PreTrainedModel, chunk: ChunkInContext, path: Path
    ) -> None:
        """Raises UserError where the stored log q of a chunk's draws is not that of `model`."""
        samples = previous.of(chunk.doc_id, chunk.chunk)
        special = self.estep.special_tokens
        prompts = [layouts.posterior_prompt(special, chunk.context, chunk.text)]
        (log_q_K,) = self.estep.log_densities(model, prompts, [[s.tokens for s in samples]])
        difference = median(abs(q - s.log_q) for q, s in zip(log_q_K, samples, strict=True))
        if not difference < MAX_DENSITY_ERROR:
            raise UserError(
                f"{path}: the log q of its draws is not that of {self.task.previous_model} (off by"
                f" {difference:.2g} nats); `previous_model` must be the model that made"
                " `previous`, with the same temperature and max_latent_tokens"
            )


def build_estep(settings: DrawSettings, model: Path, *, purpose: str) -> EStep:
    """An E-step with the checkpoint in the folder `model`; `purpose` keys its random numbers.

    Raises UserError where the checkpoint cannot be loaded, or the sampler is not installed.
    """
    checkpoint.keep_freed_memory()
    model = checkpoint.final_weights(model)
    config, coder = settings.sampling, TextCoder(model)
    sampler = None
    if config.sampler == "vllm":
        from boltlm.estep.vllm_sampler import VLLMSampler

        sampler = VLLMSampler(
            model,
            coder.special_tokens,
            max_latent_tokens=settings.max_latent_tokens,
            context_length=coder.context_length,
            precision=config.precision,
            gpu_memory_utilization=config.gpu_memory_utilization,
            seed=settings.seed,
        )
    return EStep(
        checkpoint.load_model(model, config.precision),
        coder,
        config,
        max_latent_tokens=settings.max_latent_tokens,
        seed=settings.seed,
        purpose=purpose,
        sampler=sampler,
        options=settings.options,
    )


def context_token_budget(coder: TextCoder, max_latent_tokens: int) -> int:
    """Maximum length of a chunk and its context together, in tokens."""
    return chunk_token_budget(coder.context_length, max_latent_tokens)


def group_by_chunk(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The K samples of each chunk; those of one chunk must be consecutive."""
    return [list(group) for _, group in groupby(samples, lambda s: (s.doc_id, s.chunk))]

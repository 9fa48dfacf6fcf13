"""The E-step for one shard: a table of chunks becomes a table of samples.

A shard's samples depend on its chunks, the model, the settings and the code, and on nothing else
(docs/method.md, section 4.4).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from boltlm import checkpoint
from boltlm.estep.config import DrawSettings
from boltlm.estep.estep import EStep, Throughput, chunks_in_context
from boltlm.records import Chunk, Sample, read_shard, write_shard
from boltlm.shard_store import is_complete, mark_complete
from boltlm.tokens import TextCoder, chunk_token_budget


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """What a worker needs to process shards, in whichever process or on whichever node it runs.

    `model` and `chunks`: the folders of the checkpoint and of the table of chunks. `folder`: the
    work folder of the draws, with a subfolder of finished shards for each selection and number of
    samples: the draws are shared, and what is selected among them is not.
    """

    settings: DrawSettings
    purpose: str
    model: Path
    chunks: Path
    folder: Path
    num_samples: int

    def samples_folder(self, num_samples: int) -> Path:
        return self.folder / f"{self.settings.selection}-k{num_samples}"

    def reusable_samples(self, shard: str) -> list[list[Sample]] | None:
        """The samples of a shard that were drawn for another K or another selection, by chunk: the
        largest such K whose shard is complete, or None."""
        counts = {path: int(path.name.rpartition("-k")[2]) for path in self.folder.glob("*-k*")}
        for folder in sorted(counts, key=lambda path: (counts[path], path.name), reverse=True):
            path = folder / shard
            if folder != self.samples_folder(self.num_samples) and is_complete(path):
                return group_by_chunk(read_shard(path, Sample))
        return None


class ShardWorker:
    """Processes the shards of one task, with the model loaded once."""

    def __init__(self, task: ShardTask) -> None:
        self.task = task
        self.estep = build_estep(task.settings, task.model, purpose=task.purpose)
        self.token_budget = context_token_budget(self.estep.coder, task.settings.max_latent_tokens)

    def __call__(self, shard: str) -> Throughput:
        """Write the samples of one shard to the work folder and mark it complete."""
        task, estep = self.task, self.estep
        estep.throughput = Throughput()
        chunks = chunks_in_context(
            read_shard(task.chunks / shard, Chunk), task.settings.context_chunks, self.token_budget
        )
        groups = estep.run(chunks, task.num_samples, task.reusable_samples(shard))
        path = task.samples_folder(task.num_samples) / shard
        write_shard(path, Sample, [sample for group in groups for sample in group])
        mark_complete(path)
        return estep.throughput


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
        selection=settings.selection,
    )


def context_token_budget(coder: TextCoder, max_latent_tokens: int) -> int:
    """Maximum length of a chunk and its context together, in tokens."""
    return chunk_token_budget(coder.context_length, max_latent_tokens)


def group_by_chunk(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The K samples of each chunk; those of one chunk must be consecutive."""
    return [list(group) for _, group in groupby(samples, lambda s: (s.doc_id, s.chunk))]

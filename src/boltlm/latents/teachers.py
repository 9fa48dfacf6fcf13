"""`teachers.<name>` becomes `data/teacher/<name>`: latents of chunks, or paraphrases of documents.

`kind` chooses who writes: dataset (the data itself), openai, openai_batch, vllm.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from boltlm.errors import UserError
from boltlm.latents import dataset
from boltlm.latents.asking import Asked
from boltlm.latents.journal import Journal
from boltlm.latents.tables import Encoder, count, reasons, row
from boltlm.latents.tasks import Asker
from boltlm.latents.work import Work
from boltlm.params import build, section
from boltlm.progress import track
from boltlm.records import Chunk, Document, TeacherLatent, read_shard, shards, write_shard

KINDS = ("dataset", "openai", "openai_batch", "vllm")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTeacher:
    """Params entry `teachers.<name>` of `kind: dataset`: latents that the data carries."""

    kind: Literal["dataset"]
    corpus: str


def teacher(params: Mapping[str, Any], name: str) -> DatasetTeacher | Asked:
    """The entry `teachers.<name>`. Raises UserError for an unknown kind or key."""
    where = f"teachers.{name}"
    kind = section(params, f"{where}.kind")
    types: dict[str, type[Any]] = {"dataset": DatasetTeacher}
    if kind == "openai":
        from boltlm.latents.online import OnlineTeacher

        types[kind] = OnlineTeacher
    elif kind == "openai_batch":
        from boltlm.latents.batches import BatchTeacher

        types[kind] = BatchTeacher
    elif kind == "vllm":
        from boltlm.latents.local import LocalTeacher

        types[kind] = LocalTeacher
    if kind not in types:
        raise UserError(f"params.yaml: {where}.kind must be {' | '.join(KINDS)}, found {kind!r}")
    return build(types[kind], section(params, where), where)


def write(
    params: Mapping[str, Any],
    name: str,
    encoder: Encoder,
    *,
    split: Path,
    chunks: Path,
    out: Path,
    journal: Path,
) -> dict[str, int | float]:
    """Write `data/teacher/<name>`, shard by shard; return the counts, failures by reason.

    Raises UserError when no chunk at all gets a latent, or when too many got none.
    """
    config = teacher(params, name)
    limit = section(params, "max_latent_tokens")
    paths = shards(chunks)
    if isinstance(config, DatasetTeacher):
        counts: Counter[str] = Counter()
        for path in track(paths, what=f"teacher {name}", total=len(paths), unit="shards"):
            documents = read_shard(split / path.name, Document)
            rows = list(_carried(documents, read_shard(path, Chunk), encoder, limit))
            count(rows, counts)
            write_shard(out / path.name, TeacherLatent, rows)
        if counts["latents"] == 0:
            raise UserError(
                f"teachers.{name}: not one of {counts['chunks']} chunks got a latent"
                f" ({reasons(counts)}; max_latent_tokens is {limit})"
            )
        return dict(counts)
    asker = Asker(
        task=config.task,
        settings=config.settings,
        context_chunks=section(params, "context_chunks"),
        paraphrases=config.paraphrases,
        seed=config.seed,
    )
    work = Work(f"teachers.{name}", config, asker, split, paths)
    with closing(Journal(journal)) as opened:
        return work.run(opened, encoder, limit, out)


def _carried(
    documents: list[Document], chunks: list[Chunk], encoder: Encoder, limit: int
) -> Iterator[TeacherLatent]:
    """One row a chunk, of what the data carries."""
    by_document = {key: list(group) for key, group in groupby(chunks, lambda c: c.doc_id)}
    for document in documents:
        found = by_document[document.doc_id]
        for chunk, latent in zip(found, dataset.chunk_latents(document, found), strict=True):
            reason = dataset.NO_LATENT if latent is None else None
            yield row(chunk.doc_id, chunk.chunk, latent, reason, encoder, limit)

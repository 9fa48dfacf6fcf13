"""`teachers.<name>.kind` chooses who writes the latents of a corpus."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

from boltlm.errors import UserError
from boltlm.latents import dataset
from boltlm.params import build, section
from boltlm.progress import track
from boltlm.records import Chunk, Document, TeacherLatent, read_shard, shards, write_shard

TOO_LONG = "too_long"


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTeacher:
    """Params entry `teachers.<name>` of `kind: dataset`: latents that the data carries."""

    kind: Literal["dataset"]
    corpus: str


def write(
    params: Mapping[str, Any],
    name: str,
    encoder: Encoder,
    *,
    split: Path,
    chunks: Path,
    out: Path,
) -> dict[str, int | float]:
    """Write `data/teacher/<name>`, shard by shard; return the counts, failures by reason.

    Raises UserError when no chunk at all gets a latent.
    """
    build(DatasetTeacher, section(params, f"teachers.{name}"), f"teachers.{name}")
    limit = section(params, "max_latent_tokens")
    counts: Counter[str] = Counter()
    paths = shards(chunks)
    for path in track(paths, what=f"teacher {name}", total=len(paths), unit="shards"):
        documents = read_shard(split / path.name, Document)
        rows = list(_rows(documents, read_shard(path, Chunk), encoder, limit))
        for row in rows:
            counts["chunks"] += 1
            counts["latents"] += row.reason is None
            counts["latent_tokens"] += len(row.tokens or ())
            if row.reason is not None:
                counts[f"without_{row.reason}"] += 1
        write_shard(out / path.name, TeacherLatent, rows)
    if counts["latents"] == 0:
        raise UserError(f"teachers.{name}: not one of {counts['chunks']} chunks got a latent")
    return dict(counts)


def _rows(
    documents: list[Document], chunks: list[Chunk], encoder: Encoder, limit: int
) -> Iterator[TeacherLatent]:
    """One row a chunk. A latent longer than the model may write is left out, and counted."""
    by_document = {key: list(group) for key, group in groupby(chunks, lambda c: c.doc_id)}
    for document in documents:
        found = by_document[document.doc_id]
        for chunk, latent in zip(found, dataset.chunk_latents(document, found), strict=True):
            tokens = tuple(encoder.encode(latent)) if latent is not None else ()
            reason = dataset.NO_LATENT if latent is None else None
            if len(tokens) > limit:
                reason = TOO_LONG
            kept = reason is None
            yield TeacherLatent(
                doc_id=chunk.doc_id,
                chunk=chunk.chunk,
                latent=latent if kept else None,
                tokens=tokens if kept else None,
                reason=reason,
            )

"""The work of the stage `split` for one shard of documents, in whichever process it is done.

First every shard is cut into chunks; then, when the evaluation sets are known, those of training
corpora are compared with them. What a shard becomes is saved in the work folder under the content
of its documents and everything else that it depends on. So a run that was killed resumes, and where
one corpus has changed the shards of the others are there already.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from boltlm.corpus.chunker import Chunker
from boltlm.corpus.contamination import EvaluationNgrams
from boltlm.corpus.reference_latents import by_sentences
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import Chunk, Document, read_column, read_shard, write_json, write_shard
from boltlm.shard_store import is_complete, mark_complete

DOCUMENTS, CHUNKS = "documents.parquet", "chunks.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceShard:
    """Consecutive documents of a corpus as its source has them, and their place among its shards.
    `has_pieces`: their chunks are the pieces of the source."""

    corpus: str
    index: int
    documents: Sequence[Document]
    has_pieces: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitShard:
    """What has become of a shard of `source_documents` documents: a folder with its tables, and
    counts. After the comparison with
    evaluation sets `overlaps` has the number of documents that share an n-gram with each set and
    the indices of these n-grams."""

    corpus: str
    index: int
    source_documents: int
    folder: Path
    counts: Mapping[str, int]
    overlaps: tuple[Sequence[int], Sequence[int]] | None = None


def chunking_folder(work: Path, chunker: Chunker) -> Path:
    """The folder of the shards that this chunker makes with this version of the code."""
    coder, config = chunker.encoder, chunker.config
    facts = {
        "tokenizer": hash_path(coder.model / "tokenizer.json"),
        "special_tokens": str(coder.special_tokens),
        "lengths": [config.mean_sentences, config.min_sentences, config.max_sentences],
        "max_chunk_tokens": chunker.max_chunk_tokens,
        "seed": chunker.seed,
        "code": hash_code("boltlm.corpus.split_shards"),
    }
    return work / "split" / fingerprint(facts)


def use_one_core() -> None:
    """Let the tokenizer of this process work on one core, because each worker has one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ShardChunker:
    """Cuts the documents of shards into chunks and writes both below `folder`.

    Documents that are empty or that the tokenizer cannot reproduce are dropped and counted.
    """

    def __init__(self, chunker: Chunker, folder: Path) -> None:
        use_one_core()
        self.chunker, self.folder = chunker, folder

    def __call__(self, shard: SourceShard) -> SplitShard:
        content = repr((shard.has_pieces, shard.documents)).encode()
        folder = self.folder / hashlib.blake2b(content, digest_size=16).hexdigest()
        counts_path = folder / "counts.json"
        if not all(map(is_complete, (folder / DOCUMENTS, folder / CHUNKS, counts_path))):
            documents, chunks, counts = self._chunk(shard)
            _write_tables(folder, documents, chunks)
            _write_complete(counts_path, counts)
        return SplitShard(
            corpus=shard.corpus,
            index=shard.index,
            source_documents=len(shard.documents),
            folder=folder,
            counts=json.loads(counts_path.read_text("utf-8")),
        )

    def _chunk(self, shard: SourceShard) -> tuple[list[Document], list[Chunk], Counter[str]]:
        """The documents that can be chunked, their chunks, and what was written and dropped."""
        counts: Counter[str] = Counter()
        documents = [document for document in shard.documents if document.text]
        if not shard.has_pieces:
            documents = list(map(by_sentences, documents))
        cut_before = self.chunker.cut_chunks
        chunked = self.chunker.chunks(documents)
        kept = [d for d, chunks in zip(documents, chunked, strict=True) if chunks is not None]
        chunks = [chunk for chunks in chunked for chunk in chunks or ()]
        counts["cut_chunks"] = self.chunker.cut_chunks - cut_before
        counts["dropped_empty"] = len(shard.documents) - len(documents)
        counts["dropped_not_reversible"] = len(documents) - len(kept)
        if shard.has_pieces:
            counts["dropped_empty_pieces"] = sum((d.pieces or ()).count(0) for d in kept)
        return kept, chunks, counts + _sizes(kept, chunks)  # a sum of Counters has no zeros


class ShardComparer:
    """Compares the documents of shards with evaluation sets; `drop`: writes the tables without
    those that share an n-gram with any set."""

    def __init__(self, ngrams: EvaluationNgrams, drop: bool) -> None:
        self.ngrams, self.drop = ngrams, drop
        self.name = f"compared-{fingerprint({'sets': ngrams.facts(), 'drop': drop})}"

    def __call__(self, shard: SplitShard) -> SplitShard:
        folder = shard.folder / self.name
        result_path = folder / "overlaps.json"
        if not is_complete(result_path):
            _write_complete(result_path, self._compare(shard, folder))
        result = json.loads(result_path.read_text("utf-8"))
        has_own = result["dropped"] > 0
        if has_own and not all(map(is_complete, (folder / DOCUMENTS, folder / CHUNKS))):
            self._compare(shard, folder)
        return replace(
            shard,
            folder=folder if has_own else shard.folder,
            counts={**shard.counts, **result["counts"]},
            overlaps=(result["documents"], result["ngrams"]),
        )

    def _compare(self, shard: SplitShard, folder: Path) -> dict[str, Any]:
        texts = read_column(shard.folder / DOCUMENTS, Document, "text").tolist()
        shared_DS, matched_M = self.ngrams.overlaps(texts)
        contaminated: list[bool] = np.logical_or.reduce(shared_DS, axis=1).tolist()
        counts: dict[str, int] = {}
        dropped = sum(contaminated) if self.drop else 0
        if self.drop:
            counts["dropped_contaminated"] = dropped
        if dropped:
            counts |= _write_without(shard.folder, contaminated, folder)
        return {
            "documents": shared_DS.sum(axis=0).tolist(),
            "ngrams": matched_M.tolist(),
            "dropped": dropped,
            "counts": counts,
        }


def _write_without(folder: Path, drop: Sequence[bool], out: Path) -> dict[str, int]:
    """Write the tables in `folder` without the documents to drop; return what is left."""
    documents = read_shard(folder / DOCUMENTS, Document)
    kept = [document for document, dropped in zip(documents, drop, strict=True) if not dropped]
    names = {document.doc_id for document in kept}
    chunks = [chunk for chunk in read_shard(folder / CHUNKS, Chunk) if chunk.doc_id in names]
    _write_tables(out, kept, chunks)
    return dict(_sizes(kept, chunks))


def _write_tables(folder: Path, documents: Sequence[Document], chunks: Sequence[Chunk]) -> None:
    write_shard(folder / DOCUMENTS, Document, documents)
    write_shard(folder / CHUNKS, Chunk, chunks)
    mark_complete(folder / DOCUMENTS)
    mark_complete(folder / CHUNKS)


def _write_complete(path: Path, facts: Mapping[str, Any]) -> None:
    write_json(path, facts)
    mark_complete(path)


def _sizes(documents: Sequence[Document], chunks: Sequence[Chunk]) -> Counter[str]:
    tokens = sum(len(chunk.tokens) for chunk in chunks)
    return Counter({"documents": len(documents), "chunks": len(chunks), "tokens": tokens})

"""Documents with their latents as flat files of token ids, opened memory-mapped.

Written once, document by document; read at random while the training stream is made. Memory does
not grow with the corpus.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from boltlm.errors import UserError
from boltlm.records import (
    Chunk,
    Paraphrase,
    Sample,
    TeacherLatent,
    TokenTable,
    read_shard,
    read_tokens,
    shards,
)
from boltlm.sequences.layouts import Ids, Pair
from boltlm.tokens import TextCoder

BATCH_TEXTS = 1000  # encoded at once
IDS = np.dtype(np.int32)
PLACES = np.dtype(np.int64)


@dataclass(frozen=True, slots=True)
class Text:
    """A document's id and its chunks with their latents."""

    doc_id: str
    pairs: Sequence[Pair]


def texts(chunks: Path, data: Path | None) -> Iterator[Text]:
    """The documents of a corpus, each chunk with its latent where it has one: the selected sample
    of `data/latents/…`, or what the teacher wrote in `data/teacher/…`. A shard in memory at a time.

    Raises UserError when `data` is another kind of table, lacks a shard of the corpus, or none of
    a shard's latents belongs to it.
    """
    for path in shards(chunks):
        table = read_tokens(path, Chunk)
        latents = _latents(data, path.name) if data is not None else None
        known = _places(latents) if latents is not None else {}
        matched = 0
        rows = zip(table.doc_ids, table.chunks, range(len(table.doc_ids)), strict=True)
        for doc_id, group in itertools.groupby(rows, lambda row: row[0]):
            pairs: list[Pair] = []
            for _, chunk, row in group:
                place = known.get((doc_id, chunk))
                matched += place is not None
                latent = None if place is None or latents is None else latents.ids(place)
                pairs.append(Pair(table.ids(row), latent))
            yield Text(doc_id, pairs)
        if known and not matched:
            raise UserError(
                f"{path}: no latent of {data} belongs to a chunk of this corpus; see params.yaml"
            )


def _latents(data: Path, shard: str) -> TokenTable:
    path = data / shard
    if data.parent.name not in ("teacher", "latents"):
        raise UserError(f"{data}: latents come from data/latents/… or data/teacher/…")
    if not path.is_file():
        raise UserError(f"{path}: no such file, but the corpus has this shard; see params.yaml")
    if data.parent.name == "teacher":
        return read_tokens(path, TeacherLatent)
    return read_tokens(path, Sample, only="selected")


def _places(table: TokenTable) -> dict[tuple[str, int], int]:
    """The rows that have ids, by document and chunk."""
    keys = zip(table.doc_ids, table.chunks, strict=True)
    return {key: row for row, key in enumerate(keys) if table.valid[row]}


def paraphrases(data: Path, coder: TextCoder) -> Iterator[Text]:
    """What a teacher made of the documents, each paraphrase a document of its own; those that
    have a reason instead of a text are left out.

    Raises UserError when there is none.
    """
    found = 0
    for path in shards(data):
        told = [
            (f"{row.doc_id}#{row.paraphrase}", row.text) for row in read_shard(path, Paraphrase)
        ]
        kept = [(name, text) for name, text in told if text]
        found += len(kept)
        yield from encoded(kept, coder)
    if not found:
        raise UserError(f"{data}: no paraphrase has a text")


def encoded(named: Iterable[tuple[str, str]], coder: TextCoder) -> Iterator[Text]:
    """Whole texts as documents of one chunk without a latent."""
    left = iter(named)
    while batch := list(itertools.islice(left, BATCH_TEXTS)):
        ids = coder.encode_batch([text for _, text in batch])
        for (name, _), found in zip(batch, ids, strict=True):
            yield Text(name, (Pair(found, None),))


class Store:
    """The documents of a folder that `write` made. Places: document d has the chunks
    `documents[d]` to `documents[d + 1]`; chunk c the ids `texts[c]` to `texts[c + 1]` of the text
    file, `latents[c]` to `latents[c + 1]` of the latents', none where `bare[c]`."""

    def __init__(self, folder: Path) -> None:
        def flat(name: str, dtype: np.dtype) -> np.ndarray:
            path = folder / name
            empty = path.stat().st_size == 0
            return np.zeros(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode="r"))

        self.text_ids, self.latent_ids = flat("text", IDS), flat("latent", IDS)
        self.texts, self.latents = flat("texts", PLACES), flat("latents", PLACES)
        self.documents, self.bare = flat("documents", PLACES), flat("bare", np.dtype(np.bool_))
        self.names, self.name_ends = flat("names", np.dtype(np.uint8)), flat("name_ends", PLACES)

    def __len__(self) -> int:
        return len(self.documents) - 1

    @property
    def chunks(self) -> int:
        return len(self.bare)

    def document_of(self, chunk: int) -> int:
        return int(np.searchsorted(self.documents, chunk, side="right")) - 1

    def name(self, document: int) -> str:
        start, end = self.name_ends[document : document + 2]
        return self.names[start:end].tobytes().decode()

    def text(self, first: int, end: int) -> np.ndarray:
        """The ids of neighbouring chunks, joined."""
        return self.text_ids[self.texts[first] : self.texts[end]]

    def latent(self, chunk: int) -> list[int] | None:
        if self.bare[chunk]:
            return None
        start, end = self.latents[chunk : chunk + 2]
        return self.latent_ids[start:end].tolist()

    def pair(self, chunk: int) -> Pair:
        return Pair(self.text(chunk, chunk + 1).tolist(), self.latent(chunk))

    def facts(self) -> dict[str, int]:
        """Counts of what is stored."""
        return {
            "documents": len(self),
            "chunks": self.chunks,
            "chunks_without_latent": int(self.bare.sum()),
            "raw_tokens": len(self.text_ids),
            "latent_tokens": len(self.latent_ids),
        }


def write(folder: Path, documents: Iterable[Text]) -> Store:
    """Store documents in a folder, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = Counter[str]()
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}

        def put(name: str, data: bytes) -> None:
            files[name].write(data)

        def end(name: str, more: int) -> None:
            ends[name] += more
            put(name, ends[name].to_bytes(8, "little"))

        for name in ("text", "latent", "texts", "latents", "documents", "bare", "names"):
            files[name] = stack.enter_context((folder / name).open("wb"))
        files["name_ends"] = stack.enter_context((folder / "name_ends").open("wb"))
        for name in ("texts", "latents", "documents", "name_ends"):
            end(name, 0)
        for document in documents:
            for pair in document.pairs:
                put("text", _bytes(pair.text))
                end("texts", len(pair.text))
                latent: Ids = () if pair.latent is None else pair.latent
                put("latent", _bytes(latent))
                end("latents", len(latent))
                put("bare", bytes([pair.latent is None]))
            end("documents", len(document.pairs))
            name = document.doc_id.encode()
            put("names", name)
            end("name_ends", len(name))
    return Store(folder)


def _bytes(ids: Ids) -> bytes:
    return np.asarray(ids, dtype=IDS).tobytes()

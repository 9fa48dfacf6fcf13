"""Documents with their latents as flat files of token ids, opened memory-mapped.

A store is written once, document by document, and read at random while the training stream is
packed. Its memory use does not grow with the corpus.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

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
    shard_paths,
)
from boltlm.sequences.draws import WeightedLatent, read_draws
from boltlm.sequences.layouts import LatentPair, TokenIds
from boltlm.tokens import TextCoder

BATCH_TEXTS = 1000  # texts encoded in one call of the tokenizer
TOKEN_DTYPE = np.dtype(np.int32)
OFFSET_DTYPE = np.dtype(np.int64)
_FILES = {
    "text_tokens": TOKEN_DTYPE,
    "text_offsets": OFFSET_DTYPE,
    "latent_tokens": TOKEN_DTYPE,
    "latent_offsets": OFFSET_DTYPE,
    "missing_latent": np.dtype(np.bool_),
    "draw_tokens": TOKEN_DTYPE,
    "draw_token_offsets": OFFSET_DTYPE,
    "draw_weights": np.dtype(np.float64),
    "draw_offsets": OFFSET_DTYPE,
    "document_offsets": OFFSET_DTYPE,
    "doc_ids": np.dtype(np.uint8),
    "doc_id_offsets": OFFSET_DTYPE,
}


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """The id of a document and its chunks, in reading order, with their latents. `draws`: the
    distinct latents that were drawn for each chunk; empty where they are not wanted."""

    doc_id: str
    pairs: Sequence[LatentPair]
    draws: Sequence[Sequence[WeightedLatent]] = ()


def read_tokenized(
    chunks: Path, data: Path | None, min_draw_weight: float | None = None
) -> Iterator[TokenizedDocument]:
    """The documents of a corpus, each chunk with its latent where it has one.

    Latents are the selected samples of `data/latents/<name>` or the latents that a teacher wrote
    into `data/teacher/<name>`; no chunk has one where `data` is None. With `min_draw_weight`, which
    `weighted_latents` explains, the documents have their draws too. One shard is in memory at a
    time. Raises UserError where `data` is another kind of table, lacks a shard of the corpus, or
    where no latent of a shard belongs to the corpus.
    """
    for path in shard_paths(chunks):
        table = read_tokens(path, Chunk)
        latents = _read_latents(data, path.name) if data is not None else None
        latent_rows = _rows_by_chunk(latents) if latents is not None else {}
        draws = None
        if data is not None and min_draw_weight is not None:
            draws = read_draws(data / path.name, min_draw_weight)
        num_matched = 0
        rows = zip(table.doc_ids, table.chunks, range(len(table.doc_ids)), strict=True)
        for doc_id, group in itertools.groupby(rows, lambda row: row[0]):
            pairs: list[LatentPair] = []
            document_draws: list[Sequence[WeightedLatent]] = []
            for _, chunk, row in group:
                latent = None
                if latents is not None and (doc_id, chunk) in latent_rows:
                    latent = latents.ids(latent_rows[doc_id, chunk])
                    num_matched += 1
                pairs.append(LatentPair(table.ids(row), latent))
                if draws is not None:
                    document_draws.append(draws.get((doc_id, chunk), ()))
            yield TokenizedDocument(doc_id, pairs, document_draws)
        if latent_rows and not num_matched:
            raise UserError(
                f"{path}: no latent of {data} belongs to a chunk of this corpus; check `corpus`"
                " and `data` of the model in params.yaml"
            )


def _read_latents(data: Path, shard: str) -> TokenTable:
    """The token ids of the latents in one shard of `data`, selected samples or a teacher's."""
    path = data / shard
    if data.parent.name not in ("teacher", "latents"):
        raise UserError(f"{data}: latents are read from data/latents/<name> or data/teacher/<name>")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, but the corpus has this shard; check `corpus` and `data` of the"
            " model in params.yaml"
        )
    if data.parent.name == "teacher":
        return read_tokens(path, TeacherLatent)
    return read_tokens(path, Sample, only="selected")


def _rows_by_chunk(table: TokenTable) -> dict[tuple[str, int], int]:
    """The rows whose ids are not null, by document and chunk."""
    keys = zip(table.doc_ids, table.chunks, strict=True)
    return {key: row for row, key in enumerate(keys) if table.valid[row]}


def read_paraphrases(data: Path, coder: TextCoder) -> Iterator[TokenizedDocument]:
    """The paraphrases of a teacher, each as a document of its own with the id `<document>#<index>`.

    Rows that hold a reason instead of a text are skipped; the teacher stage counts them in its
    metrics. Raises UserError where no row has a text.
    """
    num_texts = 0
    for path in shard_paths(data):
        paraphrases = [
            (f"{row.doc_id}#{row.paraphrase}", row.text)
            for row in read_shard(path, Paraphrase)
            if row.text
        ]
        num_texts += len(paraphrases)
        yield from tokenize_texts(paraphrases, coder)
    if not num_texts:
        raise UserError(f"{data}: no paraphrase has a text, so there is nothing to train on")


def tokenize_texts(
    texts: Iterable[tuple[str, str]], coder: TextCoder
) -> Iterator[TokenizedDocument]:
    """Texts, given as (document id, text), as documents of one chunk without a latent."""
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, BATCH_TEXTS)):
        encoded = coder.encode_batch([text for _, text in batch])
        for (doc_id, _), ids in zip(batch, encoded, strict=True):
            yield TokenizedDocument(doc_id, (LatentPair(ids, None),))


class DocumentStore:
    """The documents of a folder that `write_documents` wrote; chunks are numbered over all of them.

    Document d has the chunks `document_offsets[d]` to `document_offsets[d + 1]`. Chunk c has the
    token ids `text_tokens[text_offsets[c] : text_offsets[c + 1]]`, and so for its latent, except
    that a chunk with `missing_latent[c]` has no latent (an empty latent is something else).

    Where the documents were written with draws, chunk c has the draws `draw_offsets[c]` to
    `draw_offsets[c + 1]`, draw k with the weight ŵ `draw_weights[k]`; a chunk without a latent has
    one draw, of weight 1 and without tokens.
    """

    def __init__(self, folder: Path) -> None:
        arrays = {name: open_array(folder / name, dtype) for name, dtype in _FILES.items()}
        self.text_tokens = arrays["text_tokens"]
        self.text_offsets = arrays["text_offsets"]
        self.latent_tokens = arrays["latent_tokens"]
        self.latent_offsets = arrays["latent_offsets"]
        self.missing_latent = arrays["missing_latent"]
        self.draw_offsets = arrays["draw_offsets"]
        self.draw_weights = arrays["draw_weights"]
        self._draw_tokens = arrays["draw_tokens"]
        self._draw_token_offsets = arrays["draw_token_offsets"]
        self.document_offsets = arrays["document_offsets"]
        self._doc_ids = arrays["doc_ids"]
        self._doc_id_offsets = arrays["doc_id_offsets"]

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.document_offsets) - 1

    @property
    def num_chunks(self) -> int:
        """The number of chunks of all documents."""
        return len(self.missing_latent)

    @property
    def num_draws(self) -> int:
        """The number of draws of all chunks."""
        return len(self.draw_weights)

    def document_of(self, chunk: int) -> int:
        """The document to which a chunk belongs."""
        return int(np.searchsorted(self.document_offsets, chunk, side="right")) - 1

    def chunk_range(self, document: int) -> tuple[int, int]:
        """The first chunk of a document and the one after its last."""
        start, end = self.document_offsets[document : document + 2]
        return int(start), int(end)

    def draw_range(self, chunk: int) -> tuple[int, int]:
        """The first draw of a chunk and the one after its last."""
        start, end = self.draw_offsets[chunk : chunk + 2]
        return int(start), int(end)

    def chunk_of(self, draw: int) -> int:
        """The chunk to which a draw belongs."""
        return int(np.searchsorted(self.draw_offsets, draw, side="right")) - 1

    def doc_id(self, document: int) -> str:
        """The id that a document has in its corpus."""
        start, end = self._doc_id_offsets[document : document + 2]
        return self._doc_ids[start:end].tobytes().decode()

    def text(self, start: int, end: int) -> np.ndarray:
        """The token ids of the chunks `start` to `end − 1`, concatenated, int32."""
        return self.text_tokens[self.text_offsets[start] : self.text_offsets[end]]

    def latent(self, chunk: int, draw: int | None = None) -> list[int] | None:
        """The token ids of a chunk's latent, or None where it has none. `draw`: one of the chunk's
        draws, whose latent is returned instead."""
        if self.missing_latent[chunk]:
            return None
        if draw is not None:
            start, end = self._draw_token_offsets[draw : draw + 2]
            return self._draw_tokens[start:end].tolist()
        start, end = self.latent_offsets[chunk : chunk + 2]
        return self.latent_tokens[start:end].tolist()

    def pair(self, chunk: int, draw: int | None = None) -> LatentPair:
        """A chunk's text and the latent that `latent` returns."""
        return LatentPair(self.text(chunk, chunk + 1).tolist(), self.latent(chunk, draw))

    def counts(self) -> dict[str, int]:
        """How many documents, chunks, chunks without a latent, and tokens are stored; where there
        are draws, also how many distinct latents, and how many of them have the weight 0."""
        counts = {
            "documents": len(self),
            "chunks": self.num_chunks,
            "chunks_without_latent": int(self.missing_latent.sum()),
            "raw_tokens": len(self.text_tokens),
            "latent_tokens": len(self.latent_tokens),
        }
        if self.num_draws:
            counts["distinct_latents"] = self.num_draws - counts["chunks_without_latent"]
            counts["negligible_latents"] = int((self.draw_weights == 0).sum())
        return counts


def write_documents(folder: Path, documents: Iterable[TokenizedDocument]) -> DocumentStore:
    """Write documents in their order into a folder, and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = Counter[str]()
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}

        def append_offset(name: str, count: int) -> None:
            totals[name] += count
            files[name].write(totals[name].to_bytes(8, "little"))

        for name in _FILES:
            if name.endswith("offsets"):
                append_offset(name, 0)
        for document in documents:
            for pair in document.pairs:
                files["text_tokens"].write(_token_bytes(pair.text))
                append_offset("text_offsets", len(pair.text))
                latent: TokenIds = () if pair.latent is None else pair.latent
                files["latent_tokens"].write(_token_bytes(latent))
                append_offset("latent_offsets", len(latent))
                files["missing_latent"].write(bytes([pair.latent is None]))
            for pair, draws in zip(document.pairs, document.draws, strict=bool(document.draws)):
                stored = [WeightedLatent((), 1.0)] if pair.latent is None else draws
                for draw in stored:
                    files["draw_tokens"].write(_token_bytes(draw.latent))
                    append_offset("draw_token_offsets", len(draw.latent))
                    files["draw_weights"].write(np.float64(draw.weight).tobytes())
                append_offset("draw_offsets", len(stored))
            append_offset("document_offsets", len(document.pairs))
            doc_id = document.doc_id.encode()
            files["doc_ids"].write(doc_id)
            append_offset("doc_id_offsets", len(doc_id))
    return DocumentStore(folder)


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only memory-mapped array; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _token_bytes(ids: TokenIds) -> bytes:
    return np.asarray(ids, dtype=TOKEN_DTYPE).tobytes()

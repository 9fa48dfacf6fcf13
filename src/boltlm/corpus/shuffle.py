"""The order of documents, in bounded memory: shuffled by their ids and the seed, or sorted."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from boltlm.records import Document
from boltlm.seeds import uniform

MAX_RUN_CHARACTERS = 1 << 28  # of the documents that are sorted in memory
MAX_RUNS = 256  # sorted files that are merged at once
BATCH_DOCUMENTS = 64  # of each such file in memory
SortKey = Callable[[Document], float]


def shuffled(documents: Iterable[Document], size: int | None, seed: int) -> Iterator[Document]:
    """The documents shuffled through a buffer of `size`, by random numbers that depend on their
    ids: each document that arrives replaces one in the full buffer, which is yielded. Those still
    in the buffer at the end are sorted by their random numbers.

    None: all documents are sorted by their random numbers, which is the order of any buffer that
    holds them all, but in temporary files.
    """
    if size == 0:
        yield from documents
        return

    def key(document: Document) -> float:
        return uniform(seed, "order", document.doc_id)

    if size is None:
        yield from sorted_in_files(documents, key)
        return
    buffer: list[Document] = []
    for document in documents:
        if len(buffer) < size:
            buffer.append(document)
            continue
        index = int(uniform(seed, "place", document.doc_id) * size)
        replaced, buffer[index] = buffer[index], document
        yield replaced
    yield from sorted(buffer, key=key)


def sorted_in_files(documents: Iterable[Document], key: SortKey) -> Iterator[Document]:
    """The documents sorted by `key` (external merge sort). In memory are MAX_RUN_CHARACTERS and a
    document, and then BATCH_DOCUMENTS of each of at most MAX_RUNS files."""
    with TemporaryDirectory(prefix="boltlm-shuffle-") as name:
        paths = (Path(name) / str(number) for number in itertools.count())
        runs: list[Path] = []
        for run in _runs(documents):
            runs.append(_write_run(next(paths), sorted(run, key=key)))
            if len(runs) == MAX_RUNS:
                merged = _write_run(next(paths), _merged(runs, key))
                for path in runs:
                    path.unlink()
                runs = [merged]
        yield from _merged(runs, key)


def _runs(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, in lists of MAX_RUN_CHARACTERS or one document more."""
    run: list[Document] = []
    characters = 0
    for document in documents:
        run.append(document)
        latents = (document.latent, *(document.thoughts or ()))
        characters += len(document.text) + sum(len(latent or "") for latent in latents)
        if characters >= MAX_RUN_CHARACTERS:
            yield run
            run, characters = [], 0
    if run:
        yield run


def _merged(runs: Sequence[Path], key: SortKey) -> Iterator[Document]:
    return heapq.merge(*map(_read_run, runs), key=key)


def _write_run(path: Path, documents: Iterable[Document]) -> Path:
    remaining = iter(documents)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(path), Document.schema, options=options) as writer:
        while rows := [
            asdict(document) for document in itertools.islice(remaining, BATCH_DOCUMENTS)
        ]:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=Document.schema))
    return path


def _read_run(path: Path) -> Iterator[Document]:
    """The documents of a file, a batch in memory at a time."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            for row in batch.to_pylist():
                for name in ("thoughts", "pieces"):
                    row[name] = None if row[name] is None else tuple(row[name])
                yield Document(**row)

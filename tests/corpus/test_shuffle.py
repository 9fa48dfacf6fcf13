"""Shuffling a whole source in files: one order, every document once, bounded memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from boltlm.corpus import shuffle
from boltlm.corpus.shuffle import shuffled
from boltlm.records import Document
from boltlm.seeds import uniform


def make_documents(count: int) -> list[Document]:
    """Documents that differ in which fields they have, with texts of 5 to 60 characters."""
    return [
        Document(
            doc_id=f"d{i}",
            text=f"é\n\x85{i:02d}" + "x" * (i * 37 % 56),
            source="s",
            cluster=None if i % 3 else f"c{i}",
            latent=None if i % 2 else "why",
            thoughts=None if i % 4 else ("because", None, ""),
            log_prob=None if i % 5 else -float(i),
            pieces=None if i % 4 else (1, 0, 4),
        )
        for i in range(count)
    ]


DOCUMENTS = make_documents(200)


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs of a few documents, of which three are merged at once, two documents of each in memory.
    Returns the folder of temporary files."""
    monkeypatch.setattr(shuffle, "MAX_RUN_CHARACTERS", 150)
    monkeypatch.setattr(shuffle, "MAX_RUNS", 3)
    monkeypatch.setattr(shuffle, "BATCH_DOCUMENTS", 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("small_runs")
def test_the_order_is_that_of_any_buffer_that_holds_all() -> None:
    """Every document once and unchanged, in ascending order of its random number; neither the
    order of the source nor the number of files matters."""
    in_files = list(shuffled(DOCUMENTS, None, seed=3))
    assert in_files == sorted(DOCUMENTS, key=lambda d: uniform(3, "order", d.doc_id))
    for size in (len(DOCUMENTS), 10 * len(DOCUMENTS)):
        assert list(shuffled(DOCUMENTS, size, seed=3)) == in_files
    assert list(shuffled(reversed(DOCUMENTS), None, seed=3)) == in_files
    assert list(shuffled(DOCUMENTS, None, seed=4)) != in_files
    assert list(shuffled([], None, seed=3)) == []


def test_documents_of_one_file_are_in_the_same_order() -> None:
    """With the real limits everything fits into one run."""
    expected = list(shuffled(DOCUMENTS, len(DOCUMENTS), seed=3))
    assert list(shuffled(DOCUMENTS, None, seed=3)) == expected


def test_memory_and_files_are_bounded(small_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run exceeds the limit by more than its last document, no merge reads more than three
    files, and the files are gone at the end, also where the reader stops early."""
    merged, written = shuffle._merged, shuffle._write_run
    run_characters: list[int] = []

    def recording_write(path: Path, documents: Iterable[Document]) -> Path:
        if isinstance(documents, list):
            run_characters.append(sum(len(document.text) for document in documents[:-1]))
        return written(path, documents)

    def recording_merge(runs: Sequence[Path], key: shuffle.SortKey) -> Iterator[Document]:
        assert len(runs) <= 3
        assert len(list(runs[0].parent.iterdir())) <= 4
        return merged(runs, key)

    monkeypatch.setattr(shuffle, "_write_run", recording_write)
    monkeypatch.setattr(shuffle, "_merged", recording_merge)
    assert len(list(shuffled(DOCUMENTS, None, seed=1))) == len(DOCUMENTS)
    assert len(run_characters) > 9
    assert max(run_characters) <= 150 + 60
    assert not list(small_runs.iterdir())
    stream = shuffled(DOCUMENTS, None, seed=1)
    next(stream)
    assert list(small_runs.iterdir())
    del stream
    assert not list(small_runs.iterdir())


def test_a_file_is_read_in_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After the first document of a file only one batch of it was read."""
    monkeypatch.setattr(shuffle, "BATCH_DOCUMENTS", 2)
    path = shuffle._write_run(tmp_path / "run", iter(DOCUMENTS))
    batches: list[int] = []
    original = shuffle.pa.ipc.open_stream

    class Reader:
        """The reader of a stream, which records the sizes of the batches that were read."""

        def __init__(self, file: object) -> None:
            self.stream = original(file)

        def __enter__(self) -> Iterator[object]:
            for batch in self.stream:
                batches.append(batch.num_rows)
                yield batch

        def __exit__(self, *_: object) -> None:
            self.stream.close()

    monkeypatch.setattr(shuffle.pa.ipc, "open_stream", Reader)
    documents = shuffle._read_run(path)
    assert next(documents) == DOCUMENTS[0]
    assert batches == [2]
    assert list(documents) == DOCUMENTS[1:]
    assert batches == [2] * (len(DOCUMENTS) // 2)

"""The document store: what is written is read back, and chunks are joined with their latents."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.records import Chunk, Document, Paraphrase, Sample, TeacherLatent, write_shard
from boltlm.sequences import store
from boltlm.sequences.layouts import LatentPair
from boltlm.sequences.store import DocumentStore, TokenizedDocument
from boltlm.tokens import TextCoder

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
DOCUMENTS = st.lists(st.lists(st.tuples(IDS, IDS | st.none()), min_size=1, max_size=4), max_size=6)


PlainDocument = tuple[str, list[tuple[list[int], list[int] | None]]]


def read_back(stored: DocumentStore) -> list[PlainDocument]:
    """All that a store holds, as plain lists."""
    documents = []
    for d in range(len(stored)):
        start, end = stored.chunk_range(d)
        pairs = [stored.pair(chunk) for chunk in range(start, end)]
        assert all(stored.document_of(chunk) == d for chunk in range(start, end))
        concatenated = [token for pair in pairs for token in pair.text]
        assert stored.text(start, end).tolist() == concatenated
        lists = [(list(p.text), None if p.latent is None else list(p.latent)) for p in pairs]
        documents.append((stored.doc_id(d), lists))
    return documents


@given(documents=DOCUMENTS)
def test_what_is_written_is_read_back(
    documents: list[list[tuple[list[int], list[int] | None]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Including empty latents, missing latents, empty texts and ids of any characters."""
    folder = tmp_path_factory.mktemp("store")
    expected = [(f"d{d}é" * (d % 3), pairs) for d, pairs in enumerate(documents)]
    stored = store.write_documents(
        folder,
        [
            TokenizedDocument(doc_id, [LatentPair(*pair) for pair in pairs])
            for doc_id, pairs in expected
        ],
    )
    assert read_back(stored) == expected
    counts = stored.counts()
    assert counts["documents"] == len(documents)
    assert counts["raw_tokens"] == sum(len(x) for pairs in documents for x, _ in pairs)
    assert counts["latent_tokens"] == sum(len(z or ()) for pairs in documents for _, z in pairs)
    num_missing = sum(z is None for pairs in documents for _, z in pairs)
    assert counts["chunks_without_latent"] == num_missing


def as_lists(documents: list[TokenizedDocument]) -> list[PlainDocument]:
    """Documents as plain lists, to compare arrays with lists."""
    return [
        (
            document.doc_id,
            [
                (np.asarray(p.text).tolist(), None if p.latent is None else [*map(int, p.latent)])
                for p in document.pairs
            ],
        )
        for document in documents
    ]


def chunk(doc_id: str, index: int, tokens: tuple[int, ...]) -> Chunk:
    return Chunk(doc_id=doc_id, chunk=index, text="x", tokens=tokens)


def sample(doc_id: str, chunk: int, k: int, tokens: tuple[int, ...], selected: bool) -> Sample:
    return Sample(
        doc_id=doc_id, chunk=chunk, sample=k, latent="", tokens=tokens, finish="stop",
        log_q=-1.0, log_allowed=0.0, log_p_latent=-1.0, log_p_text=-1.0, log_weight=-1.0,
        selected=selected,
    )  # fmt: skip


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """Two shards: the documents a and b, and the document c."""
    folder = tmp_path / "chunks" / "em"
    first = [chunk("a", 0, (1,)), chunk("a", 1, (2, 2)), chunk("b", 0, (3,))]
    write_shard(folder / "00000.parquet", Chunk, first)
    write_shard(folder / "00001.parquet", Chunk, [chunk("c", 0, (4,))])
    return folder


def test_latents_are_the_selected_ones(chunks: Path, tmp_path: Path) -> None:
    """Of K draws only the selected one is trained on. A chunk without a selected draw has no
    latent; one whose latent is empty has a latent of no tokens."""
    folder = tmp_path / "latents" / "em1"
    samples = [sample("a", 0, 0, (1,), False), sample("a", 1, 0, (5,), False)]
    samples += [sample("a", 1, 1, (7, 7), True), sample("elsewhere", 0, 0, (9,), True)]
    write_shard(folder / "00000.parquet", Sample, samples)
    write_shard(folder / "00001.parquet", Sample, [sample("c", 0, 0, (), True)])
    assert as_lists(list(store.read_tokenized(chunks, folder))) == [
        ("a", [([1], None), ([2, 2], [7, 7])]),
        ("b", [([3], None)]),
        ("c", [([4], [])]),
    ]
    without_latents = as_lists(list(store.read_tokenized(chunks, None)))
    assert [z for _, pairs in without_latents for _, z in pairs] == [None] * 4


def test_latents_are_what_the_teacher_wrote(chunks: Path, tmp_path: Path) -> None:
    """A row that holds a reason instead of a latent gives a chunk without a latent."""
    folder = tmp_path / "teacher" / "warmstart"
    written = TeacherLatent(doc_id="a", chunk=0, latent="x", tokens=(5, 6), reason=None)
    dropped = TeacherLatent(doc_id="a", chunk=1, latent=None, tokens=None, reason="too_long")
    write_shard(folder / "00000.parquet", TeacherLatent, [written, dropped])
    last = TeacherLatent(doc_id="c", chunk=0, latent=None, tokens=None, reason="empty")
    write_shard(folder / "00001.parquet", TeacherLatent, [last])
    documents = as_lists(list(store.read_tokenized(chunks, folder)))
    assert documents[0] == ("a", [([1], [5, 6]), ([2, 2], None)])
    assert documents[2] == ("c", [([4], None)])


def test_latents_of_another_kind_or_corpus_are_an_error(chunks: Path, tmp_path: Path) -> None:
    """`data: split/em` with a latent format is a mistake that must not silently train on raw text;
    the same holds for latents of another corpus, or of only a part of this one."""
    document = Document(doc_id="a", text="x", source="tests")
    write_shard(tmp_path / "split" / "em" / "00000.parquet", Document, [document])
    with pytest.raises(UserError, match=r"split/em.*data/latents"):
        list(store.read_tokenized(chunks, tmp_path / "split" / "em"))
    folder = tmp_path / "latents" / "em1"
    with pytest.raises(UserError, match=r"em1/00000.parquet: no such file"):
        list(store.read_tokenized(chunks, folder))
    write_shard(folder / "00000.parquet", Sample, [sample("z", 0, 0, (1,), True)])
    with pytest.raises(UserError, match=r"no latent of .*em1 belongs"):
        list(store.read_tokenized(chunks, folder))


def test_each_paraphrase_is_a_document(base_coder: TextCoder, tmp_path: Path) -> None:
    """WRAP: each paraphrase is a raw text of its own; a dropped one gives no document."""
    rows = [
        Paraphrase(doc_id="a", paraphrase=0, style="cot", text="Dial from 8.", reason=None),
        Paraphrase(doc_id="a", paraphrase=1, style="cot", text=None, reason="refused"),
        Paraphrase(doc_id="b", paraphrase=0, style="cot", text="<|latent|> 7", reason=None),
    ]
    write_shard(tmp_path / "00000.parquet", Paraphrase, rows)
    documents = as_lists(list(store.read_paraphrases(tmp_path, base_coder)))
    assert documents == [
        ("a#0", [(base_coder.encode("Dial from 8."), None)]),
        ("b#0", [(base_coder.encode("<|latent|> 7"), None)]),
    ]
    assert base_coder.special_tokens.sol not in documents[1][1][0][0]
    write_shard(tmp_path / "00000.parquet", Paraphrase, rows[1:2])
    with pytest.raises(UserError, match="no paraphrase"):
        list(store.read_paraphrases(tmp_path, base_coder))


def test_encoding_a_batch_equals_encoding_each_text(base_coder: TextCoder) -> None:
    """Across batches and in order, also for a text that contains a special token's string."""
    texts = [(f"d{i}", f"Page {i}: up by {i}. {'<|prior|>' * (i == 1500)}") for i in range(2100)]
    documents = as_lists(list(store.tokenize_texts(iter(texts), base_coder)))
    assert documents == [(doc_id, [(base_coder.encode(text), None)]) for doc_id, text in texts]

"""Stored documents: what was read comes back, joined with its latents, shard by shard."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.records import Chunk, Document, Paraphrase, Sample, TeacherLatent, write_shard
from boltlm.sequences import store
from boltlm.sequences.layouts import Pair
from boltlm.sequences.store import Store, Text
from boltlm.tokens import TextCoder

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
DOCUMENTS = st.lists(st.lists(st.tuples(IDS, IDS | st.none()), min_size=1, max_size=4), max_size=6)


def back(found: Store) -> list[tuple[str, list[tuple[list[int], list[int] | None]]]]:
    """All that a store holds, as plain lists."""
    made = []
    for d in range(len(found)):
        first, end = found.documents[d : d + 2]
        pairs = [found.pair(chunk) for chunk in range(first, end)]
        assert all(found.document_of(chunk) == d for chunk in range(first, end))
        joined = [token for pair in pairs for token in pair.text]
        assert found.text(first, end).tolist() == joined
        made.append(
            (
                found.name(d),
                [(list(p.text), None if p.latent is None else list(p.latent)) for p in pairs],
            )
        )
    return made


@given(documents=DOCUMENTS)
def test_what_is_written_comes_back(
    documents: list[list[tuple[list[int], list[int] | None]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Empty latents, no latents, empty texts and names of any letters included."""
    folder = tmp_path_factory.mktemp("store")
    named = [(f"d{d}é" * (d % 3), pairs) for d, pairs in enumerate(documents)]
    given_ = [Text(name, [Pair(*pair) for pair in pairs]) for name, pairs in named]
    found = store.write(folder, given_)
    assert back(found) == named
    facts = found.facts()
    assert facts["documents"] == len(documents)
    assert facts["raw_tokens"] == sum(len(t) for pairs in documents for t, _ in pairs)
    assert facts["latent_tokens"] == sum(len(z or ()) for pairs in documents for _, z in pairs)
    bare = sum(z is None for pairs in documents for _, z in pairs)
    assert facts["chunks_without_latent"] == bare


def plain(found: list[Text]) -> list[tuple[str, list[tuple[list[int], list[int] | None]]]]:
    return [
        (
            text.doc_id,
            [
                (np.asarray(p.text).tolist(), None if p.latent is None else [*map(int, p.latent)])
                for p in text.pairs
            ],
        )
        for text in found
    ]


def chunk(doc_id: str, index: int, tokens: tuple[int, ...]) -> Chunk:
    return Chunk(doc_id=doc_id, chunk=index, text="x", tokens=tokens)


def sample(doc_id: str, chunk: int, k: int, tokens: tuple[int, ...], selected: bool) -> Sample:
    return Sample(
        doc_id=doc_id, chunk=chunk, sample=k, latent="", tokens=tokens, finish="stop",
        log_q=-1.0, log_p_latent=-1.0, log_p_text=-1.0, log_weight=-1.0, selected=selected,
    )  # fmt: skip


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """Two shards: documents a and b, and c."""
    folder = tmp_path / "chunks" / "em"
    first = [chunk("a", 0, (1,)), chunk("a", 1, (2, 2)), chunk("b", 0, (3,))]
    write_shard(folder / "00000.parquet", Chunk, first)
    write_shard(folder / "00001.parquet", Chunk, [chunk("c", 0, (4,))])
    return folder


def test_latents_are_the_selected_ones(chunks: Path, tmp_path: Path) -> None:
    """Of K draws only the selected one is trained on; a chunk without one is left bare, one whose
    latent is empty is not."""
    folder = tmp_path / "latents" / "em1"
    drawn = [sample("a", 0, 0, (1,), False), sample("a", 1, 0, (5,), False)]
    drawn += [sample("a", 1, 1, (7, 7), True), sample("elsewhere", 0, 0, (9,), True)]
    write_shard(folder / "00000.parquet", Sample, drawn)
    write_shard(folder / "00001.parquet", Sample, [sample("c", 0, 0, (), True)])
    assert plain(list(store.texts(chunks, folder))) == [
        ("a", [([1], None), ([2, 2], [7, 7])]),
        ("b", [([3], None)]),
        ("c", [([4], [])]),
    ]
    bare = plain(list(store.texts(chunks, None)))
    assert [z for _, pairs in bare for _, z in pairs] == [None] * 4


def test_latents_are_what_the_teacher_wrote(chunks: Path, tmp_path: Path) -> None:
    """Rows with a reason instead of a latent are chunks without one."""
    folder = tmp_path / "teacher" / "warmstart"
    wrote = TeacherLatent(doc_id="a", chunk=0, latent="x", tokens=(5, 6), reason=None)
    silent = TeacherLatent(doc_id="a", chunk=1, latent=None, tokens=None, reason="too_long")
    write_shard(folder / "00000.parquet", TeacherLatent, [wrote, silent])
    last = TeacherLatent(doc_id="c", chunk=0, latent=None, tokens=None, reason="empty")
    write_shard(folder / "00001.parquet", TeacherLatent, [last])
    found = plain(list(store.texts(chunks, folder)))
    assert found[0] == ("a", [([1], [5, 6]), ([2, 2], None)])
    assert found[2] == ("c", [([4], None)])


def test_latents_of_another_kind_or_corpus_are_an_error(chunks: Path, tmp_path: Path) -> None:
    """`data: split/em` beside a latent format is a mistake that must not train raw; nor must
    latents of another corpus, or of a part of this one."""
    page = Document(doc_id="a", text="x", source="tests")
    write_shard(tmp_path / "split" / "em" / "00000.parquet", Document, [page])
    with pytest.raises(UserError, match=r"split/em.*data/latents"):
        list(store.texts(chunks, tmp_path / "split" / "em"))
    folder = tmp_path / "latents" / "em1"
    with pytest.raises(UserError, match=r"em1/00000.parquet: no such file"):
        list(store.texts(chunks, folder))
    write_shard(folder / "00000.parquet", Sample, [sample("z", 0, 0, (1,), True)])
    with pytest.raises(UserError, match=r"no latent of .*em1 belongs"):
        list(store.texts(chunks, folder))


def test_paraphrases_are_documents(base_coder: TextCoder, tmp_path: Path) -> None:
    """WRAP: each paraphrase is raw text of its own; one that failed is no document."""
    rows = [
        Paraphrase(doc_id="a", paraphrase=0, style="cot", text="Dial from 8.", reason=None),
        Paraphrase(doc_id="a", paraphrase=1, style="cot", text=None, reason="refused"),
        Paraphrase(doc_id="b", paraphrase=0, style="cot", text="<|latent|> 7", reason=None),
    ]
    write_shard(tmp_path / "00000.parquet", Paraphrase, rows)
    found = plain(list(store.paraphrases(tmp_path, base_coder)))
    assert found == [
        ("a#0", [(base_coder.encode("Dial from 8."), None)]),
        ("b#0", [(base_coder.encode("<|latent|> 7"), None)]),
    ]
    assert base_coder.markers.sol not in found[1][1][0][0]
    write_shard(tmp_path / "00000.parquet", Paraphrase, rows[1:2])
    with pytest.raises(UserError, match="no paraphrase"):
        list(store.paraphrases(tmp_path, base_coder))


def test_encoding_many_is_encoding_each(base_coder: TextCoder) -> None:
    """Across batches, in order; a text that names a special token among others too."""
    named = [(f"d{i}", f"Page {i}: up by {i}. {'<|prior|>' * (i == 1500)}") for i in range(2100)]
    found = plain(list(store.encoded(iter(named), base_coder)))
    assert found == [(name, [(base_coder.encode(text), None)]) for name, text in named]

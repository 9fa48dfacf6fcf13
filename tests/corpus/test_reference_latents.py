"""Reference latents: each thought belongs to the chunk that contains its sentence."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.corpus.chunks import split_sentences
from boltlm.corpus.reference_latents import (
    NO_LATENT,
    by_sentences,
    chunk_latents,
    reference_latents,
)
from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Document, TeacherLatent, read_table, write_shard
from boltlm.teachers import tables
from boltlm.teachers.config import DatasetTeacherConfig, TeacherSettings
from boltlm.teachers.run import run_teacher
from boltlm.tokens import TextCoder
from tests import tiny

TEXT = "First one. Second here. Third is it. Fourth."
THOUGHTS = ("t1", "t2", "t3", "t4")


def page(
    text: str = TEXT, doc_id: str = "d", latent: str | None = None, thoughts: Any = THOUGHTS
) -> Document:
    return Document(doc_id=doc_id, text=text, source="tests", latent=latent, thoughts=thoughts)


def chunks(text: str, edges: list[int], doc_id: str = "d") -> list[Chunk]:
    """The text cut at the given positions; the token ids are arbitrary."""
    spans = itertools.pairwise([0, *edges, len(text)])
    texts = [text[start:end] for start, end in spans]
    return [Chunk(doc_id=doc_id, chunk=i, text=t, tokens=(1,)) for i, t in enumerate(texts)]


def test_thoughts_go_to_the_chunk_of_their_sentence() -> None:
    """A thought on the wrong chunk would explain a text that it does not belong to."""
    assert chunk_latents(page(), chunks(TEXT, [23])) == ["t1 t2", "t3 t4"]
    assert chunk_latents(page(), chunks(TEXT, [10, 23, 36])) == ["t1", "t2", "t3", "t4"]
    assert chunk_latents(page(), chunks(TEXT, [])) == ["t1 t2 t3 t4"]


def test_a_chunk_that_is_cut_inside_a_sentence_gets_its_thought() -> None:
    """Both parts follow from the thought, and neither from its neighbour's."""
    assert chunk_latents(page(), chunks(TEXT, [15, 23])) == ["t1 t2", "t2", "t3 t4"]
    assert chunk_latents(page(), chunks(TEXT, [3, 6])) == ["t1", "t1", "t1 t2 t3 t4"]


@given(st.sets(st.integers(1, len(TEXT) - 1), max_size=6))
def test_a_chunk_gets_the_thoughts_of_all_it_overlaps(edges: set[int]) -> None:
    """As found character by character, wherever the edges are."""
    text_chunks = chunks(TEXT, sorted(edges))
    sentence_of = [n for n, piece in enumerate(split_sentences(TEXT)) for _ in piece]
    start = 0
    for chunk, latent in zip(text_chunks, chunk_latents(page(), text_chunks), strict=True):
        overlapped = sorted(set(sentence_of[start : start + len(chunk.text)]))
        assert latent == " ".join(THOUGHTS[n] for n in overlapped)
        start += len(chunk.text)


def test_a_thought_that_neighbours_share_appears_once() -> None:
    """Two sentences of one round share its derivation; a thought that recurs later is repeated."""
    thoughts = ("a", "a", "b", "a")
    assert chunk_latents(page(thoughts=thoughts), chunks(TEXT, [])) == ["a b a"]
    assert chunk_latents(page(thoughts=thoughts), chunks(TEXT, [10])) == ["a", "a b a"]


def test_a_missing_thought_is_no_latent_and_an_empty_one_is() -> None:
    """A chunk without a thought is trained without a latent; one that needs none, with an empty
    one."""
    thoughts = (None, None, "t3", "")
    assert chunk_latents(page(thoughts=thoughts), chunks(TEXT, [23])) == [None, "t3"]
    assert chunk_latents(page(thoughts=("", None, "t3", "")), chunks(TEXT, [23])) == ["", "t3"]


PIECES = Document(
    doc_id="d",
    text="One is. Two is. Three is. Four is.",
    source="tests",
    pieces=(15, 6, 0, 13),
    thoughts=("why one and two", "why three", "lost", None),
)


def test_a_piece_gives_its_latent_to_the_sentences_that_start_in_it() -> None:
    """Where a corpus is cut into sentences anew; a piece without text has no sentence."""
    document = by_sentences(PIECES)
    assert document.thoughts == ("why one and two", "why one and two", "why three", None)
    assert (document.pieces, document.text) == (None, PIECES.text)
    assert by_sentences(page()) == page()


def test_a_piece_gives_its_latent_to_its_chunk_alone() -> None:
    """Of a piece that was cut the first part gets it: the latent then precedes all of the text that
    it explains."""
    latents = ["why one and two", "why three", None]
    assert chunk_latents(PIECES, chunks(PIECES.text, [15, 21])) == latents
    cut = chunks(PIECES.text, [7, 15, 21, 26])
    assert chunk_latents(PIECES, cut) == ["why one and two", None, "why three", None, None]


def test_a_documents_latent_goes_to_its_last_chunk() -> None:
    """GSM8K's derivation leads to the answer, which is in the last chunk."""
    document = page(latent="because", thoughts=None)
    assert chunk_latents(document, chunks(TEXT, [10, 23])) == [None, None, "because"]
    assert chunk_latents(document, chunks(TEXT, [])) == ["because"]
    assert chunk_latents(page(latent="", thoughts=None), chunks(TEXT, [10])) == [None, None]


def test_unequal_numbers_of_thoughts_and_sentences_are_an_error() -> None:
    """Pairing them in order would shift every thought after the missing one."""
    with pytest.raises(UserError, match="'d' has 4 sentences but 3 thoughts"):
        chunk_latents(page(thoughts=THOUGHTS[:3]), chunks(TEXT, []))


def test_a_document_without_any_latent_is_an_error() -> None:
    """The teacher `dataset` on a source without latents is a mistake in params.yaml."""
    with pytest.raises(UserError, match=r"'d'.*columns\.latent"):
        chunk_latents(page(thoughts=None), chunks(TEXT, []))


SETTINGS = TeacherSettings(
    name="reference",
    inputs={},
    teacher=DatasetTeacherConfig(kind="dataset", corpus="em"),
    context_chunks=3,
    max_latent_tokens=12,
)


def write_tables(folder: Path, shards: list[list[tuple[Document, list[Chunk]]]]) -> dict[str, Path]:
    """The paths that `run_teacher` takes, with the documents and chunks of each shard."""
    paths = {name: folder / name for name in ("split", "chunks", "out", "cache", "prompts")}
    for index, shard in enumerate(shards):
        name = f"{index:05d}.parquet"
        write_shard(paths["split"] / name, Document, [document for document, _ in shard])
        write_shard(paths["chunks"] / name, Chunk, [chunk for _, group in shard for chunk in group])
    return paths


def test_the_teacher_writes_and_counts_a_row_for_each_chunk(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """In the order of the chunks, each latent tokenised alone; a missing latent has a reason."""
    first = page(doc_id="d0")
    second = page(doc_id="d1", thoughts=None, latent="why it is")
    third = page(doc_id="d2", thoughts=("x" * 40, None, "t3", ""))
    all_edges = ([23], [10, 23], [10, 23])
    groups = [chunks(TEXT, edges, f"d{i}") for i, edges in enumerate(all_edges)]
    shards = [[(first, groups[0]), (second, groups[1])], [(third, groups[2])]]
    paths = write_tables(tmp_path, shards)
    counts = run_teacher(SETTINGS, base_coder, **paths)
    rows = list(read_table(paths["out"], TeacherLatent))
    assert [(row.doc_id, row.chunk, row.latent, row.reason) for row in rows] == [
        ("d0", 0, "t1 t2", None),
        ("d0", 1, "t3 t4", None),
        ("d1", 0, None, NO_LATENT),
        ("d1", 1, None, NO_LATENT),
        ("d1", 2, "why it is", None),
        ("d2", 0, None, tables.TOO_LONG),
        ("d2", 1, None, NO_LATENT),
        ("d2", 2, "t3", None),
    ]
    for row in rows:
        expected = None if row.latent is None else tuple(base_coder.encode(row.latent))
        assert row.tokens == expected
    assert counts == {
        "chunks": 8,
        "latents": 4,
        "latent_tokens": sum(len(row.tokens or ()) for row in rows),
        f"dropped_{NO_LATENT}": 3,
        f"dropped_{tables.TOO_LONG}": 1,
    }
    assert [path.name for path in sorted(paths["out"].iterdir())] == [
        "00000.parquet",
        "00001.parquet",
    ]


def test_a_latent_of_the_maximum_length_is_accepted(base_coder: TextCoder, tmp_path: Path) -> None:
    """`max_latent_tokens` is inclusive, as it is for the sampler."""
    latent = "z" * 12
    assert len(base_coder.encode(latent)) == 12
    document = page(thoughts=None, latent=latent)
    paths = write_tables(tmp_path, [[(document, chunks(TEXT, []))]])
    assert run_teacher(SETTINGS, base_coder, **paths)["latents"] == 1


def test_a_teacher_without_any_latent_is_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """Training on no latents would silently be raw training."""
    document = page(thoughts=(None, None, None, None))
    paths = write_tables(tmp_path, [[(document, chunks(TEXT, [10, 23]))]])
    with pytest.raises(UserError, match=r"teachers\.reference.*3 chunks"):
        run_teacher(SETTINGS, base_coder, **paths)


def test_an_unknown_kind_of_teacher_is_named() -> None:
    """The settings are checked before any shard is read."""
    params = load(tiny.ROOT / "params.yaml")
    params["teachers"]["reference"] = {"kind": "dataset", "corpus": "em"}
    settings = build_settings(TeacherSettings, params, name="reference")
    assert settings.teacher == SETTINGS.teacher
    params["teachers"]["reference"]["kind"] = "oracle"
    with pytest.raises(UserError, match=r"teachers\.reference\.kind.*'oracle'"):
        build_settings(TeacherSettings, params, name="reference")


def test_reference_latents_are_those_of_the_data(tmp_path: Path) -> None:
    """Exact match is measured against them; documents without a latent have none."""
    without = page(doc_id="d1", thoughts=None)
    shard = [(page(doc_id="d0"), chunks(TEXT, [23], "d0")), (without, chunks(TEXT, [9], "d1"))]
    latent = page(doc_id="d2", thoughts=None, latent="because")
    paths = write_tables(tmp_path, [shard, [(latent, chunks(TEXT, [9], "d2"))]])
    assert reference_latents(paths["split"], paths["chunks"]) == {
        ("d0", 0): "t1 t2",
        ("d0", 1): "t3 t4",
        ("d2", 1): "because",
    }

"""Latents that the data carries: each thought on the chunk that holds its sentence."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.latents import tables, teachers
from boltlm.latents.dataset import NO_LATENT, chunk_latents, references
from boltlm.records import Chunk, Document, TeacherLatent, read, write_shard
from boltlm.tokens import TextCoder

TEXT = "First one. Second here. Third is it. Fourth."
THOUGHTS = ("t1", "t2", "t3", "t4")


def page(
    text: str = TEXT, doc_id: str = "d", latent: str | None = None, thoughts: Any = THOUGHTS
) -> Document:
    return Document(doc_id=doc_id, text=text, source="tests", latent=latent, thoughts=thoughts)


def chunks(text: str, edges: list[int], doc_id: str = "d") -> list[Chunk]:
    """The text cut at the given places; tokens play no part here."""
    spans = itertools.pairwise([0, *edges, len(text)])
    texts = [text[start:end] for start, end in spans]
    return [Chunk(doc_id=doc_id, chunk=i, text=t, tokens=(1,)) for i, t in enumerate(texts)]


def test_thoughts_go_to_the_chunk_of_their_sentence() -> None:
    """A thought on the wrong chunk would explain a text that it is not behind."""
    assert chunk_latents(page(), chunks(TEXT, [23])) == ["t1 t2", "t3 t4"]
    assert chunk_latents(page(), chunks(TEXT, [10, 23, 36])) == ["t1", "t2", "t3", "t4"]
    assert chunk_latents(page(), chunks(TEXT, [])) == ["t1 t2 t3 t4"]


def test_a_chunk_cut_inside_a_sentence_gets_that_sentences_thought() -> None:
    """Both halves rest on the thought; neither its neighbour's."""
    assert chunk_latents(page(), chunks(TEXT, [15, 23])) == ["t1 t2", "t2", "t3 t4"]
    assert chunk_latents(page(), chunks(TEXT, [3, 6])) == ["t1", "t1", "t1 t2 t3 t4"]


@given(st.sets(st.integers(1, len(TEXT) - 1), max_size=6))
def test_a_chunk_gets_the_thoughts_of_all_it_overlaps(edges: set[int]) -> None:
    """The same as a character by character reckoning, wherever the edges lie."""
    cut = chunks(TEXT, sorted(edges))
    owner = [n for n, piece in enumerate(sentences(TEXT)) for _ in piece]
    place = 0
    for chunk, latent in zip(cut, chunk_latents(page(), cut), strict=True):
        own = sorted(set(owner[place : place + len(chunk.text)]))
        assert latent == " ".join(THOUGHTS[n] for n in own)
        place += len(chunk.text)


def test_a_thought_shared_by_neighbours_is_said_once() -> None:
    """Two sentences of one round share its derivation; a thought that comes back later is kept."""
    thoughts = ("a", "a", "b", "a")
    assert chunk_latents(page(thoughts=thoughts), chunks(TEXT, [])) == ["a b a"]
    assert chunk_latents(page(thoughts=thoughts), chunks(TEXT, [10])) == ["a", "a b a"]


def test_an_empty_thought_is_no_latent() -> None:
    """A chunk without a thought is trained bare, not with an empty latent."""
    assert chunk_latents(page(thoughts=("", "", "t3", "")), chunks(TEXT, [23])) == [None, "t3"]


def test_a_documents_latent_goes_to_its_last_chunk() -> None:
    """GSM8K's derivation concludes in the answer, which the last chunk holds."""
    given_one = page(latent="because", thoughts=None)
    assert chunk_latents(given_one, chunks(TEXT, [10, 23])) == [None, None, "because"]
    assert chunk_latents(given_one, chunks(TEXT, [])) == ["because"]
    assert chunk_latents(page(latent="", thoughts=None), chunks(TEXT, [10])) == [None, None]


def test_thoughts_that_do_not_fit_the_sentences_are_an_error() -> None:
    """Pairing them anyhow would shift every thought behind the gap."""
    with pytest.raises(UserError, match="'d' has 4 sentences but 3 thoughts"):
        chunk_latents(page(thoughts=THOUGHTS[:3]), chunks(TEXT, []))


def test_a_document_without_any_latent_is_an_error() -> None:
    """Teacher `dataset` on a source that carries none is a mistake in params.yaml."""
    with pytest.raises(UserError, match=r"'d'.*columns\.latent"):
        chunk_latents(page(thoughts=None), chunks(TEXT, []))


PARAMS: dict[str, Any] = {
    "teachers": {"own": {"kind": "dataset", "corpus": "em"}},
    "max_latent_tokens": 12,
}


def written(folder: Path, shards: list[list[tuple[Document, list[Chunk]]]]) -> dict[str, Path]:
    paths = {name: folder / name for name in ("split", "chunks", "out", "journal")}
    for index, shard in enumerate(shards):
        name = f"{index:05d}.parquet"
        write_shard(paths["split"] / name, Document, [document for document, _ in shard])
        write_shard(paths["chunks"] / name, Chunk, [c for _, cut in shard for c in cut])
    return paths


def test_the_teacher_writes_a_row_a_chunk_and_counts(base_coder: TextCoder, tmp_path: Path) -> None:
    """Chunk by chunk and shard by shard, with ids encoded alone; what is missing has a reason."""
    first = page(doc_id="d0")
    second = page(doc_id="d1", thoughts=None, latent="why it is")
    third = page(doc_id="d2", thoughts=("x" * 40, "", "t3", ""))
    cut = [chunks(TEXT, edges, f"d{i}") for i, edges in enumerate(([23], [10, 23], [10, 23]))]
    paths = written(tmp_path, [[(first, cut[0]), (second, cut[1])], [(third, cut[2])]])
    counts = teachers.write(PARAMS, "own", base_coder, **paths)
    rows = list(read(paths["out"], TeacherLatent))
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
        wanted = None if row.latent is None else tuple(base_coder.encode(row.latent))
        assert row.tokens == wanted
    assert counts == {
        "chunks": 8,
        "latents": 4,
        "latent_tokens": sum(len(row.tokens or ()) for row in rows),
        f"without_{NO_LATENT}": 3,
        f"without_{tables.TOO_LONG}": 1,
    }
    assert [path.name for path in sorted(paths["out"].iterdir())] == [
        "00000.parquet",
        "00001.parquet",
    ]


def test_the_longest_latent_that_fits_is_kept(base_coder: TextCoder, tmp_path: Path) -> None:
    """`max_latent_tokens` is a most, as it is for the sampler."""
    latent = "z" * 12
    assert len(base_coder.encode(latent)) == 12
    found = page(thoughts=None, latent=latent)
    paths = written(tmp_path, [[(found, chunks(TEXT, []))]])
    assert teachers.write(PARAMS, "own", base_coder, **paths)["latents"] == 1


def test_a_teacher_without_a_single_latent_is_an_error(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """Training on latents of which there are none would quietly be raw training."""
    found = page(thoughts=("", "", "", ""))
    paths = written(tmp_path, [[(found, chunks(TEXT, [10, 23]))]])
    with pytest.raises(UserError, match=r"teachers\.own.*3 chunks"):
        teachers.write(PARAMS, "own", base_coder, **paths)


def test_an_unknown_kind_of_teacher_is_named(base_coder: TextCoder, tmp_path: Path) -> None:
    """The section is checked before any shard is read."""
    params = {**PARAMS, "teachers": {"own": {"kind": "oracle", "corpus": "em"}}}
    paths = {name: tmp_path / name for name in ("split", "chunks", "out", "journal")}
    with pytest.raises(UserError, match=r"teachers\.own\.kind.*'oracle'"):
        teachers.write(params, "own", base_coder, **paths)


def test_references_are_what_the_data_carries(tmp_path: Path) -> None:
    """Exact shares are measured against these; documents without a latent have none."""
    silent = page(doc_id="d1", thoughts=None)
    shard = [(page(doc_id="d0"), chunks(TEXT, [23], "d0")), (silent, chunks(TEXT, [9], "d1"))]
    latent = page(doc_id="d2", thoughts=None, latent="because")
    paths = written(tmp_path, [shard, [(latent, chunks(TEXT, [9], "d2"))]])
    assert references(paths["split"], paths["chunks"]) == {
        ("d0", 0): "t1 t2",
        ("d0", 1): "t3 t4",
        ("d2", 1): "because",
    }

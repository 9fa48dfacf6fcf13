"""Named corpora: runs of a source that never overlap, in shards, with everything accounted for."""

import json
from pathlib import Path
from typing import Any

import pytest

from boltlm.corpus import sources
from boltlm.corpus.chunks import Chunker, Chunking
from boltlm.corpus.split import documents, questions, split
from boltlm.errors import UserError
from boltlm.params import load
from boltlm.records import Chunk, Document, Question, read, read_shard, shards
from boltlm.tokens import TextCoder
from tests import tiny

LENGTHS = Chunking(mean_sentences=1.5, least_sentences=1, most_sentences=2)


def params_of(path: Path, texts: list[str], corpora: dict[str, int]) -> dict[str, Any]:
    """Params for a JSONL source of `texts`, whose ids are their places."""
    rows = [{"text": text, "id": str(index)} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "seed": 1,
        "corpus": {
            "kind": "files",
            "path": str(path),
            "columns": {"text": "text", "doc_id": "id", "latent": None, "pieces": None},
            "shuffle_buffer": 0,
        },
        "corpora": {name: {"documents": n, "source": {}} for name, n in corpora.items()},
        "questions": {"count": 0, "source": {}},
        "split": {"shard_documents": 3, "overlap_words": 13, "drop_contaminated": False},
        "evaluate": {"corpus": "heldout", "beside": []},
        "benchmarks": {},
    }


def ids(params: dict[str, Any], name: str) -> list[str]:
    return [document.doc_id for document in documents(params, name)]


def run(params: dict[str, Any], coder: TextCoder, folder: Path) -> dict[str, int | float]:
    chunker = Chunker(LENGTHS, coder, 100, seed=1)
    return split(params, chunker, folder / "split", folder / "chunks")


def test_corpora_of_one_source_take_consecutive_runs(tmp_path: Path) -> None:
    """Held-out text must not have been trained on: no document is in two corpora."""
    params = params_of(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 5, "three": 2})
    assert ids(params, "one") == ["0", "1", "2"]
    assert ids(params, "two") == ["3", "4", "5", "6", "7"]
    assert ids(params, "three") == ["8", "9"]


def test_another_source_starts_at_its_beginning(tmp_path: Path) -> None:
    """Only corpora of the same source push each other on, the ones in between or not."""
    params = params_of(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 5, "three": 2})
    params["corpora"]["two"]["source"] = {"shuffle_buffer": 100}
    alone = {**params, "corpora": {"two": params["corpora"]["two"]}}
    assert ids(params, "two") == ids(alone, "two")
    assert ids(params, "three") == ["3", "4"]


def test_a_source_is_read_once_for_all_its_corpora(
    base_coder: TextCoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passing over the first two million documents of a hub data set is downloading them."""
    params = params_of(tmp_path / "a.jsonl", ["Yes."] * 9, {"base": 4, "one": 2, "two": 3})
    opened: list[Any] = []
    real = sources.documents
    monkeypatch.setattr(
        sources, "documents", lambda source, seed: opened.append(source) or real(source, seed)
    )
    run(params, base_coder, tmp_path)
    assert len(opened) == 1
    assert [d.doc_id for d in read(tmp_path / "split" / "one", Document)] == ["4", "5"]
    assert [d.doc_id for d in read(tmp_path / "split" / "two", Document)] == ["6", "7", "8"]


def test_generated_corpora_of_the_laptop_run_are_disjoint() -> None:
    """The same promise for params.yaml as it stands."""
    params = load(tiny.ROOT / "params.yaml")
    for entry in params["corpora"].values():
        entry["documents"] = 20
    found = [ids(params, name) for name in params["corpora"]]
    assert len({doc_id for run in found for doc_id in run}) == sum(map(len, found)) >= 60


def test_too_few_documents_name_the_corpus(tmp_path: Path) -> None:
    """A corpus smaller than asked for would change the experiment without a word."""
    params = params_of(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 8})
    with pytest.raises(UserError, match=r"corpora\.two.*holds 10 .*8 after the 3"):
        ids(params, "two")
    assert len(ids(params, "one")) == 3


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    """An empty file is a mistake in the path, not a corpus."""
    params = params_of(tmp_path / "a.jsonl", [], {"one": 1})
    with pytest.raises(UserError, match=r"'files'.*holds no document"):
        ids(params, "one")


def test_an_unknown_corpus_is_named(tmp_path: Path) -> None:
    """A stage asks for the corpus that dvc.yaml names."""
    params = params_of(tmp_path / "a.jsonl", ["x."], {"one": 1})
    with pytest.raises(UserError, match=r"corpora\.two"):
        ids(params, "two")


def test_split_writes_every_document_once(base_coder: TextCoder, tmp_path: Path) -> None:
    """Documents and chunks of a shard belong together, and all of them are counted."""
    texts = [f"Page {n}. It ends.\n\nHere \u2028 {n}." for n in range(8)]
    params = params_of(tmp_path / "a.jsonl", texts, {"one": 5, "two": 3})
    counts = run(params, base_coder, tmp_path)
    for name, wanted in (("one", texts[:5]), ("two", texts[5:])):
        found = list(read(tmp_path / "split" / name, Document))
        chunks = list(read(tmp_path / "chunks" / name, Chunk))
        assert [document.text for document in found] == wanted
        for document in found:
            own = [chunk for chunk in chunks if chunk.doc_id == document.doc_id]
            assert "".join(chunk.text for chunk in own) == document.text
        assert counts[f"{name}/documents"] == len(wanted)
        assert counts[f"{name}/chunks"] == len(chunks)
        assert counts[f"{name}/tokens"] == sum(len(chunk.tokens) for chunk in chunks)
        for path in shards(tmp_path / "chunks" / name):
            own = {d.doc_id for d in read_shard(tmp_path / "split" / name / path.name, Document)}
            assert {chunk.doc_id for chunk in read_shard(path, Chunk)} == own
            assert len(own) <= 3


def test_what_is_left_out_is_counted(base_coder: TextCoder, tmp_path: Path) -> None:
    """House habit 7: an empty page has nothing to train on, and its loss has a number. A blank
    page is text."""
    params = params_of(tmp_path / "a.jsonl", ["One.", "", " \n ", "Two.", ""], {"one": 5})
    counts = run(params, base_coder, tmp_path)
    kept = [document.text for document in read(tmp_path / "split" / "one", Document)]
    assert kept == ["One.", " \n ", "Two."]
    assert counts["one/left_out_empty"] == 2


def test_text_outside_unicode_is_left_out_and_counted(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """Half a surrogate pair, which JSON can hold, cannot be encoded; one such page among
    millions must not end the stage."""
    params = params_of(tmp_path / "a.jsonl", ["One.", "bad \ud800 page", "Two."], {"one": 3})
    counts = run(params, base_coder, tmp_path)
    assert counts["one/left_out_not_reversible"] == 1
    assert counts["one/documents"] == 2


def test_a_corpus_of_nothing_is_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """Training on no document would only fail much later."""
    params = params_of(tmp_path / "a.jsonl", ["", ""], {"one": 2})
    with pytest.raises(UserError, match=r"corpora\.one"):
        run(params, base_coder, tmp_path)


def test_two_documents_of_one_id_are_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """Later stages join by (doc_id, chunk): two documents of one id would silently become one."""
    params = params_of(tmp_path / "a.jsonl", ["One.", "Two.", "Three."], {"one": 3})
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text("utf-8").replace('"id": "2"', '"id": "0"'), encoding="utf-8")
    with pytest.raises(UserError, match="'0'"):
        run(params, base_coder, tmp_path)


def test_questions_are_as_many_as_asked(base_coder: TextCoder, tmp_path: Path) -> None:
    """None is allowed, for sources without questions; the table is there all the same."""
    params = load(tiny.ROOT / "params.yaml")
    params["questions"]["count"] = 7
    assert len({question.question_id for question in questions(params)}) == 7
    none = params_of(tmp_path / "a.jsonl", ["One."], {"one": 1})
    assert questions(none) == []
    assert run(none, base_coder, tmp_path)["questions"] == 0
    assert list(read(tmp_path / "split" / "questions", Question)) == []

"""Named corpora: disjoint ranges of a source, written in shards, every document accounted for."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from boltlm.corpus import sources
from boltlm.corpus.chunker import Chunker
from boltlm.corpus.chunks import ChunkingConfig
from boltlm.corpus.corpora import corpus_documents
from boltlm.corpus.reference_latents import reference_latents
from boltlm.corpus.sources import CorpusSource
from boltlm.corpus.split import (
    SplitSettings,
    heldout_questions,
    split_corpora,
    stream_corpora,
)
from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Document, Question, read_shard, read_table, shard_paths
from boltlm.tokens import TextCoder
from tests import tiny

LENGTHS = ChunkingConfig(mean_sentences=1.5, min_sentences=1, max_sentences=2, from_source=())


def split_params(path: Path, texts: list[str], corpora: dict[str, int]) -> dict[str, Any]:
    """Params with a JSONL source of `texts`, whose ids are their indices, for `corpora`; the corpus
    `heldout` has a source of its own."""
    rows = [{"text": text, "id": str(index)} for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    heldout_path = path.with_name(f"heldout-{path.name}")
    heldout_path.write_text('{"text": "Held out.", "id": "h"}\n', encoding="utf-8")
    entries = {name: {"documents": n, "source": {}} for name, n in corpora.items()}
    heldout = {"documents": 1, "source": {"path": str(heldout_path)}}
    return {
        "data_seed": 1,
        "inputs": {"texts": str(path.parent)},
        "corpus": {
            "kind": "files",
            "path": str(path),
            "columns": {
                "text": "text",
                "doc_id": "id",
                "cluster": None,
                "latent": None,
                "pieces": None,
            },
            "shuffle_buffer": 0,
        },
        "corpora": {**entries, "heldout": heldout},
        "questions": {"count": 0, "source": {}},
        "split": {"shard_documents": 3, "workers": 1, "ngram_size": 13, "drop_contaminated": False},
        "chunks": {
            "mean_sentences": 1.5,
            "min_sentences": 1,
            "max_sentences": 2,
            "from_source": [],
        },
        "max_latent_tokens": 22,
        "evaluate": {"corpus": "heldout", "extra_corpora": []},
        "benchmarks": {},
    }


def settings(params: dict[str, Any]) -> SplitSettings:
    return build_settings(SplitSettings, params)


def ids(params: dict[str, Any], name: str) -> list[str]:
    """The ids of the documents of one corpus."""
    for _, documents in stream_corpora(settings(params), [name]):
        return [document.doc_id for document in documents]
    raise AssertionError(name)


def split_into(
    folder: Path, params: dict[str, Any], coder: TextCoder, lengths: ChunkingConfig = LENGTHS
) -> dict[str, int | float]:
    chunker = Chunker(lengths, coder, 100, seed=1)
    return split_corpora(
        settings(params),
        chunker,
        work=folder / "work",
        split_dir=folder / "split",
        chunks_dir=folder / "chunks",
    )


def test_corpora_of_one_source_take_consecutive_documents(tmp_path: Path) -> None:
    """Held-out text must not have been trained on: no document is in two corpora."""
    params = split_params(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 5, "three": 2})
    assert ids(params, "one") == ["0", "1", "2"]
    assert ids(params, "two") == ["3", "4", "5", "6", "7"]
    assert ids(params, "three") == ["8", "9"]


def test_several_corpora_are_streamed_in_one_pass(tmp_path: Path) -> None:
    """Documents that a caller does not read are skipped and do not move into the next corpus."""
    params = split_params(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 5, "three": 2})
    first = {
        name: next(documents).doc_id
        for name, documents in stream_corpora(settings(params), ["one", "three"])
    }
    assert first == {"one": "0", "three": "8"}


def test_another_source_starts_at_its_first_document(tmp_path: Path) -> None:
    """Only the corpora of the same source determine which documents a corpus takes."""
    params = split_params(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 5, "three": 2})
    params["corpora"]["two"]["source"] = {"shuffle_buffer": 100}
    corpora = {name: params["corpora"][name] for name in ("two", "heldout")}
    assert ids(params, "two") == ids({**params, "corpora": corpora}, "two")
    assert ids(params, "three") == ["3", "4"]


def test_the_base_corpus_is_the_first_of_its_source(tmp_path: Path) -> None:
    """The stage `base` reads the first documents of the source and knows no other corpus, so
    another corpus before it would be given the same documents."""
    params = split_params(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "base": 5})
    with pytest.raises(UserError, match=r"corpora\.base must come before corpora\.one"):
        settings(params)
    params["corpora"]["one"]["source"] = {"shuffle_buffer": 100}
    base = settings(params).corpora["base"]
    documents = list(corpus_documents(base, 1, "base"))
    assert [document.doc_id for document in documents] == ["0", "1", "2", "3", "4"]
    assert ids(params, "base") == ["0", "1", "2", "3", "4"]


def test_a_source_is_read_once_for_all_its_corpora(
    base_coder: TextCoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipping the first two million documents of a hub data set means downloading them."""
    corpora = {"base": 4, "one": 2, "two": 3}
    params = split_params(tmp_path / "a.jsonl", ["Yes."] * 9, corpora)
    opened: list[CorpusSource] = []
    original = sources.read_documents

    def read_documents(config: CorpusSource, seed: int) -> Iterator[Document]:
        opened.append(config)
        return original(config, seed)

    monkeypatch.setattr(sources, "read_documents", read_documents)
    split_into(tmp_path, params, base_coder)
    assert opened.count(settings(params).corpora["base"].source) == 1
    assert len(opened) == 2  # the held-out source too, although it is also an evaluation set
    assert [d.doc_id for d in read_table(tmp_path / "split" / "one", Document)] == ["4", "5"]
    assert [d.doc_id for d in read_table(tmp_path / "split" / "two", Document)] == ["6", "7", "8"]
    assert not (tmp_path / "split" / "base").exists()


def test_generated_corpora_of_the_laptop_run_are_disjoint() -> None:
    """The same guarantee for params.yaml as it is."""
    params = load(tiny.ROOT / "params.yaml")
    for entry in params["corpora"].values():
        entry["documents"] = 20
    corpora = [ids(params, name) for name in params["corpora"]]
    distinct = {doc_id for corpus_ids in corpora for doc_id in corpus_ids}
    assert len(distinct) == sum(map(len, corpora)) >= 60


def test_too_few_documents_name_the_corpus(tmp_path: Path) -> None:
    """A corpus that is smaller than configured would silently change the experiment."""
    params = split_params(tmp_path / "a.jsonl", ["x."] * 10, {"one": 3, "two": 8})
    with pytest.raises(UserError, match=r"corpora\.two.*has 10 .*8 after the 3"):
        ids(params, "two")
    assert len(ids(params, "one")) == 3
    entry = settings(params).corpora["two"]
    params["corpora"]["two"]["documents"] = 11
    assert len(list(corpus_documents(entry, 1, "two"))) == 8
    with pytest.raises(UserError, match=r"corpora\.two.*has 10 .*11 after the 0"):
        list(corpus_documents(settings(params).corpora["two"], 1, "two"))


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    """An empty file is a mistake in the path, not a corpus."""
    params = split_params(tmp_path / "a.jsonl", [], {"one": 1})
    with pytest.raises(UserError, match=r"'files'.*has no document"):
        ids(params, "one")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("evaluate", "corpus", "two", r"evaluate\.corpus must name an entry of corpora.*'two'"),
        ("evaluate", "extra_corpora", ["two"], r"evaluate\.extra_corpora.*entry of corpora.*'two'"),
        ("split", "shard_documents", 0, r"split\.shard_documents must be 1 or more"),
        ("split", "ngram_size", 0, r"split\.ngram_size must be 1 or more"),
        ("split", "ngram_size", -1, r"split\.ngram_size must be 1 or more"),
        ("questions", "count", -1, r"questions\.count must be 0 or more"),
        ("corpora", "one", {"documents": 0, "source": {}}, r"corpora\.one\.documents must be 1"),
        ("corpora", "one", {"documents": 1}, r"missing key corpora\.one\.source"),
        ("chunks", "max_sentences", 0, r"chunks\.max_sentences must be 1 or more"),
        ("chunks", "from_source", ["two"], r"chunks\.from_source.*\(one, heldout\), found 'two'"),
        ("chunks", "from_source", ["one"], r"chunks\.from_source.*'one'.*columns\.pieces"),
        ("benchmarks", "mmlu", "a/b", r"benchmarks must be gsm8k \| math \| mmlu_stem.*'mmlu'"),
        ("benchmarks", "math", None, r"benchmarks\.math must be of type str"),
    ],
)
def test_wrong_settings_name_their_key(
    tmp_path: Path, section: str, key: str, value: Any, message: str
) -> None:
    """Before any source is read."""
    params = split_params(tmp_path / "a.jsonl", ["x."], {"one": 1})
    params[section][key] = value
    with pytest.raises(UserError, match=message):
        settings(params)


@pytest.mark.parametrize("value", [None, ["math"]])
def test_benchmarks_must_be_a_mapping(tmp_path: Path, value: Any) -> None:
    """A list of names does not say where the benchmarks are."""
    params = split_params(tmp_path / "a.jsonl", ["x."], {"one": 1})
    with pytest.raises(UserError, match="benchmarks must be of type Mapping"):
        settings({**params, "benchmarks": value})


def test_split_writes_every_document_once(base_coder: TextCoder, tmp_path: Path) -> None:
    """The documents and chunks of a shard belong together, and all of them are counted."""
    texts = [f"Page {n}. It ends.\n\nHere \u2028 {n}." for n in range(8)]
    params = split_params(tmp_path / "a.jsonl", texts, {"one": 5, "two": 3})
    counts = split_into(tmp_path, params, base_coder)
    for name, expected in (("one", texts[:5]), ("two", texts[5:])):
        documents = list(read_table(tmp_path / "split" / name, Document))
        chunks = list(read_table(tmp_path / "chunks" / name, Chunk))
        assert [document.text for document in documents] == expected
        for document in documents:
            document_chunks = [chunk for chunk in chunks if chunk.doc_id == document.doc_id]
            assert "".join(chunk.text for chunk in document_chunks) == document.text
        assert counts[f"{name}/documents"] == len(expected)
        assert counts[f"{name}/chunks"] == len(chunks)
        assert counts[f"{name}/tokens"] == sum(len(chunk.tokens) for chunk in chunks)
        for path in shard_paths(tmp_path / "chunks" / name):
            shard = read_shard(tmp_path / "split" / name / path.name, Document)
            shard_ids = {document.doc_id for document in shard}
            assert {chunk.doc_id for chunk in read_shard(path, Chunk)} == shard_ids
            assert len(shard_ids) <= 3


PIECES = [
    [("One is. Two", "z1"), (" is", "z2"), (". Three is.", ""), ("", "lost"), (" ", "z5")],
    [("\nAnother", None), (". It ends. Here.", "z7")],
]


def test_the_pieces_of_a_source_are_the_chunks_of_its_corpora(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """In the corpora of chunks.from_source, each with its own latent; another corpus of the same
    rows is cut anew, and its table has no column for pieces."""
    texts = ["".join(text for text, _ in pieces) for pieces in PIECES]
    params = split_params(tmp_path / "a.jsonl", texts, {"one": 2, "two": 2})
    rows = [
        {"text": text, "id": str(n), "chunks": [dict(zip("xz", pair, strict=True)) for pair in row]}
        for n, (text, row) in enumerate(zip(texts, PIECES, strict=True))
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = params["corpus"]["columns"]
    params["corpora"]["heldout"]["source"]["columns"] = {**columns, "pieces": None}
    columns["pieces"] = {"column": "chunks", "text": "x", "latent": "z"}
    params["corpora"]["two"]["source"] = {"shuffle_buffer": None}
    params["chunks"]["from_source"] = ["one"]
    lengths = replace(LENGTHS, from_source=("one",))
    counts = split_into(tmp_path, params, base_coder, lengths)
    documents = list(read_table(tmp_path / "split" / "one", Document))
    assert [document.text for document in documents] == texts
    chunks = list(read_table(tmp_path / "chunks" / "one", Chunk))
    assert [c.text for c in chunks] == [text for row in PIECES for text, _ in row if text]
    assert counts["one/dropped_empty_pieces"] == 1
    latents = reference_latents(tmp_path / "split" / "one", tmp_path / "chunks" / "one")
    assert [latents.get((c.doc_id, c.chunk)) for c in chunks] == [
        "z1",
        "z2",
        None,
        "z5",
        None,
        "z7",
    ]
    others = list(read_table(tmp_path / "split" / "two", Document))
    assert {document.doc_id: document.pieces for document in others} == {"0": None, "1": None}
    thoughts = {document.doc_id: document.thoughts for document in others}
    assert thoughts == {"0": ("z1", "z1", None), "1": (None, "z7", "z7")}
    (shard,) = shard_paths(tmp_path / "split" / "two")
    assert "pieces" not in pq.read_schema(shard).names


def test_dropped_documents_are_counted(base_coder: TextCoder, tmp_path: Path) -> None:
    """An empty page has nothing to train on, and a count reports its loss. A page of white space is
    text."""
    texts = ["One.", "", " \n ", "Two.", ""]
    params = split_params(tmp_path / "a.jsonl", texts, {"one": 5})
    counts = split_into(tmp_path, params, base_coder)
    retained = [document.text for document in read_table(tmp_path / "split" / "one", Document)]
    assert retained == ["One.", " \n ", "Two."]
    assert counts["one/dropped_empty"] == 2


def test_text_that_utf8_cannot_encode_is_dropped_and_counted(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """JSON can hold an unpaired surrogate; one such page among millions must not stop the stage."""
    texts = ["One.", "bad \ud800 page", "Two."]
    params = split_params(tmp_path / "a.jsonl", texts, {"one": 3})
    counts = split_into(tmp_path, params, base_coder)
    assert counts["one/dropped_not_reversible"] == 1
    assert counts["one/documents"] == 2


def test_a_corpus_without_documents_is_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """Training on no document would fail much later."""
    params = split_params(tmp_path / "a.jsonl", ["", ""], {"one": 2})
    with pytest.raises(UserError, match=r"corpora\.one: every document was dropped"):
        split_into(tmp_path, params, base_coder)


def test_two_documents_with_one_id_are_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """Later stages join by (doc_id, chunk) and would silently merge the two documents."""
    params = split_params(tmp_path / "a.jsonl", ["One.", "Two.", "Three."], {"one": 3})
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text("utf-8").replace('"id": "2"', '"id": "0"'), encoding="utf-8")
    with pytest.raises(UserError, match="'0'"):
        split_into(tmp_path, params, base_coder)


def test_there_are_as_many_questions_as_configured(base_coder: TextCoder, tmp_path: Path) -> None:
    """0 is allowed, for sources without questions; the table exists in any case."""
    params = load(tiny.ROOT / "params.yaml")
    params["questions"]["count"] = 7
    assert len({question.question_id for question in heldout_questions(settings(params))}) == 7
    without = split_params(tmp_path / "a.jsonl", ["One."], {"one": 1})
    assert heldout_questions(settings(without)) == []
    assert split_into(tmp_path, without, base_coder)["questions"] == 0
    assert list(read_table(tmp_path / "split" / "questions", Question)) == []


Expected = tuple[dict[str, bytes], dict[str, int | float]]


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file in the outputs of a run."""
    outputs = [folder / "split", folder / "chunks"]
    files = (path for output in outputs for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def many_params(folder: Path, count: int = 14) -> dict[str, Any]:
    """Two corpora of a shuffled source, in shards of one document, some of which share an n-gram
    with the held-out document and are dropped."""
    folder.mkdir(exist_ok=True)
    texts = [f"Page {n}. It has {'many ' * (n % 7)}words.\nHeld out {n}." for n in range(count)]
    texts[3] = texts[8] = "It is held out."
    params = split_params(folder / "a.jsonl", texts, {"one": count // 2, "two": count // 2})
    params["corpora"]["heldout"]["source"]["shuffle_buffer"] = 0
    params["corpus"]["shuffle_buffer"] = None
    params["split"] |= {"shard_documents": 1, "ngram_size": 2, "drop_contaminated": True}
    for key in ("one", "two"):  # a shard that becomes empty stays, so that the names correspond
        params["corpora"][key]["documents"] -= 1
    (folder / "heldout-a.jsonl").write_text('{"text": "is held.", "id": "h"}\n', encoding="utf-8")
    return params


@pytest.fixture(scope="module")
def expected(base_coder: TextCoder, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """The outputs and the counts of a single process that is not interrupted."""
    folder = tmp_path_factory.mktemp("expected")
    counts = split_into(folder, many_params(folder), base_coder)
    assert 0 < counts["one/dropped_contaminated"] + counts["two/dropped_contaminated"] <= 2
    return tree(folder), counts


def test_the_number_of_workers_changes_no_byte(
    base_coder: TextCoder, tmp_path: Path, expected: Expected
) -> None:
    """Nor does it change a count. Two workers are in the next test."""
    params = many_params(tmp_path)
    params["split"]["workers"] = 3
    counts = split_into(tmp_path, params, base_coder)
    assert (tree(tmp_path), counts) == expected


def test_a_stage_that_is_killed_again_and_again_ends_in_the_same_bytes(
    base_folder: Path, tmp_path: Path, expected: Expected
) -> None:
    """SIGKILL of the stage and its workers at random moments; what is saved is not made again,
    also by another number of workers."""
    laptop, rng = tiny.without_entries(load(tiny.ROOT / "params.yaml")), np.random.default_rng(1)
    params = laptop | many_params(tmp_path)
    params["evaluate"] = laptop["evaluate"] | params["evaluate"]
    params["base"] = {"kind": "checkpoint", "model": str(base_folder)}
    params["inputs"] = {"texts": str(tmp_path), "model": str(base_folder)}
    (tmp_path / "base.jsonl").write_text('{"text": "Not used.", "id": "b"}\n', encoding="utf-8")
    base = {"documents": 1, "source": {"path": str(tmp_path / "base.jsonl")}}
    params["corpora"] = {"base": base, **params["corpora"]}
    names = {"work": "work", "split": "split", "chunks": "chunks", "metrics": "split.json"}
    flags = [part for flag, name in names.items() for part in (f"--{flag}", str(tmp_path / name))]
    script = str(tiny.ROOT / "stages" / "split.py")
    params_path = tmp_path / "params.yaml"
    command = [sys.executable, script, "--params", str(params_path), "--base", str(base_folder)]
    for workers in (1, 2, 1):
        params["split"]["workers"] = workers
        params_path.write_text(yaml.safe_dump(params), encoding="utf-8")
        process = subprocess.Popen(
            [*command, *flags], start_new_session=True, stderr=subprocess.DEVNULL
        )
        target = len(saved_files(tmp_path)) + int(rng.integers(1, 12))
        while process.poll() is None and len(saved_files(tmp_path)) < target:
            time.sleep(0.001)
        before = saved_files(tmp_path)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after = saved_files(tmp_path)
        assert before.items() <= after.items()
    assert after
    subprocess.run([*command, *flags], check=True, stderr=subprocess.DEVNULL)
    assert after.items() <= saved_files(tmp_path).items()
    assert tree(tmp_path) == expected[0]
    assert json.loads((tmp_path / "split.json").read_text("utf-8")) == expected[1]


def saved_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The results in the work folder, each of which is written when its shard is finished, and what
    changes when one is made again."""
    stats: dict[str, tuple[int, int]] = {}
    for path in folder.glob("work/**/*.json.sha256"):
        stat = path.with_name(path.name.removesuffix(".sha256")).stat()
        stats[str(path.relative_to(folder))] = (stat.st_ino, stat.st_mtime_ns)
    return stats


def test_a_corpus_that_changes_is_the_only_one_that_is_made_again(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """And of that corpus only the shards that change; a larger corpus moves the one after it."""
    texts = [f"Page {n}. It ends." for n in range(20)]
    params = split_params(tmp_path / "a.jsonl", texts, {"one": 6, "two": 6})
    split_into(tmp_path, params, base_coder)
    work, outputs = saved_files(tmp_path), tree(tmp_path)
    params = split_params(tmp_path / "a.jsonl", [*texts[:7], "Changed."], {"one": 6, "two": 2})
    split_into(tmp_path, params, base_coder)
    assert work.items() <= saved_files(tmp_path).items()
    made = {path.split("/")[3] for path in saved_files(tmp_path).keys() - work.keys()}
    assert len(made) == 1  # the folder of the shard with two documents
    changed = {name for name, content in outputs.items() if tree(tmp_path).get(name) != content}
    assert {name.split("/")[1] for name in changed} == {"two"}


def test_shards_that_are_damaged_are_made_again(
    base_coder: TextCoder, tmp_path: Path, expected: Expected
) -> None:
    """A full disk leaves files that look finished."""
    params = many_params(tmp_path)
    split_into(tmp_path, params, base_coder)
    for path in sorted(path for path in tmp_path.glob("work/**/*.*") if path.is_file())[::5]:
        path.write_bytes(path.read_bytes()[:-1])
    assert split_into(tmp_path, params, base_coder) == expected[1]
    assert tree(tmp_path) == expected[0]

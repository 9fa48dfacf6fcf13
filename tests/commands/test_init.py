"""`boltlm init`: a params.yaml for one's own text, and one clear line for each wrong input."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

from boltlm import cli
from boltlm.corpus.split import SplitSettings, stream_corpora
from boltlm.params import build_settings, load
from tests import test_pipeline, tiny

SENTENCE = "A set of numbers is called an interval. Its length is b - a, and it is never negative. "
Init = Callable[..., dict[str, Any]]


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """Runs the command in a folder with the presets and returns what it wrote."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.ROOT / "presets", tmp_path / "presets")

    def run(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["boltlm", "init", *arguments])
        cli.main()
        return load(tmp_path / "params.yaml")

    return run


def write_notes(folder: Path, documents: int = 30) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        (folder / f"{i:02}.txt").write_text(f"Note {i}. " + SENTENCE * (5 + i % 3))


def write_rows(path: Path, **columns: str) -> None:
    rows = [{key: value.format(i) for key, value in columns.items()} for i in range(30)]
    text = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_a_folder_of_notes_becomes_an_experiment(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Corpora that the text suffices for, sizes as measured, comments, and the plan."""
    write_notes(tmp_path / "notes")
    params = init("--text", "notes")
    assert params["inputs"] == {"text": "notes"}
    settings = build_settings(SplitSettings, params)
    sizes = {
        name: len(list(docs)) for name, docs in stream_corpora(settings, list(params["corpora"]))
    }
    assert sum(sizes.values()) <= 30
    assert min(sizes.values()) >= 2
    text = (tmp_path / "params.yaml").read_text()
    assert text.startswith("# Written by: boltlm init --text notes\n#\n# text: 30 documents")
    written = dumps_yaml(parse_yaml_for_update(text, "params.yaml"))
    assert [line.split("#")[0].rstrip() for line in written.splitlines()] == [
        line.replace(": null", ":").split("#")[0].rstrip() for line in text.splitlines()
    ]
    output = capsys.readouterr().out
    assert "train@em2" in output
    assert "dvc repro" in output
    assert "no thought of a person or a model" in output


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_column_of_the_text_is_found_or_asked_for(
    init: Init, tmp_path: Path, name: str
) -> None:
    """Ids too, where every row has one of its own."""
    write_rows(tmp_path / name, id="k{}", body=SENTENCE + "{}", title="Title {}")
    assert init("--text", name)["corpus"]["columns"]["text"] == "body"
    params = init("--text", name, "--column", "title", "--force")
    assert params["corpus"]["columns"]["text"] == "title"
    assert params["corpus"]["columns"]["doc_id"] == "id"


def test_markdown_is_cut_at_headings_and_long_texts_at_blank_lines(
    init: Init, tmp_path: Path
) -> None:
    """One book is enough."""
    (tmp_path / "book.md").write_text("".join(f"# Part {i}\n\n{SENTENCE}\n\n" for i in range(40)))
    params = init("--text", "book.md", "--by-heading")
    assert params["corpus"]["unit"] == "heading"
    params = init("--text", "book.md", "--max-characters", "100", "--force")
    assert params["corpus"]["max_characters"] == 100


@pytest.mark.timeout(1800)
def test_from_a_folder_of_notes_to_a_model_that_drew_its_thoughts(tmp_path: Path) -> None:
    """The commands of docs/own-text.md, up to the first iteration."""
    folder = test_pipeline.clone(tmp_path / "one")
    shutil.copytree(tiny.ROOT / "presets", folder / "presets")
    write_notes(folder / "notes")
    test_pipeline.run(folder, "boltlm", "init", "--text", "notes")
    test_pipeline.run(folder, "dvc", "repro", "train@warmstart")
    shown = test_pipeline.run(folder, "boltlm", "try", "--go-on")
    assert "Terms: " in shown
    assert "→" in shown
    test_pipeline.run(folder, "dvc", "repro", "evaluate@em1")
    measured = json.loads((folder / "metrics" / "eval" / "em1.json").read_text())
    assert measured["elbo_per_token"] < 0


@pytest.mark.parametrize("teacher", ["openai", "server", "local"])
def test_other_teachers(init: Init, tmp_path: Path, teacher: str) -> None:
    """Their settings are complete; a server of one's own costs nothing."""
    write_notes(tmp_path / "notes")
    model = () if teacher == "openai" else ("--teacher-model", "owner/small")
    warmstart = init("--text", "notes", "--teacher", teacher, *model)["teachers"]["warmstart"]
    assert warmstart["kind"] == ("vllm" if teacher == "local" else "openai")
    assert warmstart["model"] == ("owner/small" if model else "gpt-4o-mini-2024-07-18")
    if teacher == "server":
        assert warmstart["max_cost_usd"] == 0


def test_a_local_model_is_measured_and_an_input(
    init: Init, tmp_path: Path, base_folder: Path
) -> None:
    """Its context and its tokens; DVC depends on its files."""
    write_notes(tmp_path / "notes")
    params = init("--text", "notes", "--model", str(base_folder))
    assert params["base"] == {"kind": "checkpoint", "model": str(base_folder)}
    assert params["inputs"]["base"] == str(base_folder)
    assert params["sequences"]["sequence_length"] == 128
    assert params["plan"]["checkpoint"]["hidden_size"] == 16


def test_params_with_changes_are_kept(
    init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a preset or a commit are replaced; others only with --force."""
    write_notes(tmp_path / "notes")
    path = tmp_path / "params.yaml"
    shutil.copyfile(tiny.ROOT / "presets" / "smoke.yaml", path)
    init("--text", "notes")
    path.write_text(text := path.read_text() + "# mine\n")
    with pytest.raises(SystemExit):
        init("--text", "notes")
    assert "has changes that are in no commit" in capsys.readouterr().err
    assert path.read_text() == text
    for command in ("init -q", "add params.yaml", "-c user.name=n -c user.email=e commit -qm m"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert init("--text", "notes")["corpus"]["path"] == "notes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "--text nowhere: no such file or folder"),
        (("empty",), "'empty': no such file, or a folder without any of .txt"),
        (("paper.pdf",), "paper.pdf is of another type; .txt, .md"),
        (("few",), "3 documents in 3 files, at least 20 are needed; give --max-characters"),
        (("mixed",), "text files (mixed/a.txt) and data files (mixed/b.jsonl)"),
        (("latin.txt",), "latin.txt: not UTF-8 text"),
        (("two.jsonl",), "Give --column; columns of text: one, other"),
        (("two.jsonl", "--column", "three"), "--column three: two.jsonl has no such column"),
        (("broken.jsonl",), "broken.jsonl, line 1: not JSON"),
        (("notes", "--column", "text"), "--column text: text files have no columns"),
        (("two.jsonl", "--by-heading"), "--by-heading is for .txt and Markdown files"),
        (("notes", "--model", "./models/none"), "--model ./models/none: no such folder"),
        (("notes", "--model", "few"), "--model few: no config.json in it"),
        (("notes", "--teacher", "local"), "--teacher local: give --teacher-model"),
        (
            ("notes", "--presets", "none"),
            "none/own.yaml: no such file; run boltlm init in the root",
        ),
    ],
)
def test_wrong_input_is_one_line(
    init: Init,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    """Nothing is written."""
    write_notes(tmp_path / "notes")
    write_notes(tmp_path / "few", 3)
    for folder in ("empty", "mixed"):
        (tmp_path / folder).mkdir()
    (tmp_path / "paper.pdf").write_bytes(b"%PDF")
    (tmp_path / "mixed" / "a.txt").write_text("A.")
    write_rows(tmp_path / "mixed" / "b.jsonl", text="B {}")
    write_rows(tmp_path / "two.jsonl", one="A {}", other="B {}")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text("no\n")
    with pytest.raises(SystemExit) as ended:
        init("--text", *arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "params.yaml").exists()

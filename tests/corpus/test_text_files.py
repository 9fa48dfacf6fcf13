"""Plain text and Markdown files become documents: files, headings, pieces of limited length."""

from pathlib import Path

import pytest

from boltlm.corpus.sources import FilesSource, read_documents
from boltlm.corpus.text_files import TextsSource
from boltlm.errors import UserError
from tests.corpus.test_sources import COLUMNS, ROWS, write_jsonl


def texts(path: Path, **changes: object) -> list[tuple[str, str, str | None]]:
    values = {"unit": "file", "max_characters": None, "shuffle_buffer": 0} | changes
    source = TextsSource(kind="texts", path=str(path), **values)  # pyright: ignore[reportArgumentType]
    return [(d.doc_id, d.text, d.cluster) for d in read_documents(source, 1)]


def test_a_folder_has_a_document_for_each_text_file(tmp_path: Path) -> None:
    """In the order of their names, with those of folders below; other files are left alone."""
    (tmp_path / "b").mkdir()
    for name, text in (("a.txt", "One."), ("b/a.txt", "Two."), ("c.MD", "# Three"), ("d.csv", "x")):
        (tmp_path / name).write_text(text)
    found = [("a.txt", "One."), ("b/a.txt", "Two."), ("c.MD", "# Three")]
    assert texts(tmp_path) == [(name, text, name) for name, text in found]
    assert texts(tmp_path / "**" / "a.txt") == [
        ("a.txt", "One.", "a.txt"),
        ("b/a.txt", "Two.", "b/a.txt"),
    ]


def test_markdown_is_cut_at_its_headings(tmp_path: Path) -> None:
    """Text before the first one is a document too; a file is a cluster."""
    path = tmp_path / "book.md"
    path.write_text("Preface.\n\n# One\n\nText #5.\n## Two\nMore.\n")
    parts = ["Preface.\n\n", "# One\n\nText #5.\n", "## Two\nMore.\n"]
    expected = [(f"book.md:{i}", part, "book.md") for i, part in enumerate(parts)]
    assert texts(path, unit="heading") == expected
    assert "".join(part for _, part, _ in texts(path, unit="heading")) == path.read_text()


def test_long_texts_are_cut_at_blank_lines(tmp_path: Path) -> None:
    """No character is lost; a paragraph that is too long stays whole."""
    path = tmp_path / "book.txt"
    path.write_text("Aa.\n\nBb.\n\n" + "C" * 30 + "\n\nDd.")
    parts = [text for _, text, _ in texts(path, max_characters=12)]
    assert parts == ["Aa.\n\nBb.\n", "\n" + "C" * 30 + "\n", "\nDd."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.txt", b"\xff\xfe\x00", "not UTF-8 text.*iconv"), ("x.csv", b"a", "without any of .txt")],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts(tmp_path)


def test_a_folder_of_data_files_is_a_source_too(tmp_path: Path) -> None:
    """As a glob pattern that matches them."""
    write_jsonl(tmp_path / "one" / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:3])
    source = FilesSource(kind="files", path=str(tmp_path), columns=COLUMNS, shuffle_buffer=0)
    assert [d.doc_id for d in read_documents(source, 1)] == ["k2", "k0", "k1"]

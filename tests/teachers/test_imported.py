"""The data that the paper's authors released: their chunks, and the latents of every iteration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boltlm.corpus.chunker import Chunker
from boltlm.corpus.reference_latents import NO_LATENT
from boltlm.corpus.split import SplitSettings, split_corpora
from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Document, TeacherLatent, read_table, shard_paths
from boltlm.teachers.config import TeacherSettings
from boltlm.teachers.imported import NO_DOCUMENT, OTHER_PIECES, OTHER_TEXT
from boltlm.teachers.run import run_teacher
from boltlm.tokens import TextCoder
from boltlm.training.config import TrainSettings
from boltlm.training.run import TrainPaths, run_training
from tests import tiny
from tests.shrink import CORPUS_SIZE, shrunk, write_data

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Experiment:
    """The preset paper-released in small, with its split; `data`: the files that it reads."""

    def __init__(self, folder: Path, coder: TextCoder) -> None:
        self.folder, self.coder, self.data = folder, coder, folder / "data"
        write_data(self.data)
        preset = load(tiny.ROOT / "presets" / "paper-released.yaml")
        self.params = shrunk(preset, self.data, "http://127.0.0.1:1")
        self.split()

    def split(self) -> dict[str, int | float]:
        """Run the stage `split`, with chunks as long as the pieces are."""
        settings = build_settings(SplitSettings, self.params)
        chunker = Chunker(settings.chunks, self.coder, 10_000, settings.data_seed)
        folders = {
            "work": self.folder / "work",
            "split_dir": self.folder / "split",
            "chunks_dir": self.folder / "chunks",
        }
        return split_corpora(settings, chunker, **folders)

    def released(self, iteration: int) -> Path:
        return self.data / f"iteration_{iteration}" / "released.jsonl"

    def edit(self, iteration: int, change: Callable[[list[Row]], list[Row]]) -> None:
        """Change the rows that were released for an iteration."""
        rows = change(read_rows(self.released(iteration)))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.released(iteration).write_text(text, encoding="utf-8")

    def number_rows(self) -> None:
        """Give the rows of all iterations ids that do not depend on their order."""
        for iteration in range(5):
            self.edit(iteration, lambda rows: [{**r, "id": f"r{n}"} for n, r in enumerate(rows)])
        self.params["corpora"]["em"]["source"]["columns"]["doc_id"] = "id"
        for iteration in range(1, 5):
            entry = self.params["teachers"][f"em{iteration}"]
            entry["source"]["columns"] = {**entry["source"]["columns"], "doc_id": "id"}
        self.split()

    def teach(self, name: str) -> dict[str, int | float]:
        """Run the stage `teacher@<name>`."""
        corpus = self.params["teachers"][name]["corpus"]
        return run_teacher(
            build_settings(TeacherSettings, self.params, name=name),
            self.coder,
            split=self.folder / "split" / corpus,
            chunks=self.folder / "chunks" / corpus,
            out=self.folder / "teacher" / name,
            cache=self.folder / "cache",
            prompts=tiny.TEMPLATES,
        )

    def latents(self, name: str) -> list[TeacherLatent]:
        return list(read_table(self.folder / "teacher" / name, TeacherLatent))

    def train(self, name: str, base: Path) -> Row:
        """Run the stage `train@<name>` from `base`; return the facts of the training."""
        entry, out = self.params["models"][name], self.folder / "models" / name
        chunks = self.folder / "chunks" / entry["corpus"]
        paths = TrainPaths(
            parent=base,
            chunks=chunks,
            mixed=chunks,
            data=self.folder / entry["data"],
            work=self.folder / "work",
            out=out,
            csv=self.folder / f"{name}.csv",
            timing=self.folder / f"{name}.timing.json",
            metrics=self.folder / f"{name}.json",
            snapshots=self.folder / "snapshots",
        )
        run_training(build_settings(TrainSettings, self.params, name=name), paths)
        return json.loads((out / "training.json").read_text("utf-8"))


@pytest.fixture
def experiment(tmp_path: Path, base_coder: TextCoder) -> Experiment:
    return Experiment(tmp_path, base_coder)


def test_chunks_and_latents_are_those_that_were_released(
    experiment: Experiment, base_folder: Path
) -> None:
    """From split to training: in every iteration each chunk has its own latent, none is dropped,
    and a model is trained on them."""
    for iteration, name in enumerate(["warmstart", "em1", "em2", "em3", "em4"]):
        pairs = [
            (piece["suffix"], piece["latent"])
            for row in read_rows(experiment.released(iteration))
            for piece in row["chunks"]
        ]
        counts = experiment.teach(name)
        corpus = experiment.params["teachers"][name]["corpus"]
        chunks = list(read_table(experiment.folder / "chunks" / corpus, Chunk))
        rows = experiment.latents(name)
        assert [(c.doc_id, c.chunk) for c in chunks] == [(r.doc_id, r.chunk) for r in rows]
        assert [(c.text, r.latent) for c, r in zip(chunks, rows, strict=True)] == pairs
        tokens = sum(len(row.tokens or ()) for row in rows)
        total = 2 * CORPUS_SIZE
        assert counts == {"chunks": total, "latents": total, "latent_tokens": tokens}
    assert len(shard_paths(experiment.folder / "teacher" / "em1")) == 2
    experiment.params["sequences"]["sequence_length"] = 64
    experiment.params["train"]["validation"] = None
    experiment.params["train"]["log_live"] = False
    facts = experiment.train("em2", base_folder)
    assert facts["chunks_without_latent"] == 0
    assert facts["latent_tokens"] == counts_of(experiment, "em2")
    raw = experiment.train("raw_flops", base_folder)
    assert raw["tokens"] == experiment.train("em1", base_folder)["tokens"]


def counts_of(experiment: Experiment, name: str) -> int:
    """The tokens of the latents of a teacher."""
    return sum(len(row.tokens or ()) for row in experiment.latents(name))


def test_documents_are_found_in_any_order(experiment: Experiment) -> None:
    """By their ids; rows of documents that the corpus does not have are left alone."""
    experiment.number_rows()
    experiment.teach("em2")
    expected = experiment.latents("em2")
    other = {"id": "another", "chunks": [{"suffix": "x", "latent": "y"}]}
    experiment.edit(2, lambda rows: [other, *reversed(rows)])
    experiment.teach("em2")
    assert experiment.latents("em2") == expected


def test_documents_that_do_not_match_are_counted(experiment: Experiment) -> None:
    """A document that is missing, or has another text or other pieces, has no latent and a reason;
    more of them than allowed are an error that names the reasons."""
    experiment.number_rows()

    def change(rows: list[Row]) -> list[Row]:
        _, second, third, fourth, *others = rows
        second["chunks"][0]["suffix"] += "!"
        third["chunks"] = [{**third["chunks"][0], "suffix": third["text"][1:]}]
        fourth["chunks"][1]["latent"] = ""
        return [second, third, fourth, *others]

    experiment.edit(3, change)
    with pytest.raises(UserError, match=rf"teachers\.em3: of 24 chunks 2 {NO_DOCUMENT}.*0\.01"):
        experiment.teach("em3")
    experiment.params["teachers"]["em3"]["max_unmatched_fraction"] = 0.25
    counts = experiment.teach("em3")
    reasons = [NO_DOCUMENT] * 2 + [OTHER_TEXT] * 2 + [OTHER_PIECES] * 2 + [None, NO_LATENT]
    assert [row.reason for row in experiment.latents("em3")] == reasons + [None] * 16
    assert counts["latents"] == 17
    assert counts[f"dropped_{OTHER_PIECES}"] == counts[f"dropped_{NO_DOCUMENT}"] == 2


def test_a_corpus_that_was_cut_anew_is_an_error(experiment: Experiment) -> None:
    """Its chunks are not the pieces whose latents would be imported. The source is not read: here
    it is not even there."""
    experiment.params["chunks"]["from_source"] = ["warmstart"]
    experiment.split()
    experiment.released(1).unlink()
    with pytest.raises(UserError, match=r"teachers\.em1: .*list 'em' in chunks\.from_source"):
        experiment.teach("em1")


def test_empty_pieces_do_not_shift_latents(experiment: Experiment) -> None:
    """They have no chunk; in the corpus they are counted."""
    empty = {"suffix": "", "latent": "lost"}

    def insert(rows: list[Row]) -> list[Row]:
        return [
            {**row, "chunks": [empty, row["chunks"][0], empty, row["chunks"][1]]} for row in rows
        ]

    experiment.teach("em4")
    expected = experiment.latents("em4")
    experiment.edit(4, insert)
    experiment.teach("em4")
    assert experiment.latents("em4") == expected
    experiment.edit(1, insert)
    assert experiment.split()["em/dropped_empty_pieces"] == 2 * CORPUS_SIZE
    experiment.teach("em4")
    assert experiment.latents("em4") == expected


def test_two_documents_with_one_id_are_an_error(experiment: Experiment) -> None:
    """Which of them has the latents of the corpus's document is unknown."""
    experiment.number_rows()
    experiment.edit(1, lambda rows: [rows[0], *rows])
    with pytest.raises(UserError, match=r"teachers\.em1\.source: two documents .*'r0'"):
        experiment.teach("em1")


def test_the_imported_text_is_compared_with_the_stored_one(experiment: Experiment) -> None:
    """The documents of the corpus are those of the first iteration."""
    documents = list(read_table(experiment.folder / "split" / "em", Document))
    rows = read_rows(experiment.released(1))
    assert ["\n" + document.text for document in documents] == [row["text"] for row in rows]
    assert all(document.pieces for document in documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "emm"}, r"teachers\.em1\.corpus must name an entry of corpora"),
        ({"drawn_by": "em9"}, r"teachers\.em1\.drawn_by must name an entry of models"),
        ({"max_unmatched_fraction": 2}, r"max_unmatched_fraction must be in \[0, 1\], found 2"),
        ({"columns": {"pieces": None, "text": "text"}}, r"source\.columns\.pieces must name"),
        ({"columns": {"pieces": None}}, r"source\.columns: text must name a column unless pieces"),
        ({"shuffle_buffer": 9}, r"source\.shuffle_buffer must be 0, .*found 9"),
        ({"path": "/elsewhere/a.jsonl"}, r"teachers\.em1\.source\.path: .*not among `inputs`"),
        ({"kind": "gsm8k"}, r"teachers\.em1\.source\.kind must be files \| hub, found 'gsm8k'"),
    ],
)
def test_wrong_settings_name_their_key(experiment: Experiment, changes: Row, message: str) -> None:
    """Before anything is read."""
    entry = experiment.params["teachers"]["em1"]
    for key, value in changes.items():
        section = entry["source"] if key in entry["source"] else entry
        section[key] = {**section[key], **value} if key == "columns" else value
    with pytest.raises(UserError, match=message):
        experiment.teach("em1")

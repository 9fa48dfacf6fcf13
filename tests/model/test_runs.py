"""Training runs: the budget that an arm gets, and what its facts say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.model import runs
from boltlm.params import load
from boltlm.records import Chunk, Paraphrase, TeacherLatent, write_shard
from boltlm.sequences import store
from boltlm.sequences.packing import Source, Writer
from boltlm.tokens import TextCoder
from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of two chunks, of which all but one have a latent."""
    folder = tmp_path_factory.mktemp("data")
    chunks = [
        Chunk(doc_id=f"d{d}", chunk=c, text="x", tokens=tuple(range(2, 12 + d)))
        for d in range(6)
        for c in range(2)
    ]
    latents = [
        TeacherLatent(doc_id=c.doc_id, chunk=c.chunk, latent="z", tokens=(30, 31, 32), reason=None)
        for c in chunks[1:]
    ]
    write_shard(folder / "chunks" / "00000.parquet", Chunk, chunks)
    write_shard(folder / "teacher" / "own" / "00000.parquet", TeacherLatent, latents)
    return folder


def run(
    data: Path,
    base: Path,
    out: Path,
    form: str,
    kind: str,
    amount: int,
    mix_raw: float = 0,
    train: dict[str, Any] | None = None,
    of: str = "own",
    mix_corpus: str = "em",
    **changes: Any,
) -> dict[str, Any]:
    """The facts of one run; its rows and curve are in `out`."""
    params = load(tiny.ROOT / "params.yaml")
    params["seed"] = 1
    params["train"] |= {"precision": "float32", "batch_rows": 4, "log_every": 1}
    params["sequences"] |= {"length": 32, "layout": "document"}
    params["sequences"] |= changes
    budget = {"kind": kind, "amount": amount}
    entry: dict[str, Any] = {"parent": "base", "corpus": "em", "data": "teacher/own"}
    entry |= {"format": form, "mix_raw": mix_raw, "mix_corpus": mix_corpus}
    params["models"] = {
        "arm": {**entry, "budget": budget, "train": {"learning_rate": 0.01, **(train or {})}}
    }
    runs.run(
        params,
        "arm",
        runs.Paths(
            base,
            data / "chunks",
            data / ("chunks" if mix_corpus == "em" else mix_corpus),
            data / "teacher" / of,
            out / "work",
            out / "model",
            out / "curve.csv",
        ),
    )
    return load(out / "model" / "training.json")


def epoch_tokens(data: Path, base: Path, scratch: Path, form: Any, epochs: int) -> int:
    corpus = store.texts(data / "chunks", data / "teacher" / "own")
    writer = Writer(
        markers=TextCoder(base).markers,
        form=form,
        layout="document",
        context_chunks=3,
        room=128,
        seed=1,
    )
    return Source(store.write(scratch / "again", corpus), writer).tokens(epochs, scratch)


@pytest.mark.parametrize("form", ["latent", "raw", "mixed"])
def test_epochs_are_epochs(data: Path, base_folder: Path, tmp_path: Path, form: str) -> None:
    """Every token but the first is trained on, so many times as there are epochs."""
    facts = run(data, base_folder, tmp_path, form, "epochs", 2)
    assert facts["tokens"] == epoch_tokens(data, base_folder, tmp_path, form, 2) - 1
    assert facts["steps"] == math.ceil(math.ceil(facts["tokens"] / 32) / 4)
    raw = 2 * sum(range(10, 16))
    assert (facts["documents"], facts["chunks"], facts["raw_tokens"]) == (6, 12, raw)
    if form == "raw":
        assert facts["latent_tokens"] == 0
    else:
        assert facts["latent_tokens"] == 3 * 11
        assert facts["chunks_without_latent"] == 1


def test_the_matched_baseline_sees_as_many_tokens(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """SPEC 8, FLOP-matched: raw training goes on for as many tokens as the latent arm's epochs
    have, marks and latents included, and not for as many epochs."""
    latent = run(data, base_folder, tmp_path / "latent", "latent", "epochs", 2)
    raw = run(data, base_folder, tmp_path / "raw", "raw", "matched_epochs", 2)
    assert raw["tokens"] == latent["tokens"] > epoch_tokens(data, base_folder, tmp_path, "raw", 2)
    given = run(data, base_folder, tmp_path / "tokens", "raw", "tokens", 100)
    assert given["tokens"] == 99


def test_paraphrases_are_trained_beside_raw_documents(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """WRAP: so many epochs of the paraphrases, as raw text, and as many tokens again of the
    corpus's own documents for `mix_raw: 0.5`."""
    told = [
        Paraphrase(doc_id=f"d{d}", paraphrase=p, style="cot", text="Up by 2. " * 3, reason=None)
        for d in range(6)
        for p in range(2)
    ]
    write_shard(data / "teacher" / "told" / "00000.parquet", Paraphrase, told)
    each = len(TextCoder(base_folder).encode("Up by 2. " * 3)) + 2
    alone = run(data, base_folder, tmp_path / "a", "paraphrase", "epochs", 2, of="told")
    assert alone["tokens"] == 2 * 12 * each - 1
    assert (alone["documents"], alone["latent_tokens"]) == (12, 0)
    mixed = run(
        data, base_folder, tmp_path / "b", "paraphrase", "epochs", 2, of="told", mix_raw=0.5
    )
    assert abs(mixed["tokens"] - 2 * alone["tokens"]) <= 40  # a document of the corpus
    with pytest.raises(UserError, match=r"mix_raw.*raw"):
        run(data, base_folder, tmp_path / "c", "raw", "epochs", 2, mix_raw=0.5)


def test_documents_of_another_corpus_are_mixed_in(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A raw run with three tokens in four of another corpus's documents, as for replay."""
    other = [Chunk(doc_id=f"o{d}", chunk=0, text="y", tokens=(3,) * 18) for d in range(40)]
    write_shard(data / "other" / "00000.parquet", Chunk, other)
    alone = run(data, base_folder, tmp_path / "a", "raw", "epochs", 2)
    mixed = run(
        data, base_folder, tmp_path / "b", "raw", "epochs", 2, mix_raw=0.75, mix_corpus="other"
    )
    assert abs(mixed["tokens"] - 4 * alone["tokens"]) <= 80  # a few documents of twenty tokens
    assert mixed["documents"] == alone["documents"]


def test_a_budget_in_steps(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """Every one of them with all its rows."""
    facts = run(data, base_folder, tmp_path, "latent", "steps", 3)
    assert (facts["steps"], facts["tokens"]) == (3, 3 * 4 * 32)


def test_a_run_overrides_the_section_train(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """`models.<name>.train` changes what it names and leaves the rest."""
    run(data, base_folder, tmp_path, "latent", "epochs", 1)
    rates = np.loadtxt(tmp_path / "curve.csv", delimiter=",", skiprows=1, usecols=3)
    assert 0.001 < rates.max() <= 0.01


def test_only_what_matters_is_in_the_key(
    data: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed for its memory goes on with smaller pieces; one with another rate does
    not go on."""
    folders: list[str] = []

    def seize(*_args: Any, kept: Any, **_more: Any) -> None:
        folders.append(kept.folder.name)
        raise InterruptedError

    monkeypatch.setattr(runs, "train", seize)
    for train in ({}, {"micro_rows": 1, "checkpoint_every": 3}, {"learning_rate": 0.5}):
        with pytest.raises(InterruptedError):
            run(data, base_folder, tmp_path, "latent", "epochs", 1, train=train)
    assert folders[0] == folders[1] != folders[2]


def test_rows_beyond_the_window_are_an_error(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """Positions that the model has never seen would be trained on without a word."""
    with pytest.raises(UserError, match=r"sequences\.length 129.*128"):
        run(data, base_folder, tmp_path, "raw", "epochs", 1, length=129)


def test_a_budget_is_positive(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """No step at all would copy the parent under another name."""
    with pytest.raises(UserError, match=r"models\.arm\.budget.*amount"):
        run(data, base_folder, tmp_path, "raw", "epochs", 0)

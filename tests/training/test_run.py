"""Training runs of params.yaml: budgets, formats, mixed data, and the key of unfinished work."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Paraphrase, Sample, TeacherLatent, write_shard
from boltlm.sequences import store
from boltlm.sequences.formatter import SequenceFormatter
from boltlm.sequences.layouts import SequenceFormat
from boltlm.sequences.packing import SequenceSource
from boltlm.timing import read_timing
from boltlm.tokens import TextCoder
from boltlm.training import job
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.compute import write_compute
from boltlm.training.config import TrainSettings
from boltlm.training.metrics_logger import MetricsLogger
from boltlm.training.run import TrainPaths, run_training
from tests import tiny
from tests.training.harness import column, read_log

SEQUENCE_LENGTH, BATCH_SIZE = 32, 4
DRAWN: dict[str, Any] = {"latents": "latents/em1", "layout": "chunk"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of two chunks, all but one with latents: a teacher's, and three draws, two of
    them equal, with the weights ŵ = 0.75 and 0.25. The second draw is selected."""
    folder = tmp_path_factory.mktemp("data")
    chunks = [
        Chunk(doc_id=f"d{d}", chunk=c, text="x", tokens=tuple(range(2, 12 + d)))
        for d in range(6)
        for c in range(2)
    ]
    written = [
        TeacherLatent(doc_id=c.doc_id, chunk=c.chunk, latent="z", tokens=(30, 31, 32), reason=None)
        for c in chunks[1:]
    ]
    samples = [
        Sample(
            doc_id=c.doc_id, chunk=c.chunk, sample=k, latent="z", tokens=tokens, finish="stop",
            log_q=-1.0, log_allowed=0.0, log_p_latent=-1.0, log_p_text=-1.0,
            log_weight=math.log(weight), selected=k == 1,
        )
        for c in chunks[1:]
        for k, tokens, weight in ((0, (40, 41), 0.5), (1, (30, 31, 32), 0.25), (2, (40, 41), 0.25))
    ]  # fmt: skip
    latents = folder / "latents" / "em1"
    write_shard(latents / "00000.parquet", Sample, samples)
    write_compute(latents, "latents/em1", flops=1, flops_per_token=1, history=[])
    write_shard(folder / "chunks" / "00000.parquet", Chunk, chunks)
    write_shard(folder / "teacher" / "latents" / "00000.parquet", TeacherLatent, written)
    return folder


def run_model(
    data: Path,
    base: Path,
    out: Path,
    sequence_format: str,
    budget: tuple[str, int],
    *,
    latents: str = "teacher/latents",
    layout: str = "document",
    mixed: str = "chunks",
    mix_unit: str = "tokens",
    sequence_length: int = SEQUENCE_LENGTH,
    train: dict[str, Any] | None = None,
    **entry: Any,
) -> dict[str, Any]:
    """Train the model `arm` in `out` and return the contents of its training.json. `budget`: kind
    and amount; `latents`: the folder of the data; `entry`: changes to models.arm; `train`: its
    changes to the section `train`."""
    params = load(tiny.ROOT / "params.yaml")
    params["seed"] = 1
    params["train"] |= {"precision": "float32", "batch_size": BATCH_SIZE, "log_every": 1}
    params["sequences"] |= {"sequence_length": sequence_length, "layout": layout}
    params["sequences"]["mix_unit"] = mix_unit
    params["models"] = {
        "arm": {
            "parent": "base",
            "corpus": "em",
            "data": "latents/em1" if latents.startswith("latents/") else "teacher/all",
            "format": sequence_format,
            "mix_corpus": "em",
            "budget": {"kind": budget[0], "amount": budget[1]},
            "train": {"learning_rate": 0.01, **(train or {})},
            **entry,
        }
    }
    paths = TrainPaths(
        parent=base,
        chunks=data / "chunks",
        mixed=data / mixed,
        data=data / latents,
        work=out / "work",
        out=out / "model",
        csv=out / "log.csv",
        timing=out / "timing.json",
        metrics=out / "metrics.json",
        snapshots=out / "snapshots",
    )
    run_training(build_settings(TrainSettings, params, name="arm"), paths)
    return json.loads((out / "model" / "training.json").read_text("utf-8"))


def epoch_tokens(
    data: Path, base: Path, scratch: Path, sequence_format: SequenceFormat, epochs: int
) -> int:
    """The number of tokens of so many epochs, in the layout `document`."""
    corpus = store.read_tokenized(data / "chunks", data / "teacher" / "latents")
    formatter = SequenceFormatter(
        special_tokens=TextCoder(base).special_tokens,
        sequence_format=sequence_format,
        draws="selected",
        layout="document",
        context_loss=True,
        context_chunks=3,
        token_budget=128,
        seed=1,
    )
    documents = store.write_documents(scratch / "counted", corpus)
    return SequenceSource(documents, formatter).num_tokens(epochs, scratch)


@pytest.mark.parametrize("sequence_format", ["latent", "raw", "mixed"])
def test_a_budget_in_epochs(
    data: Path, base_folder: Path, tmp_path: Path, sequence_format: SequenceFormat
) -> None:
    """Every token but the first is a target, as many times as there are epochs."""
    facts = run_model(data, base_folder, tmp_path, sequence_format, ("epochs", 2))
    assert facts["tokens"] == epoch_tokens(data, base_folder, tmp_path, sequence_format, 2) - 1
    assert facts["steps"] == math.ceil(math.ceil(facts["tokens"] / SEQUENCE_LENGTH) / BATCH_SIZE)
    raw_tokens = 2 * sum(range(10, 16))
    assert (facts["documents"], facts["chunks"], facts["raw_tokens"]) == (6, 12, raw_tokens)
    if sequence_format == "raw":
        assert facts["latent_tokens"] == 0
    else:
        assert facts["latent_tokens"] == 3 * 11
        assert facts["chunks_without_latent"] == 1


def test_a_flop_matched_run_has_as_many_tokens_as_the_latent_run(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """docs/method.md, section 7: raw training on as many tokens as the epochs of the latent run
    have, special tokens and latents included, and not on as many epochs."""
    latent = run_model(data, base_folder, tmp_path / "latent", "latent", ("epochs", 2))
    raw = run_model(data, base_folder, tmp_path / "raw", "raw", ("flop_matched_epochs", 2))
    assert raw["tokens"] == latent["tokens"] > epoch_tokens(data, base_folder, tmp_path, "raw", 2)


def test_a_budget_in_tokens(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """The first token of the stream is not a target."""
    facts = run_model(data, base_folder, tmp_path, "raw", ("tokens", 100))
    assert facts["tokens"] == 99


def test_a_budget_in_steps(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """Every step has a complete batch."""
    facts = run_model(data, base_folder, tmp_path, "latent", ("steps", 3))
    assert (facts["steps"], facts["tokens"]) == (3, 3 * BATCH_SIZE * SEQUENCE_LENGTH)


def test_paraphrases_are_mixed_with_raw_documents(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """WRAP: the epochs of the paraphrases as raw text and, with `mix_raw: 0.5`, as many tokens
    again of the corpus's documents."""
    text = "Up by 2. " * 3
    paraphrases = [
        Paraphrase(doc_id=f"d{d}", paraphrase=p, style="cot", text=text, reason=None)
        for d in range(6)
        for p in range(2)
    ]
    write_shard(data / "teacher" / "wrap" / "00000.parquet", Paraphrase, paraphrases)
    document_tokens = len(TextCoder(base_folder).encode(text)) + 2
    budget = ("epochs", 2)
    alone = run_model(
        data, base_folder, tmp_path / "a", "paraphrase", budget, latents="teacher/wrap"
    )
    assert alone["tokens"] == 2 * 12 * document_tokens - 1
    assert (alone["documents"], alone["latent_tokens"]) == (12, 0)
    mixed = run_model(
        data, base_folder, tmp_path / "b", "paraphrase", budget, latents="teacher/wrap", mix_raw=0.5
    )
    assert abs(mixed["tokens"] - 2 * alone["tokens"]) <= 40  # one document of the corpus
    by_documents = run_model(
        data,
        base_folder,
        tmp_path / "d",
        "paraphrase",
        budget,
        latents="teacher/wrap",
        mix_raw=0.5,
        mix_unit="documents",
    )
    # As many documents of the corpus as paraphrases: four epochs of its six.
    raw_tokens = epoch_tokens(data, base_folder, tmp_path, "raw", 4)
    assert by_documents["tokens"] == alone["tokens"] + raw_tokens
    with pytest.raises(UserError, match=r"mix_unit documents cannot count"):
        run_model(
            data, base_folder, tmp_path / "e", "mixed", budget, mix_raw=0.5, mix_unit="documents"
        )
    with pytest.raises(UserError, match=r"mix_raw must be 0 where the format is raw"):
        run_model(data, base_folder, tmp_path / "c", "raw", budget, mix_raw=0.5)


def test_documents_of_another_corpus_are_mixed_in(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A raw run, three quarters of whose tokens are documents of another corpus, as for replay."""
    chunks = [Chunk(doc_id=f"o{d}", chunk=0, text="y", tokens=(3,) * 18) for d in range(40)]
    write_shard(data / "other" / "00000.parquet", Chunk, chunks)
    alone = run_model(data, base_folder, tmp_path / "a", "raw", ("epochs", 2))
    mixed = run_model(
        data,
        base_folder,
        tmp_path / "b",
        "raw",
        ("epochs", 2),
        mixed="other",
        mix_raw=0.75,
        mix_corpus="warmstart",
    )
    assert abs(mixed["tokens"] - 4 * alone["tokens"]) <= 80  # a few documents of twenty tokens
    assert mixed["documents"] == alone["documents"]


def test_a_model_changes_the_section_train(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """`models.<name>.train` replaces the keys that it names and leaves the others; the log of the
    run has its wall-clock figures beside it."""
    run_model(data, base_folder, tmp_path, "latent", ("epochs", 1), train={"log_every": 2})
    log = read_log(tmp_path / "log.csv")
    assert 0.001 < max(column(log, "lr")) <= 0.01
    assert np.all(np.array(column(log, "step")[:-1]) % 2 == 0)
    timings = read_timing(tmp_path / "timing.json", tmp_path / "log.csv")
    assert column(timings, "step") == column(log, "step")


def test_unfinished_work_is_named_by_what_changes_the_result(
    data: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed for its memory resumes with smaller micro-batches; one with another
    learning rate or other draws starts anew."""
    folders: list[str] = []

    def record(*_args: Any, checkpoints: CheckpointManager, **_named: Any) -> None:
        folders.append(checkpoints.folder.name)
        raise InterruptedError

    monkeypatch.setattr(job, "train_model", record)
    for train in ({}, {"micro_batch_size": 1, "checkpoint_every": 3}, {"learning_rate": 0.5}):
        with pytest.raises(InterruptedError):
            run_model(data, base_folder, tmp_path, "latent", ("epochs", 1), train=train)
    for draws in ("selected", "resampled", "weighted"):
        with pytest.raises(InterruptedError):
            run_model(data, base_folder, tmp_path, "latent", ("epochs", 1), draws=draws, **DRAWN)
    assert folders[0] == folders[1]
    assert len(set(folders[1:])) == 5


def test_every_choice_of_draws_has_its_tokens(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """In an epoch of 12 rows 11 have a latent: of 3 tokens (selected), of 3 or 2 (resampled), or
    one row for each of the two distinct latents (weighted). Other counts are the same."""
    facts = {
        draws: run_model(
            data, base_folder, tmp_path / draws, "latent", ("epochs", 4), draws=draws, **DRAWN
        )
        for draws in ("selected", "resampled", "weighted")
    }
    tokens = {draws: values["tokens"] for draws, values in facts.items()}
    num_shorter = tokens["selected"] - tokens["resampled"]
    assert abs(num_shorter - 4 * 11 * 0.75) < 2 * 4
    assert 1.8 * tokens["selected"] < tokens["weighted"] < 2 * tokens["selected"]
    assert {values["latent_tokens"] for values in facts.values()} == {33}
    distinct = [values.get("distinct_latents") for values in facts.values()]
    assert distinct == [None, 22, 22]
    metrics = json.loads((tmp_path / "weighted" / "metrics.json").read_text("utf-8"))
    assert metrics["training_tokens"] == tokens["weighted"]


@pytest.mark.parametrize("draws", ["resampled", "weighted"])
def test_a_flop_matched_budget_counts_the_selected_draws(
    data: Path, base_folder: Path, tmp_path: Path, draws: str
) -> None:
    """docs/method.md, 7.2: the reference is one latent for each chunk, the selected one, so that
    every choice of draws trains on as many tokens."""
    selected = run_model(data, base_folder, tmp_path / "s", "latent", ("epochs", 2), **DRAWN)
    budget = ("flop_matched_epochs", 2)
    out = tmp_path / draws
    matched = run_model(data, base_folder, out, "latent", budget, draws=draws, **DRAWN)
    assert matched["tokens"] == selected["tokens"]
    steps = run_model(
        data, base_folder, tmp_path / "steps", "latent", ("steps", 3), draws=draws, **DRAWN
    )
    assert steps["tokens"] == 3 * BATCH_SIZE * SEQUENCE_LENGTH


@pytest.mark.parametrize("draws", ["resampled", "weighted"])
def test_a_resumed_run_has_the_same_draws(
    data: Path, base_folder: Path, tmp_path: Path, draws: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a later epoch, also with its packed sequences lost: weights and log are those of an
    undisturbed run, byte for byte."""
    train = {"checkpoint_every": 5}

    def run(out: Path) -> None:
        run_model(
            data, base_folder, out, "latent", ("epochs", 4), draws=draws, train=train, **DRAWN
        )

    def killing_add(self: MetricsLogger, *args: Any, **named: Any) -> None:
        add(self, *args, **named)
        if self.step == 8:
            raise InterruptedError

    run(tmp_path / "undisturbed")
    add = MetricsLogger.add
    for name in ("killed", "unpacked"):
        monkeypatch.setattr(MetricsLogger, "add", killing_add)
        with pytest.raises(InterruptedError):
            run(tmp_path / name)
        monkeypatch.setattr(MetricsLogger, "add", add)
        if name == "unpacked":
            for path in (tmp_path / name / "work" / "train").glob("*/stats.json"):
                path.unlink()
        run(tmp_path / name)
        for file in ("model/model.safetensors", "log.csv"):
            expected = (tmp_path / "undisturbed" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == expected


@pytest.mark.parametrize(
    ("sequence_format", "changes", "message"),
    [
        (
            "latent",
            {"draws": "resampled", "latents": "teacher/latents"},
            r"^params\.yaml: models\.arm: draws: resampled needs `data` in latents/.* teacher/all$",
        ),
        (
            "raw",
            {"draws": "weighted"},
            r"^params\.yaml: models\.arm: draws must be selected unless .*latent, .*format raw$",
        ),
        (
            "latent",
            {"draws": "weighted", "layout": "document"},
            r"^params\.yaml: models\.arm\.draws: weighted needs .*layout chunk.* found document$",
        ),
        (
            "latent",
            {"draws": "all"},
            r"^params\.yaml: models\.arm\.draws must be selected \| resampled \| weighted, found",
        ),
    ],
)
def test_draws_that_cannot_be_trained_on_are_an_error(
    data: Path,
    base_folder: Path,
    tmp_path: Path,
    sequence_format: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Said in one line before any work, by the key to change."""
    with pytest.raises(UserError, match=message):
        run_model(
            data, base_folder, tmp_path, sequence_format, ("epochs", 1), **{**DRAWN, **changes}
        )
    assert not list(tmp_path.iterdir())


def test_sequences_longer_than_the_context_are_an_error(
    data: Path, base_folder: Path, tmp_path: Path
) -> None:
    """The model would silently be trained at positions that it does not support."""
    with pytest.raises(UserError, match=r"sequences\.sequence_length is 129.* 128 tokens"):
        run_model(data, base_folder, tmp_path, "raw", ("epochs", 1), sequence_length=129)


def test_a_budget_is_positive(data: Path, base_folder: Path, tmp_path: Path) -> None:
    """A run without a step would copy its parent under another name."""
    with pytest.raises(UserError, match=r"models\.arm\.budget.*amount"):
        run_model(data, base_folder, tmp_path, "raw", ("epochs", 0))

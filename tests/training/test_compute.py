"""The compute of a history: every stage counted exactly, and once; the baseline matched to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from boltlm.errors import UserError
from boltlm.estep.compute import check_reuse, record_estep_compute
from boltlm.estep.config import EStepSettings
from boltlm.estep.run import run_estep
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Document, Sample, TeacherLatent, read_table, write_shard
from boltlm.training.compute import ComputeRecord, read_compute, write_compute
from boltlm.training.config import TrainSettings
from boltlm.training.run import TrainPaths, run_training
from tests import tiny
from tests.training.harness import column, read_log

SEQUENCE_LENGTH, K_SAMPLES, MAX_LATENT_TOKENS = 32, 3, 5
TEXT, LATENT = tuple(range(20, 29)), (30, 31, 32)
DOCUMENTS, CHUNKS = 6, 12
# Of `base_folder`: the output matrix, two layers (attention, MLP, norms) and the last norm; then
# causal attention. Six FLOPs for each weight, of which two are of the forward pass.
WEIGHTS = 300 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
FLOPS_PER_TOKEN = 6 * WEIGHTS + 6 * 2 * 16 * SEQUENCE_LENGTH


def entry(parent: str, data: str, **changes: Any) -> dict[str, Any]:
    values = {"parent": parent, "corpus": "em", "data": data, "mix_corpus": "em"}
    return {**values, "budget": {"kind": "epochs", "amount": 2}, **changes}


def raw_history(amount: int) -> dict[str, Any]:
    budget = {"kind": "flop_matched_history", "amount": amount}
    return entry("base", "latents/em2", format="raw", budget=budget)


@dataclass(frozen=True)
class Experiment:
    """The stages `train` and `latents` on a small corpus, in a folder."""

    folder: Path
    params: dict[str, Any]

    @property
    def chunks(self) -> Path:
        return self.folder / "data" / "chunks" / "em"

    def train(self, name: str) -> tuple[ComputeRecord, dict[str, int]]:
        """Train an entry of `models`; its record and its metrics."""
        settings = build_settings(TrainSettings, self.params, name=name)
        models, out = self.folder / "models", self.folder / "models" / name
        paths = TrainPaths(
            parent=models / settings.model.parent,
            chunks=self.chunks,
            mixed=self.chunks,
            data=self.folder / "data" / settings.model.data,
            work=self.folder / "work",
            out=out,
            csv=self.folder / f"{name}.csv",
            timing=self.folder / "timings" / f"{name}.json",
            metrics=self.folder / f"{name}.json",
            snapshots=self.folder / "snapshots" / name,
        )
        run_training(settings, paths)
        return read_compute(out), json.loads(paths.metrics.read_text("utf-8"))

    def draw(self, name: str) -> ComputeRecord:
        """Draw an entry of `latents`; its record."""
        settings = build_settings(EStepSettings, self.params, name=name)
        model = self.folder / "models" / settings.entry.model
        out = self.folder / "data" / "latents" / name
        diagnostics, _ = run_estep(
            settings,
            model=model,
            split=self.folder / "data" / "split" / "em",
            chunks=self.chunks,
            previous=self.folder / "data" / settings.entry.previous,
            previous_model=self.folder / "models" / settings.entry.previous_model,
            work=self.folder / "work",
            out=out,
            histogram_path=self.folder / f"{name}-histogram.csv",
        )
        tokens = int(diagnostics["forward_tokens"])
        metrics = record_estep_compute(name, tokens, model=model, reused=None, out=out)
        record = read_compute(out)
        assert metrics == {
            "estep_flops": record.own_flops,
            "history_flops": record.history_flops,
        }
        return record

    def training_flops(self, name: str) -> int:
        """From the number of labels that the training log counted; in a continual run it begins
        with those of the parent before its decay."""
        tokens = int(column(read_log(self.folder / f"{name}.csv"), "tokens")[-1])
        parent = self.folder / "models" / self.params["models"][name]["parent"]
        if (parent / "predecay").is_dir():
            facts = json.loads((parent / "predecay" / "training.json").read_text("utf-8"))
            tokens -= facts["tokens"]
        return tokens * FLOPS_PER_TOKEN

    def estep_flops(self, name: str) -> int:
        """From the stored draws, by hand: the second chunk of a document has the first as C."""
        tokens = 0
        for chunk in range(CHUNKS):
            context = len(TEXT) * (chunk % 2)
            tokens += 1 + context + 2 + len(TEXT) + 2  # BOS C SoL EoL X SoL Post
            tokens += 1 + context + 2  # BOS C SoL Prior
        for sample in read_table(self.folder / "data" / "latents" / name, Sample):
            tokens += len(sample.tokens) + 1  # Z EoL
            tokens += len(sample.tokens) + 1 + len(TEXT)  # Z EoL X
        return tokens * FLOPS_PER_TOKEN // 3


def create_experiment(folder: Path, base: Path, *, chain: bool) -> Experiment:
    """Two iterations. `chain`: each model continues from the one before it (wsd)."""
    chunks = [
        Chunk(doc_id=f"d{d}", chunk=c, text="x", tokens=TEXT)
        for d in range(DOCUMENTS)
        for c in range(2)
    ]
    latents = [
        TeacherLatent(doc_id=c.doc_id, chunk=c.chunk, latent="z", tokens=LATENT, reason=None)
        for c in chunks[1:]
    ]
    write_shard(folder / "data" / "chunks" / "em" / "00000.parquet", Chunk, chunks)
    write_shard(folder / "data" / "teacher" / "t" / "00000.parquet", TeacherLatent, latents)
    documents = [
        Document(doc_id=doc_id, text="", source="tests")
        for doc_id in dict.fromkeys(chunk.doc_id for chunk in chunks)
    ]
    write_shard(folder / "data" / "split" / "em" / "00000.parquet", Document, documents)
    (folder / "models").mkdir()
    (folder / "models" / "base").symlink_to(base)
    params = load(tiny.ROOT / "params.yaml")
    schedule = {"kind": "wsd" if chain else "cosine", "warmup": 0}
    params["train"] |= {"precision": "float32", "batch_size": 2, "log_every": 1}
    params["train"]["schedule"] |= schedule
    params["sequences"] |= {"sequence_length": SEQUENCE_LENGTH, "layout": "document"}
    params |= {"k_samples": K_SAMPLES, "max_latent_tokens": MAX_LATENT_TOKENS}
    params["teachers"] = {"t": params["teachers"]["warmstart"]}
    params["latents"] = {
        name: {**params["latents"]["em1"], "model": model, "corpus": "em"}
        for name, model in (("em1", "warmstart"), ("em2", "em1"))
    }
    params["models"] = {
        "warmstart": entry("base", "teacher/t"),
        "em1": entry("warmstart" if chain else "base", "latents/em1"),
        "em2": entry("em1" if chain else "base", "latents/em2"),
        "raw_history": raw_history(2),
    }
    return Experiment(folder, params)


@pytest.mark.parametrize("chain", [False, True])
def test_the_history_of_two_iterations(chain: bool, base_folder: Path, tmp_path: Path) -> None:
    """Every stage is counted exactly, and once, although the warm start is reached through its
    latents and, in the continual setting, through its children. A raw run with the budget
    flop_matched_history costs as much as the last model with its history."""
    experiment = create_experiment(tmp_path, base_folder, chain=chain)
    experiment.train("warmstart")
    experiment.draw("em1")
    experiment.train("em1")
    experiment.draw("em2")
    record, metrics = experiment.train("em2")
    expected = {
        "teacher/t": (CHUNKS - 1) * len(LATENT) * FLOPS_PER_TOKEN // 3,
        "models/warmstart": experiment.training_flops("warmstart"),
        "latents/em1": experiment.estep_flops("em1"),
        "models/em1": experiment.training_flops("em1"),
        "latents/em2": experiment.estep_flops("em2"),
        "models/em2": experiment.training_flops("em2"),
    }
    assert {key.split("@")[0]: flops for key, flops in record.lineage.items()} == expected
    assert len(record.lineage) == len(expected)
    assert metrics == {
        "training_tokens": expected["models/em2"] // FLOPS_PER_TOKEN,
        "training_flops": expected["models/em2"],
        "history_flops": sum(expected.values()),
    }
    raw, _ = experiment.train("raw_history")
    assert list(raw.lineage) == [raw.key]
    assert 0 <= raw.own_flops - record.history_flops < FLOPS_PER_TOKEN


def test_an_artifact_that_is_reached_twice_is_counted_once(tmp_path: Path) -> None:
    """And one of another content is another artifact, even under the same name."""
    (tmp_path / "weights").write_bytes(b"1")
    first = write_compute(tmp_path, "models/a", flops=5, flops_per_token=6, history=[{"b": 2}])
    again = write_compute(tmp_path, "models/a", flops=5, flops_per_token=6, history=[{"b": 2}])
    assert first == again == read_compute(tmp_path)
    (tmp_path / "weights").write_bytes(b"2")
    history = [first.lineage, again.lineage, {"b": 2, "c": 1}]
    other = write_compute(tmp_path, "models/a", flops=7, flops_per_token=6, history=history)
    assert sorted(other.lineage.values()) == [1, 2, 5, 7]
    assert (other.own_flops, other.history_flops) == (7, 15)


def test_a_history_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    """It would count as nothing, and the baseline would be too cheap."""
    with pytest.raises(UserError, match=r"compute\.json: no such file; run the stage"):
        read_compute(tmp_path)
    params = load(tiny.ROOT / "params.yaml")
    params["models"]["arm"] = {**raw_history(2), "data": "teacher/all"}
    with pytest.raises(UserError, match=r"needs `data` in latents/.* found teacher/all"):
        build_settings(TrainSettings, params, name="arm")


def test_reused_latents_belong_to_the_history(tmp_path: Path) -> None:
    """And are refused where the model itself drew them."""
    models = []
    for index, name in enumerate(("one", "two")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights").write_bytes(bytes([index]))
        write_compute(folder, f"models/{name}", flops=5, flops_per_token=6, history=[])
        models.append(folder)
    previous, latents = tmp_path / "previous", tmp_path / "latents"
    for folder in (previous, latents):
        folder.mkdir()
        (folder / "00000.parquet").write_bytes(folder.name.encode())
    record_estep_compute("em1", 10, model=models[0], reused=None, out=previous)
    record_estep_compute("em2", 10, model=models[1], reused=previous, out=latents)
    names = {key.split("@")[0] for key in read_compute(latents).lineage}
    assert names == {"models/one", "models/two", "latents/em1", "latents/em2"}
    check_reuse(models[1], previous)
    with pytest.raises(UserError, match=r"was drawn by .*one, whose draws are the same"):
        check_reuse(models[0], previous)

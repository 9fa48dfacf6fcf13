"""The stage `latents` on a small corpus, run in this process or as its user runs it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from boltlm.corpus.chunker import Chunker
from boltlm.corpus.chunks import ChunkingConfig
from boltlm.corpus.split import SplitSettings, split_corpora
from boltlm.estep.config import EStepSettings
from boltlm.estep.run import run_estep
from boltlm.params import build_settings, load
from boltlm.records import Sample, read_table
from boltlm.tokens import TextCoder
from tests import tiny

DOCUMENTS = 7


def small_params() -> dict[str, Any]:
    """params.yaml with one small training corpus, and short latents."""
    params = tiny.without_entries(load(tiny.ROOT / "params.yaml"))
    params["models"] = {name: tiny.raw_entry("em") for name in ("warmstart", "em1")}
    params["corpora"] = {
        "base": {"documents": 1, "source": {"pages": "primer"}},
        "em": {"documents": DOCUMENTS, "source": {}},
        "heldout": {"documents": 1, "source": {"problems": "held_out"}},
    }
    params["questions"]["count"] = 0
    params["latents"] = {
        "em1": tiny.latents_entry("warmstart"),
        "uniform": tiny.latents_entry("warmstart", estep={"selection": "uniform"}),
        "next": tiny.latents_entry("em1", previous="latents/em1", previous_model="warmstart"),
    }
    params |= {"max_latent_tokens": 8, "k_samples": 3, "context_chunks": 2}
    params["sampling"]["batch_tokens"] = 4096
    return params


class LatentsStage:
    """The stage in a folder of its own, on a corpus of shards with `shard_documents` documents.

    `params` may be changed between runs.
    """

    def __init__(
        self, folder: Path, model: Path, shard_documents: int, documents: int = DOCUMENTS
    ) -> None:
        self.folder, self.model, self.params = folder, model, small_params()
        self.previous_model = model
        self.params["corpora"]["em"]["documents"] = documents
        self.params["split"]["shard_documents"] = shard_documents
        lengths = ChunkingConfig(mean_sentences=1, min_sentences=1, max_sentences=2, from_source=())
        split_corpora(
            build_settings(SplitSettings, self.params),
            Chunker(lengths, TextCoder(model), 100, seed=1),
            work=folder / "work",
            split_dir=folder / "split",
            chunks_dir=folder / "chunks",
        )

    @property
    def settings(self) -> EStepSettings:
        return build_settings(EStepSettings, self.params, name="em1")

    @property
    def chunks(self) -> Path:
        return self.folder / "chunks" / "em"

    @property
    def previous(self) -> Path:
        return self.folder / "previous"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, name: str = "em1") -> tuple[dict[str, int | float], dict[str, float]]:
        """The metrics and the wall-clock figures of a run of an entry in this process."""
        return run_estep(
            build_settings(EStepSettings, self.params, name=name),
            model=self.model,
            split=self.folder / "split" / "em",
            chunks=self.chunks,
            previous=self.previous,
            previous_model=self.previous_model,
            work=self.folder / "work",
            out=self.out,
            histogram_path=self.folder / "histogram.csv",
        )

    def write_params(self) -> Path:
        path = self.folder / "params.yaml"
        path.write_text(yaml.safe_dump(self.params), encoding="utf-8")
        return path

    def arguments(self) -> list[str]:
        """The stage script and its arguments, for the same work in a process of its own."""
        self.write_params()
        paths = {
            "params": "params.yaml",
            "split": "split/em",
            "chunks": "chunks/em",
            "previous": "previous",
            "work": "work",
            "timings": "timings",
            "out": "out",
            "metrics": "metrics.json",
            "histogram": "histogram.csv",
        }
        arguments = [str(tiny.ROOT / "stages" / "latents.py"), "--name", "em1"]
        for flag, path in paths.items():
            arguments += [f"--{flag}", str(self.folder / path)]
        return [*arguments, "--model", str(self.model), "--previous-model", str(self.model)]

    def command(self) -> list[str]:
        return [sys.executable, *self.arguments()]

    def samples(self) -> list[Sample]:
        return list(read_table(self.out, Sample))


def content(samples: Sequence[Sample]) -> list[tuple]:
    """What must agree between runs whose batches differ."""
    return [(s.doc_id, s.chunk, s.sample, s.tokens, s.finish, s.selected) for s in samples]

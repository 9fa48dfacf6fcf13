"""The E-step over a corpus: the same samples whatever the shards, the crashes and the reruns."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.corpus.chunks import Chunker, Chunking
from boltlm.corpus.split import split
from boltlm.params import load
from boltlm.records import Chunk, Sample, read, read_shard
from boltlm.sampling import shards
from boltlm.sampling.estep import EStep, Item
from boltlm.sampling.samplers import TransformersSampler
from boltlm.tokens import TextCoder
from tests import tiny

DOCUMENTS = 7


def params() -> dict[str, Any]:
    found = load(tiny.ROOT / "params.yaml")
    found["corpora"] = {"em": {"documents": DOCUMENTS, "source": {}}}
    found["questions"]["count"] = 0
    found["latents"] = {"em1": {"model": "base", "corpus": "em"}}
    found |= {"max_latent_tokens": 8, "k_samples": 3, "context_chunks": 2}
    found["sampling"]["batch_tokens"] = 4096
    return found


class Stage:
    """The stage `latents` on a corpus in shards of so many documents."""

    def __init__(
        self, folder: Path, model: Path, shard_documents: int, documents: int = DOCUMENTS
    ) -> None:
        self.folder, self.model, self.params = folder, model, params()
        self.params["corpora"]["em"]["documents"] = documents
        self.params["split"]["shard_documents"] = shard_documents
        lengths = Chunking(mean_sentences=1, least_sentences=1, most_sentences=2)
        chunker = Chunker(lengths, TextCoder(model), 100, seed=1)
        split(self.params, chunker, folder / "split", folder / "chunks")

    def run(self) -> dict[str, int | float]:
        return shards.run(
            self.params,
            "em1",
            model=self.model,
            split=self.folder / "split" / "em",
            chunks=self.folder / "chunks" / "em",
            work=self.folder / "work",
            out=self.folder / "out",
            histogram_path=self.folder / "histogram.csv",
        )

    def command(self) -> list[str]:
        """The same work as a process of its own."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))
        places = {
            "params": "params.yaml",
            "split": "split/em",
            "chunks": "chunks/em",
            "work": "work",
            "out": "out",
            "metrics": "m.json",
            "histogram": "h.csv",
        }
        command = [sys.executable, str(tiny.ROOT / "stages" / "latents.py"), "--name", "em1"]
        for flag, place in places.items():
            command += [f"--{flag}", str(self.folder / place)]
        return [*command, "--model", str(self.model)]

    def samples(self) -> list[Sample]:
        return list(read(self.folder / "out", Sample))


def drawn(samples: Sequence[Sample]) -> list[tuple]:
    return [(s.doc_id, s.chunk, s.sample, s.tokens, s.finish, s.selected) for s in samples]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Stage:
    """All documents in one shard."""
    stage = Stage(tmp_path_factory.mktemp("whole"), base_folder, 100)
    stage.run()
    return stage


def test_every_chunk_has_its_k_samples(whole: Stage) -> None:
    """In reading order, K of each, none of a chunk that is not there."""
    chunks = list(read(whole.folder / "chunks" / "em", Chunk))
    assert len({chunk.doc_id for chunk in chunks}) == DOCUMENTS
    assert [(s.doc_id, s.chunk, s.sample) for s in whole.samples()] == [
        (chunk.doc_id, chunk.chunk, k) for chunk in chunks for k in range(3)
    ]


@pytest.mark.parametrize("shard_documents", [1, 3])
def test_samples_do_not_depend_on_the_shards(
    whole: Stage, base_folder: Path, tmp_path: Path, shard_documents: int
) -> None:
    """SPEC 2 and 4: the unit of work is a convenience, not part of the experiment."""
    stage = Stage(tmp_path, base_folder, shard_documents)
    measured = stage.run()
    assert drawn(stage.samples()) == drawn(whole.samples())
    assert len(list((tmp_path / "out").iterdir())) == -(-DOCUMENTS // shard_documents)
    for path in sorted((tmp_path / "out").iterdir()):
        own = {chunk.doc_id for chunk in read_shard(tmp_path / "chunks" / "em" / path.name, Chunk)}
        assert {sample.doc_id for sample in read_shard(path, Sample)} == own
    assert measured["samples"] == 3 * measured["chunks"] == len(whole.samples())


def test_a_killed_stage_goes_on_where_it_was(
    whole: Stage, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards are done when it dies; the next run makes the third, and the result is that of
    an undisturbed one."""
    stage = Stage(tmp_path, base_folder, 3)
    asked: list[set[str]] = []
    real = EStep.run

    def dies(self: EStep, found: Sequence[Item], draws: int, known: Any) -> list[list[Sample]]:
        asked.append({item.doc_id for item in found})
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, found, draws, known)

    monkeypatch.setattr(EStep, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    measured = stage.run()
    assert len(asked) == 4
    assert asked[3] == asked[2]
    assert drawn(stage.samples()) == drawn(whole.samples())
    assert measured["chunks"] == len(whole.samples()) / 3
    stage.run()
    assert len(asked) == 4


@pytest.mark.parametrize("change", [{"seed": 2}, {"max_latent_tokens": 5}, {"context_chunks": 0}])
def test_other_settings_make_other_work(
    base_folder: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    """Work that was done with another seed, K, limit or context must not be taken for this one's;
    going back finds the first work again."""
    stage = Stage(tmp_path, base_folder, 100)
    stage.run()
    first = stage.samples()
    stage.params |= change
    stage.run()
    second = stage.samples()
    assert drawn(second) != drawn(first)
    stage.params |= {key: params()[key] for key in change}
    assert stage.run()["seconds"] == 0
    assert stage.samples()[0].log_q == first[0].log_q


def test_another_k_takes_over_the_draws_that_are_there(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 5 after 3 draws two more a chunk, K = 2 none; both are what a fresh run of that K has."""
    asked: list[tuple[int, int]] = []
    real = TransformersSampler.sample

    def spy(self: Any, prompts: Any, keys: Any, draws: int, first: int = 0) -> Any:
        asked.append((first, draws))
        return real(self, prompts, keys, draws, first)

    monkeypatch.setattr(TransformersSampler, "sample", spy)
    stage = Stage(tmp_path / "one", base_folder, 100)
    stage.run()
    three = stage.samples()
    stage.params["k_samples"] = 5
    stage.run()
    five = stage.samples()
    stage.params["k_samples"] = 2
    stage.run()
    two = stage.samples()
    assert asked == [(0, 3), (3, 2)]
    assert [(s.tokens, s.log_q) for s in five if s.sample < 3] == [
        (s.tokens, s.log_q) for s in three
    ]
    for k, found in ((5, five), (2, two)):
        fresh = Stage(tmp_path / f"fresh{k}", base_folder, 100)
        fresh.params["k_samples"] = k
        fresh.run()
        assert drawn(fresh.samples()) == drawn(found)

"""The stage `evaluate` on a small corpus: its numbers recomputed, nothing measured twice."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from boltlm.corpus.chunks import Chunker, Chunking
from boltlm.corpus.split import split
from boltlm.errors import UserError
from boltlm.evaluation import backends, measure
from boltlm.evaluation.downstream import Answer
from boltlm.evaluation.measure import Places
from boltlm.model import checkpoint
from boltlm.params import load
from boltlm.records import Chunk, Document, Sample, read
from boltlm.sampling import engines
from boltlm.tokens import TextCoder
from tests import tiny


class Stage:
    """A split with two held-out corpora, and a model to measure on it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.params: dict[str, Any] = load(tiny.ROOT / "params.yaml")
        aside = {"documents": 5, "source": {"pages": "primer"}}
        self.params["corpora"] = {
            "heldout": {"documents": 8, "source": {"problems": "held_out"}},
            "aside": aside,
        }
        self.params["split"]["shard_documents"] = 3
        self.params["questions"]["count"] = 6
        self.params |= {"max_latent_tokens": 8, "context_chunks": 2}
        self.params["evaluate"] |= {"beside": ["aside"], "batch_size": 4, "thought_tokens": 6}
        self.params["models"] = {
            "one": {"format": "latent"},
            "raw": {"format": "raw"},
        }
        chunker = Chunker(
            Chunking(mean_sentences=1, least_sentences=1, most_sentences=2),
            TextCoder(model), 100, seed=1,
        )  # fmt: skip
        split(self.params, chunker, folder / "split", folder / "chunks")
        self.places = Places(
            model, folder / "split", folder / "chunks", folder / "work", folder / "out"
        )

    def run(self, name: str = "one") -> dict[str, float]:
        return measure.measure(self.params, name, self.places)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Stage:
    return Stage(tmp_path_factory.mktemp("measure"), base_folder)


@pytest.fixture(scope="module")
def measured(stage: Stage) -> dict[str, float]:
    return stage.run()


@pytest.mark.parametrize(("corpus", "prefix"), [("heldout", ""), ("aside", "aside/")])
def test_bounds_are_recomputed_from_the_stored_samples(
    stage: Stage, measured: dict[str, float], corpus: str, prefix: str
) -> None:
    """Twenty lines of float64 on the Parquet tables give every bound and its parts."""
    lengths = {
        (chunk.doc_id, chunk.chunk): len(chunk.tokens)
        for chunk in read(stage.places.chunks / corpus, Chunk)
    }
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in read(stage.places.out / "likelihood" / corpus, Sample):
        groups.setdefault((sample.doc_id, sample.chunk), []).append(sample)
    assert groups.keys() == lengths.keys()
    for size in (1, 2, 4):
        above = below = 0.0
        for key, group in groups.items():
            bounds = []
            for start in range(0, len(group), size):
                weights = [math.exp(s.log_weight) for s in group[start : start + size]]
                if sum(weights) > 0:
                    bounds.append(math.log(sum(weights) / size))
            if bounds:
                above += sum(bounds) / len(bounds)
                below += lengths[key]
        assert measured[f"{prefix}elbo_per_token_k{size}"] == pytest.approx(above / below, rel=1e-9)
    assert measured[f"{prefix}heldout_tokens"] == sum(lengths.values())


def test_nll_is_lm_evals_rolling_log_likelihood(stage: Stage, measured: dict[str, float]) -> None:
    """The same text and model through lm-eval's own loglikelihood_rolling, BOS before it."""
    model = backends.load("hf", stage.places.model, "float32", 4, 0.4)
    model.tok_encode = model.coder.encode  # no BOS: rolling puts it there itself
    model.custom_prefix_token_id = model.coder.markers.bos
    documents = list(read(stage.places.split / "heldout", Document))
    requests = [
        Instance("loglikelihood_rolling", {}, (one.text,), i) for i, one in enumerate(documents)
    ]
    nats = -np.sum(model.loglikelihood_rolling(requests, disable_tqdm=True))
    tokens = sum(len(model.coder.encode(one.text)) for one in documents)
    assert measured["nll_per_token"] == pytest.approx(nats / tokens, rel=1e-5)


def test_every_answer_can_be_audited(stage: Stage, measured: dict[str, float]) -> None:
    """Prompt, completion, what was read and the verdict of all questions in both spaces."""
    answers = list(read(stage.places.out / "answers", Answer))
    assert len(answers) == 2 * 6
    for space in ("latent", "raw"):
        mine = [one for one in answers if one.space == space]
        share = sum(one.correct for one in mine) / len(mine)
        assert measured[f"questions/standard/{space}/accuracy"] == share
        assert all(one.prompt and one.gold and one.grader == "number" for one in mine)
    assert all((one.thought is None) == (one.space == "raw") for one in answers)


def test_nothing_is_measured_twice(
    stage: Stage, measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all kept in the work folder no model is loaded: every way to one is shut."""

    def shut(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was asked again")

    for where, name in ((backends, "load"), (checkpoint, "load"), (engines, "run")):
        monkeypatch.setattr(where, name, shut)
    assert stage.run() == measured


def test_a_killed_evaluation_goes_on(
    tmp_path: Path, base_folder: Path, measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a task: what was done before stays done, the numbers are the same."""
    other = Stage(tmp_path, base_folder)

    asked: list[int] = []
    original = backends.Hf.generate_until

    def once(self: Any, requests: Any, **more: Any) -> Any:
        asked.append(len(requests))
        if len(asked) == 2:
            raise InterruptedError
        return original(self, requests, **more)

    monkeypatch.setattr(backends.Hf, "generate_until", once)
    with pytest.raises(InterruptedError):
        other.run()
    assert other.run() == pytest.approx(measured, nan_ok=True)
    assert asked == [6, 6, 6], "the first task was not asked again"


def test_raw_models_have_no_bound_and_are_asked_in_raw_space(stage: Stage) -> None:
    """What they never learnt is not measured, in the metrics or the tables."""
    folder = stage.places.out.with_name("raw")
    places = replace(stage.places, out=folder)
    found = measure.measure(stage.params, "raw", places)
    assert "elbo_per_token" not in found
    assert {one.space for one in read(folder / "answers", Answer)} == {"raw"}
    assert not any("latent" in one.prompt for one in read(folder / "answers", Answer))
    json.dumps(found)


def test_what_cannot_be_measured_is_an_error(stage: Stage) -> None:
    """A corpus that is not there, a task without data, no questions: one line that says so."""
    for changes, told in (
        ({"beside": ["none"]}, "'none', which no stage made"),
        ({"tasks": ["gsm8k/standard/raw"]}, "benchmarks.gsm8k"),
        ({"tasks": ["gsm8k/raw"]}, "not of the form"),
        ({"backend": "tpu"}, "hf | vllm"),
        ({"k_samples": []}, "1 or more"),
    ):
        params = {**stage.params, "evaluate": {**stage.params["evaluate"], **changes}}
        with pytest.raises(UserError, match=told.replace("|", r"\|")):
            measure.measure(params, "one", stage.places)

"""The stage `evaluate` on a small corpus: recomputed metrics, cached work, and errors."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from boltlm import checkpoint
from boltlm.corpus.chunker import Chunker
from boltlm.corpus.chunks import ChunkingConfig
from boltlm.corpus.split import SplitSettings, split_corpora
from boltlm.errors import UserError
from boltlm.estep import executors
from boltlm.evaluation import backends, run
from boltlm.evaluation.config import BaseEvaluateSettings, EvaluateSettings
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.finetune_config import FinetuneSettings
from boltlm.evaluation.run import EvaluationPaths
from boltlm.params import build_settings, load, settings_keys
from boltlm.records import Chunk, Document, Question, Sample, read_table, write_shard
from boltlm.tokens import TextCoder
from tests import tiny


class Stage:
    """A split with two held-out corpora, and a model to evaluate on it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.params: dict[str, Any] = load(tiny.ROOT / "params.yaml")
        self.params["corpora"] = {
            "heldout": {"documents": 8, "source": {"problems": "held_out"}},
            "extra": {"documents": 5, "source": {"pages": "primer"}},
        }
        self.params["split"]["shard_documents"] = 3
        self.params["questions"]["count"] = 6
        self.params |= {"max_latent_tokens": 8, "context_chunks": 2}
        self.params["evaluate"] |= {
            "extra_corpora": ["extra"],
            "batch_size": 4,
            "max_thought_tokens": 6,
            "large_k": {"k_samples": 8, "documents": 4},
        }
        entry = {"parent": "base", "corpus": "extra", "mix_corpus": "extra", "data": "split/extra"}
        self.params["models"] = {"one": entry, "raw": {**entry, "format": "raw"}}
        chunking = ChunkingConfig(
            mean_sentences=1, min_sentences=1, max_sentences=2, from_source=()
        )
        split_corpora(
            build_settings(SplitSettings, self.params),
            Chunker(chunking, TextCoder(model), 100, seed=1),
            work=folder / "work",
            split_dir=folder / "split",
            chunks_dir=folder / "chunks",
        )
        self.paths = EvaluationPaths(
            model,
            folder / "split",
            folder / "chunks",
            tiny.FEWSHOT,
            folder / "work",
            folder / "out",
        )

    def run(self, name: str = "one") -> dict[str, float]:
        settings = build_settings(EvaluateSettings, self.params, name=name)
        return run.evaluate_model(settings, self.paths)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Stage:
    return Stage(tmp_path_factory.mktemp("evaluate"), base_folder)


@pytest.fixture(scope="module")
def metrics(stage: Stage) -> dict[str, float]:
    return stage.run()


@pytest.mark.parametrize(("corpus", "prefix"), [("heldout", ""), ("extra", "extra/")])
def test_bounds_are_recomputed_from_the_stored_samples(
    stage: Stage, metrics: dict[str, float], corpus: str, prefix: str
) -> None:
    """Twenty lines of float64 on the Parquet tables give every bound."""
    lengths = {
        (chunk.doc_id, chunk.chunk): len(chunk.tokens)
        for chunk in read_table(stage.paths.chunks / corpus, Chunk)
    }
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in read_table(stage.paths.out / "likelihood" / corpus, Sample):
        groups.setdefault((sample.doc_id, sample.chunk), []).append(sample)
    assert groups.keys() == lengths.keys()
    for size in (1, 2, 4):
        numerator = denominator = 0.0
        for key, group in groups.items():
            bounds = []
            for start in range(0, len(group), size):
                weights = [math.exp(s.log_weight) for s in group[start : start + size]]
                bounds.append(math.log(sum(weights) / size))
            numerator += sum(bounds) / len(bounds)
            denominator += lengths[key]
        elbo = metrics[f"{prefix}elbo_per_token_k{size}"]
        assert elbo == pytest.approx(numerator / denominator, rel=1e-9)
    assert metrics[f"{prefix}heldout_tokens"] == sum(lengths.values())


def test_nll_is_lm_evals_rolling_log_likelihood(stage: Stage, metrics: dict[str, float]) -> None:
    """The same text and model through lm-eval's own loglikelihood_rolling, after BOS."""
    model = backends.load_lm("hf", stage.paths.model, "float32", 4, 0.4)
    model.tok_encode = model.coder.encode  # without BOS, which lm-eval adds itself
    model.custom_prefix_token_id = model.coder.special_tokens.bos
    documents = list(read_table(stage.paths.split / "heldout", Document))
    requests = [
        Instance("loglikelihood_rolling", {}, (document.text,), i)
        for i, document in enumerate(documents)
    ]
    nll = -np.sum(model.loglikelihood_rolling(requests, disable_tqdm=True))
    tokens = sum(len(model.coder.encode(document.text)) for document in documents)
    assert metrics["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-5)


def test_the_bound_with_a_large_k(stage: Stage, metrics: dict[str, float]) -> None:
    """On the first documents, beside the usual K from the same draws, the first of which are those
    of the whole corpus."""
    tables = {name: stage.paths.out / name / "heldout" for name in ("likelihood", "large_k")}
    small, large = (
        {(s.doc_id, s.chunk, s.sample): s for s in read_table(table, Sample)}
        for table in tables.values()
    )
    first_documents = list(dict.fromkeys(doc_id for doc_id, _, _ in small))[:4]
    assert list(dict.fromkeys(doc_id for doc_id, _, _ in large)) == first_documents
    shared = [key for key in small if key in large]
    assert len(shared) == len(large) / 2
    assert all(small[key].tokens == large[key].tokens for key in shared)
    assert metrics["subset/documents"] == 4
    assert metrics["subset/elbo_per_token"] == metrics["subset/elbo_per_token_k8"]
    assert metrics["subset/elbo_per_token_k8"] > metrics["subset/elbo_per_token_k4"]


def test_every_answer_is_stored(stage: Stage, metrics: dict[str, float]) -> None:
    """Prompt, completion, extracted answer and verdict of all questions in all spaces, for each cue
    where there are cues; with the cluster of the question."""
    answers = list(read_table(stage.paths.out / "answers", TaskAnswer))
    assert len(answers) == 4 * 6
    questions = read_table(stage.paths.split / "questions", Question)
    clusters = {question.question_id: question.cluster for question in questions}
    assert all(clusters[answer.question_id] == answer.cluster for answer in answers)
    for space in ("latent", "raw"):
        in_space = [answer for answer in answers if answer.space == space]
        accuracy = sum(answer.correct for answer in in_space) / len(in_space)
        assert metrics[f"questions/standard/{space}/accuracy"] == accuracy
        assert all(a.prompt and a.gold and a.grader == "number" for a in in_space)
    assert all((answer.thought is None) == (answer.space == "raw") for answer in answers)


def test_nothing_is_computed_twice(
    stage: Stage, metrics: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is in the work folder, so no model is loaded: every way of doing so is blocked."""

    def blocked(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(backends, "load_lm", blocked)
    monkeypatch.setattr(checkpoint, "load_model", blocked)
    monkeypatch.setattr(executors, "execute_shards", blocked)
    assert stage.run() == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)


def test_an_interrupted_evaluation_resumes(
    tmp_path: Path, base_folder: Path, metrics: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the second task: the first one is not repeated, and the metrics are equal."""
    other = Stage(tmp_path, base_folder)

    calls: list[int] = []
    original = backends.HFModel.generate_until

    def interrupted_once(self: Any, requests: Any, **options: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 2:
            raise InterruptedError
        return original(self, requests, **options)

    monkeypatch.setattr(backends.HFModel, "generate_until", interrupted_once)
    with pytest.raises(InterruptedError):
        other.run()
    assert other.run() == pytest.approx(metrics, nan_ok=True)
    assert calls == [6, 6, 6, 12], "the first task was answered again"


def test_raw_models_have_no_bound_and_answer_in_raw_space(stage: Stage) -> None:
    """Neither metrics nor tables contain what the model was not trained for."""
    folder = stage.paths.out.with_name("raw")
    settings = build_settings(EvaluateSettings, stage.params, name="raw")
    raw_metrics = run.evaluate_model(settings, replace(stage.paths, out=folder))
    assert "elbo_per_token" not in raw_metrics
    spaces = {answer.space for answer in read_table(folder / "answers", TaskAnswer)}
    assert spaces == {"raw", "cot"}
    assert not any("latent" in a.prompt for a in read_table(folder / "answers", TaskAnswer))
    json.dumps(raw_metrics)
    settings = build_settings(BaseEvaluateSettings, stage.params, name="base")
    assert run.evaluate_model(settings, replace(stage.paths, out=folder)) == pytest.approx(
        raw_metrics, nan_ok=True
    )


def test_answers_of_an_earlier_run_are_removed(stage: Stage, metrics: dict[str, float]) -> None:
    """With fewer tasks, the output does not retain the answers of the others."""
    assert metrics
    out = stage.paths.out.with_name("fewer")
    both = ["questions/standard/raw", "questions/standard/latent"]
    for tasks in (both, both[1:]):
        evaluate = {**stage.params["evaluate"], "tasks": tasks}
        settings = build_settings(
            EvaluateSettings, {**stage.params, "evaluate": evaluate}, name="one"
        )
        run.evaluate_model(settings, replace(stage.paths, out=out))
        spaces = [answer.space for answer in read_table(out / "answers", TaskAnswer)]
        assert set(spaces) == {task.rpartition("/")[2] for task in tasks}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra_corpora": ["none"]}, "evaluate.extra_corpora[0] must name an entry of corpora"),
        ({"tasks": ["gsm8k/standard/raw"]}, "there is no key benchmarks.gsm8k"),
        ({"tasks": ["gsm8k/raw"]}, "evaluate.tasks: 'gsm8k/raw' is not of the form"),
        ({"backend": "tpu"}, "evaluate.backend must be hf | vllm"),
        ({"k_samples": []}, "k_samples must not be empty"),
        ({"large_k": {"k_samples": 4, "documents": 1}}, "large_k.k_samples must be above"),
        ({"cues": []}, "cues must not be empty"),
        ({"tasks": ["gsm8k/standard/cot"]}, "the space 'cot' is for the task 'questions'"),
        ({"k_samples": [0]}, "evaluate.k_samples[0] must be 1 or more"),
        ({"limit": 0}, "evaluate.limit must be 1 or more"),
    ],
)
def test_invalid_params(changes: dict[str, Any], message: str, stage: Stage) -> None:
    """An unknown corpus, a task without data or a wrong value is an error that names the key."""
    params = {**stage.params, "evaluate": {**stage.params["evaluate"], **changes}}
    with pytest.raises(UserError, match=re.escape(message)):
        build_settings(EvaluateSettings, params, name="one")


def test_questions_are_needed_before_any_work(stage: Stage, tmp_path: Path) -> None:
    """A split without questions is an error that says what to change, before a model is loaded."""
    write_shard(tmp_path / "split" / "questions" / "00000.parquet", Question, [])
    paths = replace(stage.paths, split=tmp_path / "split", work=tmp_path / "work")
    settings = build_settings(EvaluateSettings, stage.params, name="one")
    with pytest.raises(UserError, match=r"questions\.count is 0"):
        run.evaluate_model(settings, paths)
    assert not paths.work.exists()


def test_every_key_of_the_section_finetune_is_read() -> None:
    """Each key of `finetune` is a field of the settings; of `runs` each run reads its own."""
    keys = {key for key in settings_keys(FinetuneSettings) if key.startswith("finetune.")}
    section = load(tiny.ROOT / "params.yaml")["finetune"]
    assert keys == {f"finetune.{key}" for key in section if key != "runs"} | {
        "finetune.runs.{name}"
    }

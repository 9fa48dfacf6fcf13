"""The cache of generated answers: what it returns, how samples are seeded, and interruptions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from boltlm import checkpoint
from boltlm.evaluation import backends
from boltlm.evaluation import finetune as stage
from boltlm.evaluation.generation_cache import BATCHES_PER_WRITE, CachedLM
from boltlm.tokens import SPECIAL_TOKENS
from boltlm.training import checkpointing
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.metrics_logger import MetricsLogger
from tests import tiny
from tests.evaluation.test_finetune import SmallStage

GREEDY = {"until": [], "max_gen_toks": 4, "do_sample": False}
SAMPLED = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 0}
BATCH_SIZE = 2
SLICE_SIZE = BATCHES_PER_WRITE * BATCH_SIZE
PROMPTS = [f"question {index:02d}" for index in range(19)]
SEED = 3


def make_requests(*prompts: str, settings: dict[str, Any] = GREEDY) -> list[Any]:
    """Requests as lm-eval makes them."""
    return [SimpleNamespace(args=(prompt, settings)) for prompt in prompts]


class CountingLM:
    """Answers with the prompt, its seed, and the number of its earlier answers. It is interrupted
    after `max_slices` slices."""

    def __init__(self, max_slices: int | None = None) -> None:
        self.seed, self.forbidden, self.max_slices = 0, (), max_slices
        self.slices: list[list[str]] = []

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        if len(self.slices) == self.max_slices:
            raise KeyboardInterrupt
        count = sum(map(len, self.slices))
        self.slices.append([request.args[0] for request in requests])
        return [f"{p} {self.seed} {count + i}" for i, p in enumerate(self.slices[-1])]


OpenCache = Callable[..., CachedLM]


@pytest.fixture
def open_cache(tmp_path: Path) -> OpenCache:
    """Opens the cache file as a new process does, around a model or around one that must not be
    loaded."""

    def open_file(model: Any = None, *, name: str = "a", seed: int = SEED) -> CachedLM:
        def load_lm() -> Any:
            assert model is not None, "the model was loaded"
            return model

        path = tmp_path / "answers" / f"{name}.jsonl"
        return CachedLM(
            load_lm, path, label="tests", seed=seed, batch_size=BATCH_SIZE, forbidden=(3, 8)
        )

    return open_file


def truncate(path: Path, characters: int) -> None:
    """Keep only the first characters of a file."""
    path.write_text(path.read_text("utf-8")[:characters], encoding="utf-8")


def test_cached_answers_are_not_generated_again(open_cache: OpenCache) -> None:
    """Answers are returned for their own prompts, in any order and among new ones. The model gets
    the forbidden tokens, and is not loaded where no answer is missing."""
    first = open_cache(CountingLM()).generate_until(make_requests("one", "three", "seven"))
    assert [answer.split()[0] for answer in first] == ["one", "three", "seven"]
    model = CountingLM()
    mixed = open_cache(model).generate_until(make_requests("seven", "new", "one"))
    assert model.slices == [["new"]]
    assert model.forbidden == (3, 8)
    assert (mixed[0], mixed[2]) == (first[2], first[0])
    again = open_cache().generate_until(make_requests("one", "new", "three", "seven"))
    assert again == [first[0], mixed[1], first[1], first[2]]


def test_other_settings_are_another_request(open_cache: OpenCache) -> None:
    """An answer of four tokens is not one of six, and a greedy answer is not a sample."""
    open_cache(CountingLM()).generate_until(make_requests("one"))
    for change in ({"max_gen_toks": 6}, {"do_sample": True}, {"until": ["\n"]}):
        model = CountingLM()
        open_cache(model).generate_until(make_requests("one", settings=GREEDY | change))
        assert model.slices == [["one"]], change


def test_a_repeated_request_is_another_sample(open_cache: OpenCache) -> None:
    """Three samples of a prompt are distinct, also when they are read back; a fourth is new."""
    requests = make_requests("one", "two", "one", "one")
    answers = open_cache(CountingLM()).generate_until(requests)
    assert len(set(answers)) == 4
    assert open_cache().generate_until(requests) == answers
    model = CountingLM()
    assert open_cache(model).generate_until([*requests, *make_requests("one")])[:4] == answers
    assert model.slices == [["one"]]


def test_an_empty_prompt_has_an_empty_answer(open_cache: OpenCache) -> None:
    """It stands for a question that does not fit into the context window."""
    assert open_cache().generate_until(make_requests("", "")) == ["", ""]
    model = CountingLM()
    answers = open_cache(model).generate_until(make_requests("", "one", ""))
    assert answers == ["", answers[1], ""]
    assert model.slices == [["one"]]


def test_unusual_answers_are_read_back_unchanged(open_cache: OpenCache) -> None:
    """Line separators, quotation marks and characters outside ASCII do not damage the file."""
    unusual = ['a\nb\r\n"c" \\ \u2028\x85\x0c', "", "[1, 2]", "−½ 語 \ud83d"]
    model = CountingLM()
    model.generate_until = lambda requests, **_: unusual[: len(requests)]
    requests = make_requests("1", "2", "3", "4")
    assert open_cache(model).generate_until(requests) == unusual
    assert open_cache().generate_until(requests) == unusual


def test_an_interruption_loses_no_complete_slice(open_cache: OpenCache) -> None:
    """After an interruption in the third slice, the first two are in the file, and the others get
    the seeds that they have without an interruption."""
    expected = open_cache(CountingLM(), name="expected").generate_until(make_requests(*PROMPTS))
    interrupted = CountingLM(max_slices=2)
    with pytest.raises(KeyboardInterrupt):
        open_cache(interrupted).generate_until(make_requests(*PROMPTS))
    assert [len(prompts) for prompts in interrupted.slices] == [SLICE_SIZE, SLICE_SIZE]
    model = CountingLM()
    answers = open_cache(model).generate_until(make_requests(*PROMPTS))
    assert model.slices == [PROMPTS[2 * SLICE_SIZE :]]
    assert [a.split()[:3] for a in answers] == [a.split()[:3] for a in expected]


def test_an_incomplete_line_is_generated_again(open_cache: OpenCache) -> None:
    """And nothing of an earlier slice."""
    cache = open_cache(CountingLM())
    answers = cache.generate_until(make_requests(*PROMPTS))
    truncate(cache.path, len(cache.path.read_text("utf-8")) - 3)
    model = CountingLM()
    again = open_cache(model).generate_until(make_requests(*PROMPTS))
    assert model.slices == [PROMPTS[2 * SLICE_SIZE :]]
    assert again[: 2 * SLICE_SIZE] == answers[: 2 * SLICE_SIZE]


@pytest.mark.parametrize("offset", [0, 5])
def test_lines_after_an_incomplete_one_count(offset: int, open_cache: OpenCache) -> None:
    """The next answers are written to a line of their own, so a third run generates nothing. The
    file is truncated right before (0) or after (5) the end of a line."""
    cache = open_cache(CountingLM())
    cache.generate_until(make_requests(*PROMPTS))
    text = cache.path.read_text("utf-8")
    truncate(cache.path, text.index("\n", len(text) // 2) + offset)
    again = open_cache(CountingLM()).generate_until(make_requests(*PROMPTS))
    assert open_cache().generate_until(make_requests(*PROMPTS)) == again


def test_a_repeated_slice_has_the_same_seed(open_cache: OpenCache) -> None:
    """Wherever the file is truncated, the slices that are generated again have the seeds of a run
    without an interruption, and hence the same samples."""
    cache = open_cache(CountingLM())
    expected = cache.generate_until(make_requests(*PROMPTS))
    size = len(cache.path.read_text("utf-8"))
    for fraction in (0.2, 0.5, 0.7):
        truncate(cache.path, int(fraction * size))
        again = open_cache(CountingLM()).generate_until(make_requests(*PROMPTS))
        assert [a.split()[2] for a in again] == [a.split()[2] for a in expected]


@pytest.fixture(scope="module")
def tiny_lm(base_folder: Path) -> Any:
    return backends.load_lm("hf", base_folder, "float32", BATCH_SIZE, 0.1)


def test_no_two_samples_share_random_numbers(open_cache: OpenCache, tiny_lm: Any) -> None:
    """One prompt in many batches of three slices, with a nearly uniform model: if batches or slices
    started from the same state of the generator, answers would repeat."""
    prompts = ["Ann turns a dial"] * (2 * SLICE_SIZE + 3)
    answers = open_cache(tiny_lm).generate_until(make_requests(*prompts, settings=SAMPLED))
    assert len(set(answers)) == len(answers)


def test_samples_depend_on_the_seed(open_cache: OpenCache, tiny_lm: Any) -> None:
    """The same seed gives the same samples, another seed others."""
    requests = make_requests("Ann turns a dial", "Ben", "Cara is", settings=SAMPLED)
    first, repeated, other = (
        open_cache(tiny_lm, name=name, seed=seed).generate_until(requests)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == repeated
    assert not set(first) & set(other)


def test_forbidden_tokens_are_set_for_each_cache(open_cache: OpenCache, tiny_lm: Any) -> None:
    """The next task may use the same model without forbidden tokens."""
    special = tiny_lm.coder.special_tokens
    for forbidden in ((special.sol, special.eol, special.prior, special.post), ()):
        cache = open_cache(tiny_lm, name=str(len(forbidden)))
        cache.forbidden = forbidden
        settings = SAMPLED | {"max_gen_toks": 60}
        answers = cache.generate_until(make_requests(*["Ann"] * 8, settings=settings))
        has_special = any(token in answer for token in SPECIAL_TOKENS for answer in answers)
        assert has_special == (not forbidden)


class KilledError(Exception):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise KilledError


@pytest.fixture
def small(base_folder: Path, tmp_path: Path) -> SmallStage:
    return SmallStage(tmp_path, base_folder)


def test_the_stage_may_die_anywhere(small: SmallStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies once at each checkpoint, file, slice of answers and removal. Each time it is resumed,
    and it ends with the metrics and answers of a run that was not interrupted."""
    expected = small.run("expected")
    deaths: list[str] = []

    def die_once_each(owner: Any, name: str, event: Callable[..., object]) -> None:
        original = getattr(owner, name)

        def dying(*arguments: Any, **options: Any) -> Any:
            death = f"{name} {event(*arguments)}"
            if death not in deaths:
                deaths.append(death)
                raise KilledError
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, dying)

    for module in (stage, checkpointing):
        die_once_each(module, "mark_complete", lambda path: path.parent.name + path.name)
    die_once_each(checkpoint, "save_model", lambda _, out, *__: out.parent.name)
    die_once_each(stage, "write_shard", lambda path, *_: path.parent.name + path.name)
    die_once_each(shutil, "rmtree", lambda path, **_: path)
    die_once_each(backends.HFModel, "_model_generate", lambda model, *_, **__: model.seed)
    die_once_each(MetricsLogger, "add", lambda logger, *_, **__: logger.step // 9)
    for _ in range(99):
        with suppress(KilledError):
            assert small.run() == expected
            break
    else:
        pytest.fail("it never finishes")
    assert len({death.split()[0] for death in deaths}) == 6
    assert len(deaths) > 24


def test_no_model_remains_after_a_kill(small: SmallStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after its answers, or before its checkpoints are removed, and is then
    resumed, leaves neither weights nor checkpoints in the work folder: for every seed they are
    larger than the model."""
    for owner, name in ((shutil, "rmtree"), (CheckpointManager, "clear")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KilledError):
                small.run(name)
        small.run(name)
        suffixes = {path.suffix for path in (small.folder / name).rglob("*.*")}
        assert not {".safetensors", ".pt"} & suffixes


def test_sigkill_of_the_stage(small: SmallStage) -> None:
    """Killed in the second seed's training and resumed by another process, it ends with the results
    of a run that was not interrupted."""
    small.params["finetune"] |= {"epochs": 30}
    (small.folder / "params.yaml").write_text(yaml.safe_dump(small.params))
    paths = small.paths("work")
    command = [sys.executable, str(tiny.ROOT / "stages" / "finetune.py"), "--name", "one"]
    for flag in ("model", "split", "data", "work", "out"):
        command += [f"--{flag}", str(getattr(paths, flag))]
    command += ["--params", str(small.folder / "params.yaml"), "--metrics", str(small.folder / "m")]
    env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OMP_NUM_THREADS": "1"}
    env.pop("DVC_ROOT", None)
    process = subprocess.Popen(command, env=env)
    try:
        while not list(paths.work.glob("finetune/*/seed-2/steps/step-*.sha256")):
            assert process.poll() is None, "the stage ended before it was killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not paths.out.exists()
    assert small.run() == small.run("expected")

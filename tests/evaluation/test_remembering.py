"""Answers that are kept: nothing is asked twice, no draw is another's, a kill costs a slice."""

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

from boltlm import engine
from boltlm.evaluation import backends
from boltlm.evaluation import finetune as stage
from boltlm.evaluation.remembering import SLICE, Remembering
from boltlm.model import checkpoint
from boltlm.model.curve import Curve
from boltlm.model.resume import Checkpoints
from boltlm.tokens import MARKERS
from tests import tiny
from tests.evaluation.test_finetune import Small

GREEDY = {"until": [], "max_gen_toks": 4, "do_sample": False}
DRAWN = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_k": 0}
BATCH = 2
SEED = 3
WAIT_SECONDS = 100.0


def asked(*prompts: str, settings: dict[str, Any] = GREEDY) -> list[Any]:
    """Requests as lm-eval makes them."""
    return [SimpleNamespace(args=(prompt, settings)) for prompt in prompts]


class Model:
    """Says the prompt, the seed, and how many it has said before; dies after `last` slices."""

    def __init__(self, last: int | None = None) -> None:
        self.seed, self.forbidden, self.last = 0, (), last
        self.slices: list[list[str]] = []

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        if len(self.slices) == self.last:
            raise KeyboardInterrupt
        before = sum(map(len, self.slices))
        self.slices.append([request.args[0] for request in requests])
        return [f"{p} {self.seed} {before + i}" for i, p in enumerate(self.slices[-1])]


Remember = Callable[..., Remembering]


@pytest.fixture
def remember(tmp_path: Path) -> Remember:
    """A new process around a model, or around none that could be loaded, over the same file."""

    def make(model: Any = None, *, file: str = "a", seed: int = SEED) -> Remembering:
        def load() -> Any:
            assert model is not None, "the model is loaded"
            return model

        path = tmp_path / "answers" / f"{file}.jsonl"
        return Remembering(load, path, what="tests", seed=seed, batch_size=BATCH, forbidden=(3, 8))

    return make


def cut(remembering: Remembering, characters: int) -> None:
    """Leave so many characters of the file."""
    text = remembering.path.read_text("utf-8")
    remembering.path.write_text(text[:characters], encoding="utf-8")


def test_what_is_known_is_not_asked_again(remember: Remember) -> None:
    """Answers come back to their own questions, whatever the order and whatever is new; a model
    is told what it must not draw, and is not loaded where there is nothing to ask."""
    first = remember(Model()).generate_until(asked("one", "three", "seven"))
    assert [answer.split()[0] for answer in first] == ["one", "three", "seven"]
    mixed = remember(model := Model()).generate_until(asked("seven", "new", "one"))
    assert model.slices == [["new"]]
    assert model.forbidden == (3, 8)
    assert (mixed[0], mixed[2]) == (first[2], first[0])
    again = remember().generate_until(asked("one", "new", "three", "seven"))
    assert again == [first[0], mixed[1], first[1], first[2]]


def test_other_settings_are_another_question(remember: Remember) -> None:
    """An answer of four tokens is none of six; a greedy one is no draw."""
    remember(Model()).generate_until(asked("one"))
    for change in ({"max_gen_toks": 6}, {"do_sample": True}, {"until": ["\n"]}):
        remember(model := Model()).generate_until(asked("one", settings=GREEDY | change))
        assert model.slices == [["one"]], change


def test_the_same_request_again_is_another_draw(remember: Remember) -> None:
    """Three samples of a question stay apart, also when they are read back; a fourth is new."""
    three = asked("one", "two", "one", "one")
    found = remember(Model()).generate_until(three)
    assert len(set(found)) == 4
    assert remember().generate_until(three) == found
    model = Model()
    assert remember(model).generate_until([*three, *asked("one")])[:4] == found
    assert model.slices == [["one"]]


def test_an_empty_prompt_is_not_asked(remember: Remember) -> None:
    """It stands for a question for which the window has no room: its answer is empty."""
    assert remember().generate_until(asked("", "")) == ["", ""]
    found = remember(model := Model()).generate_until(asked("", "one", ""))
    assert found == ["", found[1], ""]
    assert model.slices == [["one"]]


def test_odd_answers_are_read_back_as_they_are(remember: Remember) -> None:
    """Whatever splits lines, quotes or is no ASCII: the file holds a line an answer."""
    odd = ['a\nb\r\n"c" \\ \u2028\x85\x0c', "", "[1, 2]", "−½ 語 \ud83d"]
    model = Model()
    model.generate_until = lambda requests, **_: odd[: len(requests)]
    questions = asked("1", "2", "3", "4")
    assert remember(model).generate_until(questions) == odd
    assert remember().generate_until(questions) == odd


PROMPTS = [f"question {place:02d}" for place in range(19)]
SLICE_SIZE = SLICE * BATCH


def test_a_kill_between_slices_loses_nothing(remember: Remember) -> None:
    """It dies in the third slice: the two before it are on the disk, and what it goes on with has
    the seeds that it would have had."""
    whole = remember(Model(), file="whole").generate_until(asked(*PROMPTS))
    dying = Model(last=2)
    with pytest.raises(KeyboardInterrupt):
        remember(dying).generate_until(asked(*PROMPTS))
    assert [len(one) for one in dying.slices] == [SLICE_SIZE, SLICE_SIZE]
    found = remember(model := Model()).generate_until(asked(*PROMPTS))
    assert model.slices == [PROMPTS[2 * SLICE_SIZE :]]
    assert [one.split()[:3] for one in found] == [one.split()[:3] for one in whole]


def test_a_torn_line_is_asked_again(remember: Remember) -> None:
    """And nothing else of an earlier slice."""
    one = remember(Model())
    found = one.generate_until(asked(*PROMPTS))
    cut(one, len(one.path.read_text("utf-8")) - 3)
    again = remember(model := Model()).generate_until(asked(*PROMPTS))
    assert model.slices == [PROMPTS[-1:]] or model.slices == [PROMPTS[16:]]
    assert again[:16] == found[:16]


@pytest.mark.parametrize("more", [0, 5])
def test_nothing_is_lost_behind_a_torn_line(more: int, remember: Remember) -> None:
    """The line that follows a torn one begins on a line of its own: a third run asks nothing.
    0: torn right before its end; 5: within it."""
    one = remember(Model())
    one.generate_until(asked(*PROMPTS))
    text = one.path.read_text("utf-8")
    cut(one, text.index("\n", len(text) // 2) + more)
    again = remember(Model()).generate_until(asked(*PROMPTS))
    assert remember().generate_until(asked(*PROMPTS)) == again


def test_a_torn_slice_is_drawn_as_it_would_have_been(remember: Remember) -> None:
    """A machine that goes down tears the file anywhere: the seeds of the slices that are asked
    again are those of a run that was left alone, and so are the draws."""
    one = remember(Model())
    whole = one.generate_until(asked(*PROMPTS))
    text = one.path.read_text("utf-8")
    for share in (0.2, 0.5, 0.7):
        cut(one, int(share * len(text)))
        again = remember(Model()).generate_until(asked(*PROMPTS))
        assert [line.split()[2] for line in again] == [line.split()[2] for line in whole]


@pytest.fixture(scope="module")
def tiny_model(base_folder: Path) -> Any:
    return backends.load("hf", base_folder, "float32", BATCH, 0.1)


def test_no_two_draws_share_their_random_numbers(remember: Remember, tiny_model: Any) -> None:
    """One prompt in many batches of three slices, under a model that is nearly uniform: were the
    generator set to the same state for each batch or slice, draws would come again."""
    found = remember(tiny_model).generate_until(
        asked(*["Ann turns a dial"] * (2 * SLICE_SIZE + 3), settings=DRAWN)
    )
    assert len(set(found)) == len(found)


def test_a_seed_gives_its_draws(remember: Remember, tiny_model: Any) -> None:
    """The same again for the same seed, others for another: all seeds' measures hang on it."""
    questions = asked("Ann turns a dial", "Ben", "Cara is", settings=DRAWN)
    found = [
        remember(tiny_model, file=name, seed=seed).generate_until(questions)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_what_is_forbidden_is_never_drawn(remember: Remember, tiny_model: Any) -> None:
    """The next task asks the same model with none forbidden, so that must be told anew."""
    m = tiny_model.coder.markers
    for forbidden in ((m.sol, m.eol, m.prior, m.post), ()):
        one = remember(tiny_model, file=str(len(forbidden)))
        one.forbidden = forbidden
        found = one.generate_until(asked(*["Ann"] * 8, settings=DRAWN | {"max_gen_toks": 60}))
        assert any(marker in answer for marker in MARKERS for answer in found) == (not forbidden)


class KilledError(Exception):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise KilledError


@pytest.fixture
def small(base_folder: Path, tmp_path: Path) -> Small:
    return Small(tmp_path, base_folder)


def test_it_may_die_at_every_turn(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at each checkpoint, file, slice of answers and clean-up; what is left then goes on, and
    ends with the metrics and answers of a run that was left alone."""
    whole = small.run("whole")
    died: list[str] = []

    def dies_once_for_each(owner: Any, name: str, what: Callable[..., object]) -> None:
        original = getattr(owner, name)

        def dying(*args: Any, **named: Any) -> Any:
            place = f"{name} {what(*args)}"
            if place not in died:
                died.append(place)
                raise KilledError
            return original(*args, **named)

        monkeypatch.setattr(owner, name, dying)

    dies_once_for_each(engine, "seal", lambda path: path.parent.name + path.name)
    dies_once_for_each(checkpoint, "save", lambda _, out, *__: out.parent.name)
    dies_once_for_each(stage, "write_shard", lambda path, *_: path.parent.name + path.name)
    dies_once_for_each(shutil, "rmtree", lambda path, **_: path)
    dies_once_for_each(backends.Hf, "_model_generate", lambda model, *_, **__: model.seed)
    dies_once_for_each(Curve, "add", lambda curve, *_, **__: curve.step // 9)
    for _ in range(99):
        with suppress(KilledError):
            assert small.run() == whole
            break
    else:
        pytest.fail("it dies of nothing new, again and again")
    assert len({place.split()[0] for place in died}) == 6
    assert len(died) > 24


def test_a_kill_leaves_no_model(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies when it has answered, or before its checkpoints are cleared, must not leave
    them in the work folder for good: they are as large as the model, and more, for every seed."""
    for owner, name in ((shutil, "rmtree"), (Checkpoints, "clear")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(KilledError):
                small.run(name)
        small.run(name)
        left = [path.suffix for path in (small.folder / name).rglob("*.*")]
        assert not {".safetensors", ".pt"} & set(left)


def test_sigkill_of_the_stage(small: Small) -> None:
    """In the second seed's training; the rest is done by another process, with the same end."""
    small.params["finetune"] |= {"epochs": 30}
    (small.folder / "params.yaml").write_text(yaml.safe_dump(small.params))
    places = small.places("work")
    command = [sys.executable, str(tiny.ROOT / "stages" / "finetune.py"), "--name", "one"]
    for flag in ("model", "split", "data", "work", "out"):
        command += [f"--{flag}", str(getattr(places, flag))]
    command += ["--params", str(small.folder / "params.yaml"), "--metrics", str(small.folder / "m")]
    env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OMP_NUM_THREADS": "1"}
    env.pop("DVC_ROOT", None)
    process = subprocess.Popen(command, env=env)
    until = time.monotonic() + WAIT_SECONDS
    while not list(places.work.glob("finetune/*/seed-2/steps/step-*.sha256")):
        assert process.poll() is None, "the stage was over before it was killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not places.out.exists() or len(list(places.out.iterdir())) == 1
    assert small.run() == small.run("whole")

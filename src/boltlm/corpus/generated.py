"""The embedded corpus: pages about dials whose sentences state results and hide the reckoning.

A dial has ten marks, 0 to 9, and goes round. A page tells of a few rounds:

    Ann turns a dial from 8: first up by 3, finally down by 2. It stops at 9.

The derivation that both sentences rest on is never written on the page; the generator knows it
and hands it out as each sentence's thought, the teacher's latent, in the page's own words:

    Dial from 8: first up by 3 to 1, finally down by 2 to 9.

`primer` pages are what a base model has read before: rounds of one step, derivations by
themselves, and, in a share of the passages, rounds together with their derivations.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from boltlm.errors import UserError
from boltlm.records import Document, Question
from boltlm.seeds import generator, uniform

MARKS = 10
NAMES = (
    *("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack"),
    *("Kim", "Leo", "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will"),
)
# Of two and of four tokens: as many as the special tokens and a result put between a round and
# its latent, so that the base model has looked back over such distances.
ASIDES = ("", "So.", "So it is.")
KEYS = ("first", "then", "next", "finally")
HELD_OUT_SHARE = 0.1
MOST_TRIES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """Params of `kind: generated`. `problems: held_out` tells only of rounds (start and steps)
    that no `train` page tells of; every tenth is held out."""

    kind: Literal["generated"]
    pages: Literal["reckoning", "primer"]
    problems: Literal["train", "held_out"]
    least_rounds: int
    most_rounds: int
    least_steps: int
    most_steps: int
    largest_step: int
    worked_share: float
    shuffle_buffer: int

    def __post_init__(self) -> None:
        if not 1 <= self.least_rounds <= self.most_rounds <= MARKS:
            raise UserError(f"least_rounds ≤ most_rounds must lie within 1 and {MARKS}")
        if not 1 <= self.least_steps <= self.most_steps:
            raise UserError("least_steps ≤ most_steps must be 1 or more")
        if not 1 <= self.largest_step < MARKS:
            raise UserError(f"largest_step must lie within 1 and {MARKS - 1}")


@dataclass(frozen=True, slots=True)
class Round:
    """A start mark and signed steps, the content of one problem, and who makes each step."""

    start: int
    steps: tuple[int, ...]
    name: str

    @property
    def marks(self) -> list[int]:
        """The mark after each step."""
        return [mark % MARKS for mark in itertools.accumulate(self.steps, initial=self.start)][1:]

    def told(self) -> str:
        turns = (f"{key} {turn(step)}" for key, step in zip(self._keys(), self.steps, strict=True))
        return f"{self.name} turns a dial from {self.start}: " + ", ".join(turns) + "."

    def result(self) -> str:
        return f"It stops at {self.marks[-1]}."

    def derivation(self) -> str:
        turns = (
            f"{key} {turn(step)} to {mark}"
            for key, step, mark in zip(self._keys(), self.steps, self.marks, strict=True)
        )
        return f"Dial from {self.start}: " + ", ".join(turns) + "."

    def _keys(self) -> tuple[str, ...]:
        return KEYS[: len(self.steps) - 1] + KEYS[-1:]


def turn(step: int) -> str:
    return f"{'up' if step > 0 else 'down'} by {abs(step)}"


def documents(config: Generated, seed: int) -> Iterator[Document]:
    """An endless stream of pages; page i depends on (seed, kind of page, i) alone."""
    index = 0
    while True:
        doc_id = f"{config.pages}-{config.problems}-{index:08d}"
        draw = generator(seed, "page", doc_id)
        page = _reckoning if config.pages == "reckoning" else _primer
        pieces = page(config, seed, draw)
        yield Document(
            doc_id=doc_id,
            text=" ".join(sentence for sentence, _ in pieces),
            source="generated",
            thoughts=tuple(thought for _, thought in pieces),
        )
        index += 1


def questions(config: Generated, seed: int) -> Iterator[Question]:
    """An endless stream of rounds told up to, and without, their result."""
    index = 0
    while True:
        question_id = f"question-{config.problems}-{index:08d}"
        draw = generator(seed, "question", question_id)
        asked = _round(config, seed, draw, int(draw.integers(MARKS)))
        yield Question(
            question_id=question_id,
            prompt=asked.told(),
            answer=str(asked.marks[-1]),
            latent=asked.derivation(),
        )
        index += 1


def _round(config: Generated, seed: int, draw: np.random.Generator, start: int) -> Round:
    """A round from `start` that this side of the hold-out may tell of. Raises UserError where
    there is none to be found."""
    for _ in range(MOST_TRIES):
        count = int(draw.integers(config.least_steps, config.most_steps + 1))
        sizes = draw.integers(1, config.largest_step + 1, size=count)
        steps = tuple((sizes * draw.choice((-1, 1), size=count)).tolist())
        held_out = uniform(seed, "held out", start, repr(steps)) < HELD_OUT_SHARE
        if held_out == (config.problems == "held_out"):
            return Round(start, steps, str(draw.choice(NAMES)))
    raise UserError(
        f"no '{config.problems}' round of {config.least_steps} to {config.most_steps} steps starts"
        f" at {start}; allow more or larger steps"
        + (", and let primer pages tell 'train' rounds" if config.pages == "primer" else "")
    )


def _rounds(config: Generated, seed: int, draw: np.random.Generator) -> list[Round]:
    count = int(draw.integers(config.least_rounds, config.most_rounds + 1))
    return [_round(config, seed, draw, int(draw.integers(MARKS))) for _ in range(count)]


def _reckoning(config: Generated, seed: int, draw: np.random.Generator) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    for one in _rounds(config, seed, draw):
        pieces += [(one.told(), one.derivation()), (one.result(), one.derivation())]
    return pieces


def _primer(config: Generated, seed: int, draw: np.random.Generator) -> list[tuple[str, str]]:
    """Rounds with their derivation before, amid or behind, perhaps after an aside; or, outside
    the share of worked passages, a derivation by itself or a round of one step."""
    short = replace(config, least_steps=1, most_steps=1)
    written: list[str] = []
    for one in _rounds(config, seed, draw):
        told, result, derivation = one.told(), one.result(), one.derivation()
        aside = str(draw.choice(ASIDES))
        orders = (
            [derivation, told, result],
            [told, aside, derivation, result],
            [told, result, aside, derivation],
        )
        single = _round(short, seed, draw, one.start)
        if draw.random() < config.worked_share:
            written += orders[int(draw.integers(3))]
        else:
            written += [single.told(), single.result()] if draw.random() < 0.5 else [derivation]
    return [(sentence, "") for sentence in written if sentence]

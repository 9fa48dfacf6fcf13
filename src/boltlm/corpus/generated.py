"""The embedded corpus: pages about dials that state results and hide the steps that lead to them.

A dial has ten marks, 0 to 9, and wraps around. A page of the kind `reckoning` states where the dial
starts, how it is turned, and where it stops:

    Ann turns a dial from 8: first 3, second 0, finally 4. It stops at 5.

The derivation gives the mark before and after each turn and is not part of the page. The generator
returns it as the thought of the second sentence, the reference latent of the teacher of kind
`dataset`; the first sentence needs no thought. Its wording varies ("to", "is", "makes"):

    Turns: first 3 from 8 to 1, second 0 from 1 makes 1, finally 4 from 1 is 5.

All pages have the same number of turns, but a turn may be by 0 marks; what makes a page hard is the
number of the others, its steps.

Pages of the kind `primer`, on which the base model is pretrained, have the parts of a derivation
but never a derivation: single turns with their results, and statements followed by a remark on each
of their turns. The first remark mostly begins where the dial is, the later ones mostly at a random
mark. A model of such pages copies start and turns of a statement and knows the result of every
turn; what the latents have to teach is that every turn starts where the dial then is.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from boltlm.errors import UserError
from boltlm.param_types import NonNegativeInt
from boltlm.records import Document, Question
from boltlm.seeds import generator, uniform

MARKS = 10
NAMES = (
    *("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jack"),
    *("Kim", "Leo", "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will"),
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
LAST = "finally"
LINKS = ("to", "is", "makes")
RESULT_STEM = "It stops at"
# Stand between a statement and its remarks, with as many tokens as what stands between a statement
# and its latent (two special tokens, or four and a result): the base model copies over both.
ASIDES = ("So.", "It stops at last. So it is.")
# Fractions of the primer's remarks that start where the dial then is, of the first and of later
# ones; the others start from a random mark.
IN_PLACE_FIRST, IN_PLACE_LATER = 0.85, 0.25
SINGLE_TURNS = 0.15  # fraction of the primer's pages that have a single turn, with its result
HELD_OUT_FRACTION = 0.2
MAX_TRIES = 10_000

Problem = tuple[int, tuple[int, ...]]  # start mark and turns


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedSource:
    """Generated pages; see the module's docstring for the two kinds of pages.

    `problems`: a problem is a start mark with its turns. `train` and `held_out` pages have no
    problem in common; about a fifth of all problems is held out, and no held-out problem occurs
    twice among the pages, nor among the questions. `turns`: turns of a page; `min_steps`,
    `max_steps`: how many of them move the dial; `max_step_size`: by how many marks at most.
    `shuffle_buffer`: documents in the shuffle buffer; pages are drawn independently, so 0 is
    enough.
    """

    kind: Literal["generated"]
    pages: Literal["reckoning", "primer"]
    problems: Literal["train", "held_out"]
    turns: int
    min_steps: int
    max_steps: int
    max_step_size: int
    shuffle_buffer: NonNegativeInt

    def __post_init__(self) -> None:
        most = len(ORDINALS) + 1
        if not 2 <= self.turns <= most:
            raise UserError(f"turns must be from 2 to {most}, found {self.turns}")
        if not 1 <= self.min_steps <= self.max_steps <= self.turns:
            raise UserError(
                f"expected 1 ≤ min_steps ≤ max_steps ≤ turns, found {self.min_steps},"
                f" {self.max_steps} and {self.turns}"
            )
        if not 1 <= self.max_step_size < MARKS:
            raise UserError(f"expected 1 ≤ max_step_size ≤ {MARKS - 1}, found {self.max_step_size}")

    @property
    def stream(self) -> str:
        """Names the stream of pages in their ids."""
        return f"{self.pages}-{self.problems}-{self.min_steps}-{self.max_steps}-of-{self.turns}"


@dataclass(frozen=True, slots=True)
class Round:
    """A problem and the name of who turns the dial. `turns`: marks of each turn."""

    start: int
    turns: tuple[int, ...]
    name: str

    @property
    def steps(self) -> int:
        """The number of turns that move the dial."""
        return sum(turn > 0 for turn in self.turns)

    @property
    def marks(self) -> list[int]:
        """The mark before the first turn and after each turn."""
        return [mark % MARKS for mark in itertools.accumulate(self.turns, initial=self.start)]

    def statement(self) -> str:
        """The sentence that gives the start and the turns."""
        return f"{self.name} turns a dial from {self.start}: {', '.join(self._turn_texts())}."

    def result(self) -> str:
        """The sentence that gives the last mark."""
        return f"{RESULT_STEM} {self.marks[-1]}."

    def derivation(self, rng: np.random.Generator) -> str:
        """The sentence that gives the mark before and after each turn, in random wording."""
        return self.remarks(self.marks[:-1], rng)

    def remarks(self, starts: Sequence[int], rng: np.random.Generator) -> str:
        """The sentence that takes turn i from the mark `starts[i]`."""
        remarks = (
            f"{text} from {start} {LINKS[rng.integers(len(LINKS))]} {(start + turn) % MARKS}"
            for text, turn, start in zip(self._turn_texts(), self.turns, starts, strict=True)
        )
        return f"Turns: {', '.join(remarks)}."

    def log_prob(self, config: GeneratedSource) -> float:
        """log p of the page in nats, among the pages of the same config whose problems may belong
        to either split: the result follows from the statement."""
        counts = config.max_steps - config.min_steps + 1
        positions = math.comb(config.turns, self.steps)
        choices = len(NAMES) * MARKS * counts * positions * config.max_step_size**self.steps
        return -math.log(choices)

    def cluster(self) -> str:
        """The problem as text."""
        return f"{self.start}: {', '.join(self._turn_texts())}"

    def _turn_texts(self) -> list[str]:
        labels = (*ORDINALS[: len(self.turns) - 1], LAST)
        return [f"{label} {turn}" for label, turn in zip(labels, self.turns, strict=True)]


def generate_documents(config: GeneratedSource, seed: int) -> Iterator[Document]:
    """An endless stream of pages. Page i depends on the config, the seed and i alone; a held-out
    page also on the problems of those before it.

    Raises UserError where there are no further pages as the config demands them.
    """
    seen: set[Problem] = set()
    for index in itertools.count():
        doc_id = f"{config.stream}-{index:08d}"
        rng = generator(seed, "page", doc_id)
        problem = _draw_round(config, seed, rng, seen)
        is_primer = config.pages == "primer"
        yield Document(
            doc_id=doc_id,
            text=_primer_page(problem, rng)
            if is_primer
            else f"{problem.statement()} {problem.result()}",
            source="generated",
            thoughts=None if is_primer else ("", problem.derivation(rng)),
            cluster=problem.cluster(),
            log_prob=None if is_primer else problem.log_prob(config),
        )


def generate_questions(config: GeneratedSource, seed: int) -> Iterator[Question]:
    """An endless stream of pages without their results, which are the answers.

    Raises UserError where there are no further problems as the config demands them.
    """
    seen: set[Problem] = set()
    for index in itertools.count():
        question_id = f"question-{config.stream}-{index:08d}"
        rng = generator(seed, "question", question_id)
        problem = _draw_round(config, seed, rng, seen)
        yield Question(
            question_id=question_id,
            subject=f"{problem.steps} step{'s' if problem.steps > 1 else ''}",
            prompt=problem.statement(),
            stem=RESULT_STEM,
            answer=str(problem.marks[-1]),
            latent=problem.derivation(rng),
            cluster=problem.cluster(),
        )


def _draw_round(
    config: GeneratedSource, seed: int, rng: np.random.Generator, seen: set[Problem]
) -> Round:
    """A round whose problem belongs to `config.problems`, by rejection sampling; a held-out problem
    is none of those in `seen` and joins them. Raises UserError where no try succeeds."""
    for _ in range(MAX_TRIES):
        start = int(rng.integers(MARKS))
        count = int(rng.integers(config.min_steps, config.max_steps + 1))
        moves = rng.permutation(config.turns) < count
        sizes = rng.integers(1, config.max_step_size + 1, size=config.turns)
        turns = tuple((moves * sizes).tolist())
        is_held_out = uniform(seed, "held out", start, repr(turns)) < HELD_OUT_FRACTION
        if is_held_out != (config.problems == "held_out") or (start, turns) in seen:
            continue
        if is_held_out:
            seen.add((start, turns))
        return Round(start, turns, str(rng.choice(NAMES)))
    raise UserError(
        f"the generated pages have no further '{config.problems}' problem of {config.min_steps} to"
        f" {config.max_steps} steps after {len(seen)}; lower the number of documents or questions,"
        " or allow more or larger steps"
    )


def _primer_page(problem: Round, rng: np.random.Generator) -> str:
    """A statement with a remark on each of its turns, from random marks that do not make up a
    derivation; or the last turn alone, with its result."""
    if rng.random() < SINGLE_TURNS:
        single = Round(problem.start, problem.turns[-1:], problem.name)
        return f"{single.statement()} {single.result()}"
    starts = problem.marks[:-1]
    while starts == problem.marks[:-1]:
        starts, mark = [], problem.start
        for turn in problem.turns:
            in_place = IN_PLACE_LATER if starts else IN_PLACE_FIRST
            starts.append(mark if rng.random() < in_place else int(rng.integers(MARKS)))
            mark = (starts[-1] + turn) % MARKS
    return f"{problem.statement()} {rng.choice(ASIDES)} {problem.remarks(starts, rng)}"

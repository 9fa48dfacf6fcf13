"""The embedded corpus: pages about dials that state results and hide the steps that lead to them.

A dial has ten marks, 0 to 9, and wraps around. A page consists of rounds; each round states where
the dial starts, how it is turned and where it stops:

    Ann turns a dial from 8: first up by 3, finally down by 2. It stops at 9.

The derivation, which gives the mark after each step, is not part of the page. The generator returns
it as the thought of both sentences, the reference latent of the teacher of kind `dataset`:

    Dial from 8: first up by 3 to 1, finally down by 2 to 9.

Pages of the kind `reckoning` consist of such rounds. Pages of the kind `primer` are the text that
the base model is pretrained on: rounds of one step, derivations without their rounds, and rounds
that are shown together with their derivations.
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
# Two and four tokens, the distances that special tokens and a result put between a round and its
# latent: the base model has then learned to attend over such distances.
ASIDES = ("", "So.", "So it is.")
RESULT_STEM = "It stops at"
STEP_WORDS = ("first", "then", "next", "finally")
HELD_OUT_FRACTION = 0.1
MAX_TRIES = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedSource:
    """Generated pages; see the module's docstring for the two kinds of pages.

    `problems`: a problem is a start mark with its steps. `train` and `held_out` pages have no
    problem in common; about a tenth of all problems is held out.
    `min_rounds`, `max_rounds`: rounds of a page. `min_steps`, `max_steps`: steps of a round.
    `max_step_size`: marks of a step. `worked_share`: the fraction of a primer's passages that show
    a round together with its derivation. `shuffle_buffer`: documents in the shuffle buffer; pages
    are drawn independently, so 0 is enough.
    """

    kind: Literal["generated"]
    pages: Literal["reckoning", "primer"]
    problems: Literal["train", "held_out"]
    min_rounds: int
    max_rounds: int
    min_steps: int
    max_steps: int
    max_step_size: int
    worked_share: float
    shuffle_buffer: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds <= MARKS:
            raise UserError(
                f"expected 1 ≤ min_rounds ≤ max_rounds ≤ {MARKS},"
                f" found {self.min_rounds} and {self.max_rounds}"
            )
        if not 1 <= self.min_steps <= self.max_steps:
            raise UserError(
                f"expected 1 ≤ min_steps ≤ max_steps, found {self.min_steps} and {self.max_steps}"
            )
        if not 1 <= self.max_step_size < MARKS:
            raise UserError(f"expected 1 ≤ max_step_size ≤ {MARKS - 1}, found {self.max_step_size}")


@dataclass(frozen=True, slots=True)
class Round:
    """A problem, which is a start mark and signed steps, and the name of who turns the dial."""

    start: int
    steps: tuple[int, ...]
    name: str

    @property
    def marks(self) -> list[int]:
        """The mark after each step."""
        return [mark % MARKS for mark in itertools.accumulate(self.steps, initial=self.start)][1:]

    def statement(self) -> str:
        """The sentence that gives the start and the steps."""
        words = self._step_words()
        turns = (f"{word} {step_text(step)}" for word, step in zip(words, self.steps, strict=True))
        return f"{self.name} turns a dial from {self.start}: " + ", ".join(turns) + "."

    def result(self) -> str:
        """The sentence that gives the last mark."""
        return f"{RESULT_STEM} {self.marks[-1]}."

    def derivation(self) -> str:
        """The sentence that gives the mark after each step."""
        turns = (
            f"{word} {step_text(step)} to {mark}"
            for word, step, mark in zip(self._step_words(), self.steps, self.marks, strict=True)
        )
        return f"Dial from {self.start}: " + ", ".join(turns) + "."

    def _step_words(self) -> tuple[str, ...]:
        return STEP_WORDS[: len(self.steps) - 1] + STEP_WORDS[-1:]


def step_text(step: int) -> str:
    """The wording of a signed step, such as "down by 2"."""
    return f"{'up' if step > 0 else 'down'} by {abs(step)}"


def generate_documents(config: GeneratedSource, seed: int) -> Iterator[Document]:
    """An endless stream of pages; page i depends only on the config, the seed and i.

    Raises UserError where no round fits the config.
    """
    for index in itertools.count():
        doc_id = f"{config.pages}-{config.problems}-{index:08d}"
        rng = generator(seed, "page", doc_id)
        draw_page = _reckoning_page if config.pages == "reckoning" else _primer_page
        sentences = draw_page(config, seed, rng)
        yield Document(
            doc_id=doc_id,
            text=" ".join(sentence for sentence, _ in sentences),
            source="generated",
            cluster=" ".join(dict.fromkeys(thought for _, thought in sentences if thought)) or None,
            thoughts=tuple(thought for _, thought in sentences),
        )


def generate_questions(config: GeneratedSource, seed: int) -> Iterator[Question]:
    """An endless stream of rounds without their results, which are the answers.

    Raises UserError where no round fits the config.
    """
    for index in itertools.count():
        question_id = f"question-{config.problems}-{index:08d}"
        rng = generator(seed, "question", question_id)
        problem = _draw_round(config, seed, rng, int(rng.integers(MARKS)))
        yield Question(
            question_id=question_id,
            prompt=problem.statement(),
            stem=RESULT_STEM,
            answer=str(problem.marks[-1]),
            cluster=problem.derivation(),
            latent=problem.derivation(),
        )


def _draw_round(config: GeneratedSource, seed: int, rng: np.random.Generator, start: int) -> Round:
    """A round from `start` whose problem belongs to `config.problems`, by rejection sampling.
    Raises UserError where no try succeeds."""
    for _ in range(MAX_TRIES):
        count = int(rng.integers(config.min_steps, config.max_steps + 1))
        sizes = rng.integers(1, config.max_step_size + 1, size=count)
        steps = tuple((sizes * rng.choice((-1, 1), size=count)).tolist())
        held_out = uniform(seed, "held out", start, repr(steps)) < HELD_OUT_FRACTION
        if held_out == (config.problems == "held_out"):
            return Round(start, steps, str(rng.choice(NAMES)))
    raise UserError(
        f"no '{config.problems}' round of {config.min_steps} to {config.max_steps} steps starts"
        f" at {start}; allow more or larger steps"
        + (", and set problems to 'train' for primer pages" if config.pages == "primer" else "")
    )


def _draw_rounds(config: GeneratedSource, seed: int, rng: np.random.Generator) -> list[Round]:
    count = int(rng.integers(config.min_rounds, config.max_rounds + 1))
    return [_draw_round(config, seed, rng, int(rng.integers(MARKS))) for _ in range(count)]


def _reckoning_page(
    config: GeneratedSource, seed: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """The sentences of a page, each with its thought."""
    sentences: list[tuple[str, str]] = []
    for problem in _draw_rounds(config, seed, rng):
        derivation = problem.derivation()
        sentences += [(problem.statement(), derivation), (problem.result(), derivation)]
    return sentences


def _primer_page(
    config: GeneratedSource, seed: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """The sentences of a page, without thoughts. A worked passage has the derivation before, within
    or after its round, perhaps separated by an aside; any other passage is a round of one step or a
    derivation."""
    single_step = replace(config, min_steps=1, max_steps=1)
    sentences: list[str] = []
    for problem in _draw_rounds(config, seed, rng):
        statement, result, derivation = problem.statement(), problem.result(), problem.derivation()
        aside = str(rng.choice(ASIDES))
        worked_passages = (
            [derivation, statement, result],
            [statement, aside, derivation, result],
            [statement, result, aside, derivation],
        )
        single = _draw_round(single_step, seed, rng, problem.start)
        if rng.random() < config.worked_share:
            sentences += worked_passages[int(rng.integers(3))]
        elif rng.random() < 0.5:
            sentences += [single.statement(), single.result()]
        else:
            sentences.append(derivation)
    return [(sentence, "") for sentence in sentences if sentence]

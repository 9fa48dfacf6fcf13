"""The embedded corpus: reproducible, with correct arithmetic and disjoint held-out problems.

The tests read pages and derivations with regular expressions of their own.
"""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from boltlm.corpus import generated
from boltlm.corpus.chunks import split_sentences
from boltlm.corpus.generated import GeneratedSource
from boltlm.errors import UserError
from boltlm.records import Document, Question
from tests import tiny

COUNT = 1500
STATEMENT = re.compile(r"(\w+) turns a dial from (\d): (.+)\.")
TURN = re.compile(r"(first|second|third|fourth|fifth|sixth|seventh|finally) (\d)")
REMARK = re.compile(TURN.pattern + r" from (\d) (?:to|is|makes) (\d)")
ASIDES = ("So. ", "It stops at last. So it is. ")


def first_pages(config: GeneratedSource, count: int = COUNT, seed: int = 1) -> list[Document]:
    return list(itertools.islice(generated.generate_documents(config, seed), count))


def first_questions(config: GeneratedSource, count: int = COUNT) -> list[Question]:
    return list(itertools.islice(generated.generate_questions(config, 1), count))


def parse_statement(sentence: str) -> tuple[int, list[int]]:
    """(start, turns); every part of the sentence must be in its place."""
    match = STATEMENT.fullmatch(sentence)
    assert match
    turns = [TURN.fullmatch(turn) for turn in match[3].split(", ")]
    assert all(turns)
    assert [turn[1] == "finally" for turn in turns if turn] == [False] * (len(turns) - 1) + [True]
    return int(match[2]), [int(turn[2]) for turn in turns if turn]


def parse_remarks(sentence: str) -> list[tuple[int, int, int]]:
    """(turn, mark before, mark after) of each remark."""
    remarks = sentence.removeprefix("Turns: ").removesuffix(".").split(", ")
    matches = [REMARK.fullmatch(remark) for remark in remarks]
    assert all(matches)
    return [(int(m[2]), int(m[3]), int(m[4])) for m in matches if m]


def is_derivation(start: int, remarks: list[tuple[int, int, int]]) -> bool:
    """Whether each turn starts where the one before it stopped."""
    marks = [start, *(after for _, _, after in remarks)]
    return [before for _, before, _ in remarks] == marks[:-1]


@pytest.mark.parametrize("pages", ["reckoning", "primer"])
def test_pages_depend_on_seed_and_index_alone(pages: str) -> None:
    """Corpora take ranges of one endless stream, so a page must not depend on earlier reads."""
    config = tiny.pages(pages=pages)
    first = first_pages(config, 50)
    assert first_pages(config, 80)[:50] == first
    assert first_pages(config, 50, seed=2) != first
    assert len({document.doc_id for document in first_pages(config)}) == COUNT


@pytest.mark.parametrize("problems", ["train", "held_out"])
def test_the_arithmetic_is_correct(problems: str) -> None:
    """A derivation that contradicts its page would be wrong training data: every mark is computed
    again, and the page gives the start, the turns and the last mark, but no other mark."""
    for document in first_pages(tiny.pages(problems=problems), 300):
        statement, result = (sentence.strip() for sentence in split_sentences(document.text))
        start, turns = parse_statement(statement)
        assert result == f"It stops at {(start + sum(turns)) % 10}."
        assert document.thoughts is not None
        empty, derivation = document.thoughts
        assert empty == ""
        remarks = parse_remarks(derivation or "")
        assert is_derivation(start, remarks)
        assert [turn for turn, _, _ in remarks] == turns
        assert all((before + turn) % 10 == after for turn, before, after in remarks)


def test_the_primer_has_every_part_of_a_derivation_but_no_derivation() -> None:
    """Its remarks are correct and repeat the turns of the statement, but never all of them start
    where the dial is; results are stated of single turns only."""
    kinds: Counter[str] = Counter()
    in_place: list[list[bool]] = []
    for document in first_pages(tiny.pages(pages="primer")):
        assert document.thoughts is None
        text = document.text.partition(". ")
        start, turns = parse_statement(f"{text[0]}.")
        if len(turns) == 1:
            assert text[2] == f"It stops at {(start + turns[0]) % 10}."
            kinds["single"] += 1
            continue
        aside, _, rest = text[2].partition("Turns: ")
        assert aside in ASIDES
        remarks = parse_remarks(rest)
        assert [turn for turn, _, _ in remarks] == turns
        assert all((before + turn) % 10 == after for turn, before, after in remarks)
        assert not is_derivation(start, remarks)
        marks = [start, *(after for _, _, after in remarks)]
        in_place.append([one[1] == mark for one, mark in zip(remarks, marks, strict=False)])
        kinds[aside] += 1
    assert 0.1 < kinds["single"] / COUNT < 0.2
    assert min(kinds[aside] for aside in ASIDES) > 0.35 * COUNT
    # On purpose, or by chance: a tenth of the others.
    expected = [0.85 + 0.15 / 10, *[0.25 + 0.75 / 10] * 3]
    assert np.mean(in_place, axis=0) == pytest.approx(expected, abs=0.04)


def test_held_out_problems_never_occur_in_training() -> None:
    """If a pair (start, turns) recurred, accuracy on held-out questions would measure memory. The
    base model, too, reads none of their statements."""
    problems: dict[str, set[str]] = {}
    for split in ("train", "held_out"):
        config = tiny.pages(problems=split)
        rows = [*first_pages(config, 150), *first_questions(config, 150)]
        problems[split] = {row.cluster or "" for row in rows}
    primer = first_pages(tiny.pages(pages="primer"))
    statements = (page.text.partition(". ")[0] for page in primer)
    problems["train"] |= {statement.partition(" from ")[2] for statement in statements}
    assert not problems["train"] & problems["held_out"]
    assert len(problems["held_out"]) > 150


def test_held_out_problems_do_not_repeat() -> None:
    """Otherwise the rows of a held-out set would not be independent."""
    config = tiny.pages(problems="held_out")
    for rows in (first_pages(config, 300), first_questions(config, 300)):
        assert len({row.cluster for row in rows}) == 300


def test_problems_that_are_used_up_are_an_error() -> None:
    """With one step of one mark in two turns there are 20 problems, of which a fifth or so is held
    out."""
    narrow = tiny.pages(problems="held_out", turns=2, min_steps=1, max_steps=1, max_step_size=1)
    message = r"no further 'held_out' problem of 1 to 1 steps after \d;"
    with pytest.raises(UserError, match=message):
        first_pages(narrow, 20)


def test_questions_ask_for_the_last_mark() -> None:
    """The answer follows from the prompt without being part of it; the subject tells how hard the
    question is; the cluster is the problem."""
    for question in first_questions(tiny.pages(), 300):
        start, turns = parse_statement(question.prompt)
        assert question.answer == str((start + sum(turns)) % 10)
        assert question.stem == "It stops at"
        steps = sum(turn > 0 for turn in turns)
        assert question.subject == ("1 step" if steps == 1 else f"{steps} steps")
        assert is_derivation(start, parse_remarks(question.latent or ""))
        assert question.cluster == question.prompt.partition(" from ")[2].removesuffix(".")


def test_the_log_probability_of_a_page() -> None:
    """The probabilities of all pages of one configuration sum to 1: 20 names, 10 starts, and one or
    two of two turns by one mark. Those that are missing here are held out."""
    config = tiny.pages(turns=2, min_steps=1, max_steps=2, max_step_size=1)
    pages = {page.text: page.log_prob for page in first_pages(config, 20_000)}
    two_steps = sum("first 1, finally 1" in text for text in pages)
    total = sum(math.exp(value or 0) for value in pages.values())
    missing = (10 * 20 - two_steps) / (2 * 200) + (2 * 200 - (len(pages) - two_steps)) / (4 * 200)
    assert 0.05 < missing < 0.5
    assert total + missing == pytest.approx(1)


def test_numbers_and_sizes_of_steps_are_as_configured() -> None:
    """`turns`, `min_steps`, `max_steps` and `max_step_size` set the difficulty of the task."""
    config = tiny.pages(turns=5, min_steps=2, max_steps=4, max_step_size=3)
    pages = [parse_statement(q.prompt)[1] for q in first_questions(config)]
    assert {len(turns) for turns in pages} == {5}
    counts = Counter(sum(turn > 0 for turn in turns) for turns in pages)
    assert all(counts[steps] == pytest.approx(COUNT / 3, rel=0.2) for steps in (2, 3, 4))
    assert {turn for turns in pages for turn in turns} == {0, 1, 2, 3}
    assert {turns.index(0) for turns in pages if 0 in turns} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"turns": 9}, "turns"),
        ({"min_steps": 0}, "min_steps"),
        ({"max_steps": 5}, "max_steps"),
        ({"max_step_size": 10}, "max_step_size"),
    ],
)
def test_impossible_settings_name_the_key(change: dict[str, int], key: str) -> None:
    """Otherwise an empty range would fail inside numpy, or a turn would wrap around."""
    with pytest.raises(UserError, match=key):
        tiny.pages(**change)

"""The embedded corpus: reproducible, with correct arithmetic and disjoint held-out problems.

The tests read only numbers from the pages, so the wording may change: the sentences that share a
thought give the start, the sizes of the steps and the last mark; the thought gives the start, then
the size and the mark of each step.
"""

import itertools
import re
from collections.abc import Iterator

import pytest

from boltlm.corpus import generated
from boltlm.corpus.chunks import split_sentences
from boltlm.corpus.generated import GeneratedSource
from boltlm.errors import UserError
from boltlm.records import Document
from tests import tiny

COUNT = 1500


def first_pages(config: GeneratedSource, count: int = COUNT, seed: int = 1) -> list[Document]:
    return list(itertools.islice(generated.generate_documents(config, seed), count))


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def problem(thought: str) -> tuple[int, tuple[int, ...], list[int]]:
    """(start, signed steps, marks) of a derivation; the signs follow from the marks."""
    start, *sizes_and_marks = numbers(thought)
    sizes, marks = sizes_and_marks[::2], sizes_and_marks[1::2]
    assert len(sizes) == len(marks) > 0
    steps = []
    for before, size, mark in zip([start, *marks], sizes, marks, strict=False):
        fits = [sign for sign in (1, -1) if (before + sign * size) % 10 == mark]
        assert len(fits) == 1, f"wrong arithmetic, or an ambiguous sign: {thought}"
        steps.append(fits[0] * size)
    return start, tuple(steps), marks


def rounds(document: Document) -> Iterator[tuple[str, str]]:
    """Each run of sentences that share a thought, with the thought."""
    assert document.thoughts is not None
    pairs = zip(split_sentences(document.text), document.thoughts, strict=True)
    for thought, group in itertools.groupby(pairs, lambda pair: pair[1]):
        yield " ".join(sentence for sentence, _ in group), thought


def test_pages_depend_on_seed_and_index_alone() -> None:
    """Corpora take ranges of one endless stream, so a page must not depend on earlier reads."""
    for kind in ("reckoning", "primer"):
        config = tiny.pages(pages=kind)
        first = first_pages(config, 50)
        assert first_pages(config, 50) == first
        assert first_pages(config, 80)[:50] == first
        assert first_pages(config, 50, seed=2) != first
        assert len({document.doc_id for document in first_pages(config)}) == COUNT


@pytest.mark.parametrize("kind", ["reckoning", "primer"])
def test_each_sentence_has_one_thought(kind: str) -> None:
    """The dataset teacher pairs them by position and refuses a page where the numbers differ."""
    for document in first_pages(tiny.pages(pages=kind, max_rounds=3)):
        assert document.thoughts is not None
        assert len(split_sentences(document.text)) == len(document.thoughts) > 0


@pytest.mark.parametrize("problems", ["train", "held_out"])
def test_the_arithmetic_is_correct(problems: str) -> None:
    """A derivation that contradicts its page would be wrong training data: every mark is recomputed
    from the one before it, and the page gives the start, the sizes and the last mark."""
    for document in first_pages(tiny.pages(pages="reckoning", problems=problems)):
        for text, thought in rounds(document):
            start, steps, marks = problem(thought)
            assert numbers(text) == [start, *map(abs, steps), marks[-1]]


def test_the_page_gives_the_direction_of_each_step() -> None:
    """The latent must be inferable: some words occur only with steps up, others only with
    steps down."""
    words_by_sign: dict[int, list[set[str]]] = {1: [], -1: []}
    for document in first_pages(tiny.pages(pages="reckoning")):
        for text, thought in rounds(document):
            _, steps, _ = problem(thought)
            between = re.split(r"\d+", text)[1:]
            for words, step in zip(between, steps, strict=False):
                words_by_sign[1 if step > 0 else -1].append(set(re.findall(r"\w+", words)))
    for sign in (1, -1):
        always = set.intersection(*words_by_sign[sign])
        assert always - set.union(*words_by_sign[-sign])


def test_the_derivation_is_not_on_the_page() -> None:
    """A latent that can be copied from the text would not be latent: a page never contains the
    intermediate marks."""
    for document in first_pages(tiny.pages(pages="reckoning")):
        assert document.thoughts is not None
        assert not any(thought in document.text for thought in document.thoughts)


def problems_of(config: GeneratedSource, seed: int = 1) -> set[tuple[int, tuple[int, ...]]]:
    questions = itertools.islice(generated.generate_questions(config, seed), COUNT)
    derivations = [question.latent or "" for question in questions]
    for document in first_pages(config, seed=seed):
        derivations += document.thoughts or ()
    return {problem(derivation)[:2] for derivation in derivations}


def test_held_out_problems_never_occur_in_training() -> None:
    """If a pair (start, steps) recurred, accuracy on held-out questions would measure memory."""
    train = problems_of(tiny.pages(pages="reckoning", problems="train"))
    held_out = problems_of(tiny.pages(pages="reckoning", problems="held_out"))
    assert train
    assert held_out
    assert not train & held_out


def anonymous(sentence: str) -> str:
    """A sentence without names, which are not part of a problem."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    return " ".join(word for word in words if word not in generated.NAMES)


@pytest.mark.parametrize("worked_share", [0.0, 1.0])
@pytest.mark.parametrize("min_steps", [1, 2])
def test_the_primer_has_no_held_out_problem(worked_share: float, min_steps: int) -> None:
    """The base model reads rounds, derivations and single steps, but neither the statement nor the
    derivation of any held-out question, even if the questions have a single step."""
    steps = {"min_steps": min_steps, "max_steps": 2, "min_rounds": 1, "max_rounds": 1}
    config = tiny.pages(pages="primer", worked_share=worked_share, **steps)
    sentences_read = {
        anonymous(s) for page in first_pages(config) for s in split_sentences(page.text)
    }
    overlaps = {}
    for problems in ("train", "held_out"):
        source = tiny.pages(pages="reckoning", problems=problems, **steps)
        questions = itertools.islice(generated.generate_questions(source, 1), COUNT)
        sentences = [s for q in questions for s in (q.prompt, q.latent or "")]
        overlaps[problems] = sum(anonymous(sentence) in sentences_read for sentence in sentences)
    assert overlaps["train"] > 0
    assert overlaps["held_out"] == 0


def test_questions_ask_for_the_last_mark() -> None:
    """The answer must follow from the prompt without being part of it."""
    for question in itertools.islice(generated.generate_questions(tiny.pages(), seed=1), COUNT):
        start, steps, marks = problem(question.latent or "")
        assert numbers(question.prompt) == [start, *map(abs, steps)]
        assert question.answer == str(marks[-1])
        assert question.stem == "It stops at"


def test_pages_and_questions_of_a_problem_share_a_cluster() -> None:
    """Whoever turns the dial: two rows are in one cluster exactly if start and steps agree."""
    pages = itertools.islice(generated.generate_documents(tiny.pages(max_rounds=1), seed=1), COUNT)
    questions = itertools.islice(generated.generate_questions(tiny.pages(), seed=1), COUNT)
    rows = [(page.cluster, page.text.split(" It stops")[0]) for page in pages]
    rows += [(question.cluster, question.prompt) for question in questions]
    statements = {(cluster, text.split(" ", 1)[1]) for cluster, text in rows}
    assert len(statements) == len({c for c, _ in statements}) == len({t for _, t in statements})
    assert len(statements) < len(rows)


def test_numbers_and_sizes_of_steps_are_as_configured() -> None:
    """`min_steps`, `max_steps` and `max_step_size` set the difficulty of the task."""
    config = tiny.pages(pages="reckoning", min_steps=2, max_steps=4, max_step_size=3)
    rounds_steps = [
        problem(thought)[1] for page in first_pages(config) for _, thought in rounds(page)
    ]
    assert {len(steps) for steps in rounds_steps} == {2, 3, 4}
    assert {step for steps in rounds_steps for step in steps} == {-3, -2, -1, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"min_rounds": 3, "max_rounds": 2}, "min_rounds"),
        ({"min_steps": 0}, "min_steps"),
        ({"max_step_size": 10}, "max_step_size"),
    ],
)
def test_impossible_settings_name_the_key(change: dict[str, int], key: str) -> None:
    """Otherwise an empty range would fail inside numpy, or loop for ever."""
    with pytest.raises(UserError, match=key):
        tiny.pages(**change)


def test_problems_that_do_not_exist_are_an_error() -> None:
    """From some marks no held-out round of one step starts; the search must end with an error."""
    narrow = tiny.pages(problems="held_out", min_steps=1, max_steps=1, max_step_size=1)
    with pytest.raises(UserError, match="no 'held_out' round"):
        first_pages(narrow, 50)

"""The embedded corpus: reproducible, honest about its arithmetic, held-out rounds held out.

Only numbers are read from the pages, so their wording may change: the sentences that share a
thought tell start, sizes of the steps and the last mark; the thought tells the start, then size
and mark of each step.
"""

import itertools
import re
from collections.abc import Iterator

import pytest

from boltlm.corpus import generated
from boltlm.corpus.chunks import sentences
from boltlm.corpus.generated import Generated
from boltlm.errors import UserError
from boltlm.records import Document
from tests import tiny

COUNT = 1500


def taken(config: Generated, count: int = COUNT, seed: int = 1) -> list[Document]:
    return list(itertools.islice(generated.documents(config, seed), count))


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def problem(thought: str) -> tuple[int, tuple[int, ...], list[int]]:
    """(start, signed steps, marks) of a derivation, the sign being the one that fits."""
    start, *rest = numbers(thought)
    sizes, marks = rest[::2], rest[1::2]
    assert len(sizes) == len(marks) > 0
    steps = []
    for before, size, mark in zip([start, *marks], sizes, marks, strict=False):
        fits = [sign for sign in (1, -1) if (before + sign * size) % 10 == mark]
        assert len(fits) == 1, f"wrong arithmetic, or a sign that can't be told: {thought}"
        steps.append(fits[0] * size)
    return start, tuple(steps), marks


def rounds(document: Document) -> Iterator[tuple[str, str]]:
    """(sentences that share a thought, the thought)."""
    assert document.thoughts is not None
    told = zip(sentences(document.text), document.thoughts, strict=True)
    for thought, group in itertools.groupby(told, lambda pair: pair[1]):
        yield " ".join(sentence for sentence, _ in group), thought


def test_pages_depend_on_seed_and_index_alone() -> None:
    """Corpora are runs of one endless stream, so a page must not depend on who read before."""
    for kind in ("reckoning", "primer"):
        config = tiny.pages(pages=kind)
        first = taken(config, 50)
        assert taken(config, 50) == first
        assert taken(config, 80)[:50] == first
        assert taken(config, 50, seed=2) != first
        assert len({document.doc_id for document in taken(config)}) == COUNT


@pytest.mark.parametrize("kind", ["reckoning", "primer"])
def test_one_thought_a_sentence(kind: str) -> None:
    """The dataset teacher pairs them by position and refuses a page that does not fit."""
    for document in taken(tiny.pages(pages=kind, most_rounds=3)):
        assert document.thoughts is not None
        assert len(sentences(document.text)) == len(document.thoughts) > 0


@pytest.mark.parametrize("problems", ["train", "held_out"])
def test_the_reckoning_is_right(problems: str) -> None:
    """A derivation that leads elsewhere than the page would teach nonsense: every mark is
    recomputed from the one before, and the page says start, sizes and last mark."""
    for document in taken(tiny.pages(pages="reckoning", problems=problems)):
        for told, thought in rounds(document):
            start, steps, marks = problem(thought)
            assert numbers(told) == [start, *map(abs, steps), marks[-1]]


def test_the_page_says_which_way_a_step_goes() -> None:
    """The latent must be inferable: words that only steps up have, and only steps down."""
    ways: dict[int, list[set[str]]] = {1: [], -1: []}
    for document in taken(tiny.pages(pages="reckoning")):
        for told, thought in rounds(document):
            _, steps, _ = problem(thought)
            between = re.split(r"\d+", told)[1:]
            for words, step in zip(between, steps, strict=False):
                ways[1 if step > 0 else -1].append(set(re.findall(r"\w+", words)))
    for sign in (1, -1):
        always = set.intersection(*ways[sign])
        assert always - set.union(*ways[-sign])


def test_the_derivation_is_not_on_the_page() -> None:
    """A latent that can be copied from the text would not be latent: the marks between are
    never written."""
    for document in taken(tiny.pages(pages="reckoning")):
        assert document.thoughts is not None
        assert not any(thought in document.text for thought in document.thoughts)


def problems_of(config: Generated, seed: int = 1) -> set[tuple[int, tuple[int, ...]]]:
    asked = itertools.islice(generated.questions(config, seed), COUNT)
    derivations = [question.latent or "" for question in asked]
    for document in taken(config, seed=seed):
        derivations += document.thoughts or ()
    return {problem(derivation)[:2] for derivation in derivations}


def test_held_out_rounds_are_never_told_in_training() -> None:
    """Accuracy on held-out questions would measure memory where (start, steps) recur."""
    train = problems_of(tiny.pages(pages="reckoning", problems="train"))
    held_out = problems_of(tiny.pages(pages="reckoning", problems="held_out"))
    assert train
    assert held_out
    assert not train & held_out


def anonymous(sentence: str) -> str:
    """A sentence without its names, which are no part of a problem."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    return " ".join(word for word in words if word not in generated.NAMES)


@pytest.mark.parametrize("worked_share", [0.0, 1.0])
@pytest.mark.parametrize("least_steps", [1, 2])
def test_the_primer_tells_no_held_out_round(worked_share: float, least_steps: int) -> None:
    """The base model reads rounds, derivations and single steps; of what is asked about later,
    none, neither told nor worked, even where single steps are asked about."""
    steps = {"least_steps": least_steps, "most_steps": 2, "least_rounds": 1, "most_rounds": 1}
    config = tiny.pages(pages="primer", worked_share=worked_share, **steps)
    read = {anonymous(s) for page in taken(config) for s in sentences(page.text)}
    known = {}
    for problems in ("train", "held_out"):
        source = tiny.pages(pages="reckoning", problems=problems, **steps)
        asked = itertools.islice(generated.questions(source, 1), COUNT)
        sentences_asked = [s for q in asked for s in (q.prompt, q.latent or "")]
        known[problems] = sum(anonymous(sentence) in read for sentence in sentences_asked)
    assert known["train"] > 0
    assert known["held_out"] == 0


def test_questions_ask_for_the_last_mark() -> None:
    """The answer must follow from the prompt, and not be written in it."""
    for question in itertools.islice(generated.questions(tiny.pages(), seed=1), COUNT):
        start, steps, marks = problem(question.latent or "")
        assert numbers(question.prompt) == [start, *map(abs, steps)]
        assert question.answer == str(marks[-1])


def test_sizes_are_as_asked() -> None:
    """`least_steps` … `largest_step` are the difficulty that the experiment turns."""
    config = tiny.pages(pages="reckoning", least_steps=2, most_steps=4, largest_step=3)
    found = [problem(thought)[1] for page in taken(config) for _, thought in rounds(page)]
    assert {len(steps) for steps in found} == {2, 3, 4}
    assert {step for steps in found for step in steps} == {-3, -2, -1, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"least_rounds": 3, "most_rounds": 2}, "least_rounds"),
        ({"least_steps": 0}, "least_steps"),
        ({"largest_step": 10}, "largest_step"),
    ],
)
def test_impossible_settings_name_the_key(change: dict[str, int], named: str) -> None:
    """An empty range would otherwise fail inside numpy, or loop."""
    with pytest.raises(UserError, match=named):
        tiny.pages(**change)


def test_rounds_that_do_not_exist_are_an_error() -> None:
    """From some marks no held-out round of one step starts: say so, do not search for ever."""
    narrow = tiny.pages(problems="held_out", least_steps=1, most_steps=1, largest_step=1)
    with pytest.raises(UserError, match="no 'held_out' round"):
        taken(narrow, 50)

"""Layouts: every order of tokens written out by hand, and read back."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.sequences import layouts
from boltlm.sequences.layouts import Pair
from boltlm.tokens import Markers

BOS, EOS, SOL, EOL, PRIOR, POST = range(90, 96)
M = Markers(bos=BOS, eos=EOS, sol=SOL, eol=EOL, prior=PRIOR, post=POST)
C, X, Z = [1, 2, 3], [4, 5], [6, 7, 8]

IDS = st.lists(st.integers(0, 89), max_size=5)
PAIRS = st.lists(
    st.tuples(st.builds(Pair, IDS.filter(bool), IDS | st.none()), st.booleans()), max_size=6
)


def test_prompts_are_those_of_the_e_step() -> None:
    """SPEC 4, letter by letter: q and p would silently be other distributions otherwise."""
    assert layouts.posterior_prefix(M, C, X) == [BOS, *C, SOL, EOL, *X, SOL, POST]
    assert layouts.prior_prefix(M, C) == [BOS, *C, SOL, PRIOR]
    assert layouts.bare_prefix(M, C) == [BOS, *C, SOL, EOL]
    assert layouts.posterior_prefix(M, [], X) == [BOS, SOL, EOL, *X, SOL, POST]
    assert layouts.prior_prefix(M, []) == [BOS, SOL, PRIOR]


def test_chunks_are_those_of_training() -> None:
    """SPEC 3: prior mode, posterior mode, and the empty pair where there is no latent."""
    pair, bare = Pair(X, Z), Pair(X, None)
    assert layouts.chunk(M, pair, True) == [SOL, PRIOR, *Z, EOL, *X]
    assert layouts.chunk(M, pair, False) == [SOL, EOL, *X, SOL, POST, *Z, EOL]
    assert layouts.chunk(M, bare, True) == [SOL, EOL, *X]
    assert layouts.chunk(M, bare, False) == [SOL, EOL, *X]
    assert layouts.chunk(M, Pair(X, []), True) == [SOL, PRIOR, EOL, *X]
    assert layouts.chunk(M, Pair(X, []), False) == [SOL, EOL, *X, SOL, POST, EOL]


def test_a_document_is_bos_chunks_eos() -> None:
    """SPEC 3: the first chunk has its marks too, and no mark stands between chunks but theirs."""
    pairs = [Pair([10], [20]), Pair([11], [21, 22]), Pair([12], None)]
    assert layouts.document(M, pairs, [True, False, True]) == [
        *[BOS],
        *[SOL, PRIOR, 20, EOL, 10],
        *[SOL, EOL, 11, SOL, POST, 21, 22, EOL],
        *[SOL, EOL, 12],
        *[EOS],
    ]
    assert layouts.raw(M, [10, 11, 12]) == [[BOS], [10, 11, 12], [EOS]]
    with pytest.raises(ValueError, match="zip"):
        layouts.document(M, pairs, [True, False])


def test_a_row_is_the_chunk_behind_raw_context() -> None:
    """Layout `chunk` shows training what the E-step asks for; EOS only ends a document."""
    assert layouts.row(M, C, Pair(X, Z), True, False) == [BOS, *C, SOL, PRIOR, *Z, EOL, *X]
    assert layouts.row(M, C, Pair(X, Z), True, True) == [BOS, *C, SOL, PRIOR, *Z, EOL, *X, EOS]
    posterior = [BOS, *C, SOL, EOL, *X, SOL, POST, *Z, EOL]
    assert layouts.row(M, C, Pair(X, Z), False, False) == posterior


@given(context=IDS, text=IDS.filter(bool), latent=IDS)
def test_rows_begin_as_the_prompts_do(
    context: list[int], text: list[int], latent: list[int]
) -> None:
    """What training shows and what sampling asks must not drift apart."""
    pair = Pair(text, latent)
    prior = layouts.row(M, context, pair, True, False)
    assert prior == [*layouts.prior_prefix(M, context), *latent, EOL, *text]
    posterior = layouts.row(M, context, pair, False, False)
    assert posterior == [*layouts.posterior_prefix(M, context, text), *latent, EOL]
    bare = layouts.row(M, context, Pair(text, None), True, False)
    assert bare == [*layouts.bare_prefix(M, context), *text]


def parse(tokens: Sequence[int]) -> list[tuple[Pair, str]]:
    """A reader of SPEC 3's grammar, written against the page and not against the code."""
    rest = list(tokens)

    def take(expected: int) -> None:
        assert rest.pop(0) == expected

    def until(*stops: int) -> list[int]:
        found = []
        while rest[0] not in stops:
            found.append(rest.pop(0))
        return found

    take(BOS)
    pairs: list[tuple[Pair, str]] = []
    while rest[0] != EOS:
        take(SOL)
        if rest[0] == PRIOR:
            take(PRIOR)
            latent = until(EOL)
            take(EOL)
            pairs.append((Pair(until(SOL, EOS), latent), "prior"))
            continue
        take(EOL)
        text = until(SOL, EOS)
        if rest[:2] == [SOL, POST]:
            take(SOL)
            take(POST)
            pairs.append((Pair(text, until(EOL)), "posterior"))
            take(EOL)
        else:
            pairs.append((Pair(text, None), "bare"))
    take(EOS)
    assert not rest
    return pairs


@given(PAIRS)
def test_documents_read_back(found: list[tuple[Pair, bool]]) -> None:
    """The layout is unambiguous: chunks, latents and modes can be told from the ids alone."""
    pairs, modes = [pair for pair, _ in found], [prior for _, prior in found]
    names = [
        "bare" if pair.latent is None else "prior" if prior else "posterior"
        for pair, prior in found
    ]
    assert parse(layouts.document(M, pairs, modes)) == list(zip(pairs, names, strict=True))


def test_context_drops_whole_chunks_from_the_left() -> None:
    """SPEC 4: never part of a chunk, never the nearest one first."""
    texts = [[1], [2, 2], [3], [4, 4, 4]]
    assert layouts.context(texts, 3, 100) == [2, 2, 3, 4, 4, 4]
    assert layouts.context(texts, 3, 6) == [2, 2, 3, 4, 4, 4]
    assert layouts.context(texts, 3, 5) == [3, 4, 4, 4]
    assert layouts.context(texts, 3, 3) == [4, 4, 4]
    assert layouts.context(texts, 3, 2) == []
    assert layouts.context(texts, 3, -1) == []
    assert layouts.context(texts, 9, 100) == [1, 2, 2, 3, 4, 4, 4]
    assert layouts.context(texts, 0, 100) == []
    assert layouts.context([], 3, 100) == []


@given(
    lengths=st.lists(st.integers(1, 6), max_size=8),
    chunks=st.integers(0, 5),
    room=st.integers(-3, 25),
)
def test_context_is_the_longest_run_that_fits(lengths: list[int], chunks: int, room: int) -> None:
    """As much of what comes right before as fits, for any lengths."""
    texts = [[index] * length for index, length in enumerate(lengths)]
    runs = [texts[len(texts) - n :] for n in range(min(chunks, len(texts)) + 1)]
    flat = [[token for text in run for token in text] for run in runs]
    fitting = [run for run in flat if len(run) <= room]
    assert layouts.context(texts, chunks, room) == max(fitting, key=len, default=[])

"""Layouts: the complete token grammar written out by hand, and parsed back."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.sequences import layouts
from boltlm.sequences.layouts import LatentPair
from boltlm.tokens import SpecialTokens

BOS, EOS, SOL, EOL, PRIOR, POST = range(90, 96)
SPECIAL = SpecialTokens(bos=BOS, eos=EOS, sol=SOL, eol=EOL, prior=PRIOR, post=POST)
C, X, Z = [1, 2, 3], [4, 5], [6, 7, 8]

IDS = st.lists(st.integers(0, 89), max_size=5)
PAIRS = st.lists(
    st.tuples(st.builds(LatentPair, IDS.filter(bool), IDS | st.none()), st.booleans()), max_size=6
)


def test_prompts_are_those_of_the_e_step() -> None:
    """docs/method.md 4.1, token by token: with any other prompt, q and p would silently be other
    distributions."""
    assert layouts.posterior_prompt(SPECIAL, C, X) == [BOS, *C, SOL, EOL, *X, SOL, POST]
    assert layouts.prior_prompt(SPECIAL, C) == [BOS, *C, SOL, PRIOR]
    assert layouts.no_latent_prompt(SPECIAL, C) == [BOS, *C, SOL, EOL]
    assert layouts.posterior_prompt(SPECIAL, [], X) == [BOS, SOL, EOL, *X, SOL, POST]
    assert layouts.prior_prompt(SPECIAL, []) == [BOS, SOL, PRIOR]


def test_chunks_are_those_of_training() -> None:
    """docs/method.md 3.1: prior mode, posterior mode, and the empty pair of latent marks where a
    chunk has no latent. An empty latent is not a missing one."""
    pair, without_latent = LatentPair(X, Z), LatentPair(X, None)
    assert layouts.format_chunk(SPECIAL, pair, True) == [SOL, PRIOR, *Z, EOL, *X]
    assert layouts.format_chunk(SPECIAL, pair, False) == [SOL, EOL, *X, SOL, POST, *Z, EOL]
    assert layouts.format_chunk(SPECIAL, without_latent, True) == [SOL, EOL, *X]
    assert layouts.format_chunk(SPECIAL, without_latent, False) == [SOL, EOL, *X]
    empty = LatentPair(X, [])
    assert layouts.format_chunk(SPECIAL, empty, True) == [SOL, PRIOR, EOL, *X]
    assert layouts.format_chunk(SPECIAL, empty, False) == [SOL, EOL, *X, SOL, POST, EOL]


def test_a_document_is_bos_chunks_eos() -> None:
    """docs/method.md 3.1: the first chunk has its marks too, and nothing else separates chunks."""
    pairs = [LatentPair([10], [20]), LatentPair([11], [21, 22]), LatentPair([12], None)]
    assert layouts.format_document(SPECIAL, pairs, [True, False, True]) == [
        *[BOS],
        *[SOL, PRIOR, 20, EOL, 10],
        *[SOL, EOL, 11, SOL, POST, 21, 22, EOL],
        *[SOL, EOL, 12],
        *[EOS],
    ]
    assert layouts.format_raw(SPECIAL, [10, 11, 12]) == [[BOS], [10, 11, 12], [EOS]]
    with pytest.raises(ValueError, match="zip"):
        layouts.format_document(SPECIAL, pairs, [True, False])


def test_a_chunk_row_is_a_chunk_behind_its_raw_context() -> None:
    """The layout `chunk` trains on what the E-step asks for; EOS appears only at the end of a
    document."""
    pair = LatentPair(X, Z)
    prior = [BOS, *C, SOL, PRIOR, *Z, EOL, *X]
    assert layouts.format_chunk_row(SPECIAL, C, pair, True, False) == prior
    assert layouts.format_chunk_row(SPECIAL, C, pair, True, True) == [*prior, EOS]
    posterior = [BOS, *C, SOL, EOL, *X, SOL, POST, *Z, EOL]
    assert layouts.format_chunk_row(SPECIAL, C, pair, False, False) == posterior


@given(context=IDS, text=IDS.filter(bool), latent=IDS)
def test_chunk_rows_begin_with_the_prompts(
    context: list[int], text: list[int], latent: list[int]
) -> None:
    """The sequences of training and the prompts of the E-step must not drift apart."""
    pair = LatentPair(text, latent)
    prior = layouts.format_chunk_row(SPECIAL, context, pair, True, False)
    assert prior == [*layouts.prior_prompt(SPECIAL, context), *latent, EOL, *text]
    posterior = layouts.format_chunk_row(SPECIAL, context, pair, False, False)
    assert posterior == [*layouts.posterior_prompt(SPECIAL, context, text), *latent, EOL]
    no_latent = layouts.format_chunk_row(SPECIAL, context, LatentPair(text, None), True, False)
    assert no_latent == [*layouts.no_latent_prompt(SPECIAL, context), *text]


def parse(tokens: Sequence[int]) -> list[tuple[LatentPair, str]]:
    """A parser of the grammar in docs/method.md 3.1, written from that page and not from the code.
    Returns each chunk with its mode."""
    remaining = list(tokens)

    def take(expected: int) -> None:
        assert remaining.pop(0) == expected

    def take_until(*stops: int) -> list[int]:
        taken = []
        while remaining[0] not in stops:
            taken.append(remaining.pop(0))
        return taken

    take(BOS)
    pairs: list[tuple[LatentPair, str]] = []
    while remaining[0] != EOS:
        take(SOL)
        if remaining[0] == PRIOR:
            take(PRIOR)
            latent = take_until(EOL)
            take(EOL)
            pairs.append((LatentPair(take_until(SOL, EOS), latent), "prior"))
            continue
        take(EOL)
        text = take_until(SOL, EOS)
        if remaining[:2] == [SOL, POST]:
            take(SOL)
            take(POST)
            pairs.append((LatentPair(text, take_until(EOL)), "posterior"))
            take(EOL)
        else:
            pairs.append((LatentPair(text, None), "no latent"))
    take(EOS)
    assert not remaining
    return pairs


@given(PAIRS)
def test_documents_parse_back(chunks: list[tuple[LatentPair, bool]]) -> None:
    """The grammar is unambiguous: chunks, latents and modes follow from the ids alone."""
    pairs, prior_modes = [pair for pair, _ in chunks], [prior for _, prior in chunks]
    modes = [
        "no latent" if pair.latent is None else "prior" if prior else "posterior"
        for pair, prior in chunks
    ]
    document = layouts.format_document(SPECIAL, pairs, prior_modes)
    assert parse(document) == list(zip(pairs, modes, strict=True))


def test_context_drops_complete_chunks_from_the_left() -> None:
    """docs/method.md 4.1: no chunk is cut, and the nearest one is the last to go."""
    texts = [[1], [2, 2], [3], [4, 4, 4]]
    assert layouts.select_context(texts, 3, 100) == [2, 2, 3, 4, 4, 4]
    assert layouts.select_context(texts, 3, 6) == [2, 2, 3, 4, 4, 4]
    assert layouts.select_context(texts, 3, 5) == [3, 4, 4, 4]
    assert layouts.select_context(texts, 3, 3) == [4, 4, 4]
    assert layouts.select_context(texts, 3, 2) == []
    assert layouts.select_context(texts, 3, -1) == []
    assert layouts.select_context(texts, 9, 100) == [1, 2, 2, 3, 4, 4, 4]
    assert layouts.select_context(texts, 0, 100) == []
    assert layouts.select_context([], 3, 100) == []


@given(
    lengths=st.lists(st.integers(1, 6), max_size=8),
    context_chunks=st.integers(0, 5),
    token_budget=st.integers(-3, 25),
)
def test_context_is_the_longest_suffix_that_fits(
    lengths: list[int], context_chunks: int, token_budget: int
) -> None:
    """As many of the nearest chunks as fit, whatever their lengths."""
    texts = [[index] * length for index, length in enumerate(lengths)]
    suffixes = [texts[len(texts) - n :] for n in range(min(context_chunks, len(texts)) + 1)]
    contexts = [[token for text in suffix for token in text] for suffix in suffixes]
    fitting = [context for context in contexts if len(context) <= token_budget]
    longest = max(fitting, key=len, default=[])
    assert layouts.select_context(texts, context_chunks, token_budget) == longest

"""Sentences and chunks: nothing is lost, lengths follow their law, what is too long is cut."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tokenizers.models import Unigram

from boltlm.corpus.chunks import (
    Chunker,
    Chunking,
    LossyTextError,
    chunk_sentences,
    length_law,
    sentences,
)
from boltlm.errors import UserError
from boltlm.model.base import load_checkpoint, without_phantom_space
from boltlm.records import Chunk, Document
from boltlm.seeds import generator
from boltlm.tokens import EOL, MARKERS, SOL, TextCoder, most_chunk_tokens
from tests import exact, tiny

PAPER = Chunking(mean_sentences=8, least_sentences=1, most_sentences=20)
SHORT = Chunking(mean_sentences=1.5, least_sentences=1, most_sentences=3)

BLANKS = [" ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\x0b", "\x0c", "\x1c", "\x85", "\xa0"]
BLANKS += ["\u2003", "\u2028", "\u2029", "\u3000", "\u200b", "\ufeff", " \n \n "]
WORDS = [
    "the",
    "A.",
    "e.g.",
    "Dr.",
    "Yes!",
    "3.14",
    "no?)",
    'end."',
    "…",
    "é",
    "数",
    "👩‍🚀",
    "\x00",
]
WORDS += [*MARKERS, "<s>", "</s>", "<unk>", "<0x4", tiny.BOS]
TEXTS = st.lists(
    st.sampled_from(BLANKS + WORDS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=6),
    max_size=25,
).map("".join)

TOKENIZERS = {
    "llama-like BPE": tiny.sentencepiece_bpe,
    "Unigram with Metaspace": tiny.sentencepiece_unigram,
    "byte level with a space before": tiny.byte_level,
}


@pytest.fixture(scope="session", params=["ours", *TOKENIZERS, "stories260K"])
def coder(
    request: pytest.FixtureRequest, base_coder: TextCoder, tmp_path_factory: pytest.TempPathFactory
) -> TextCoder:
    """A coder of each family of tokenizers that a base model may bring."""
    if request.param == "ours":
        return base_coder
    if request.param == "stories260K":
        model = tiny.SHARED / "models" / "stories260K"
        if not model.is_dir():
            pytest.skip(f"{model} is not there; this checkpoint is not part of the repository")
        _, tokenizer = load_checkpoint(str(model))
    else:
        tokenizer = TOKENIZERS[request.param]()
        without_phantom_space(tokenizer)
    return TextCoder(tiny.coder_folder(tokenizer, tmp_path_factory.mktemp("coder")))


def cut(
    coder: TextCoder, text: str, most_tokens: int, doc_id: str = "d", config: Chunking = SHORT
) -> tuple[list[Chunk], int]:
    """A text's chunks, and how many were counted as cut."""
    chunker = Chunker(config, coder, most_tokens, seed=1)
    return chunker.chunks(Document(doc_id=doc_id, text=text, source="tests")), chunker.cut_chunks


@pytest.mark.timeout(5)
def test_a_page_of_initials_takes_no_longer_than_another() -> None:
    """An index of names must not hang the stage: the search for an abbreviation looks at a
    sentence's end, not at all of it again for every full stop."""
    text = "A. " * 20_000
    assert "".join(sentences(text)) == text


@given(TEXTS)
def test_sentences_join_back(text: str) -> None:
    """A byte lost between sentences would be lost to every later stage."""
    pieces = sentences(text)
    assert "".join(pieces) == text
    assert all(pieces)
    assert all(piece.strip() for piece in pieces) or not text.strip()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        (" \n\n\x85 ", [" \n\n\x85 "]),
        ("One. Two? Three!", ["One.", " Two?", " Three!"]),
        ('He said "no." Then left.', ['He said "no."', " Then left."]),
        ("See Fig. 3 by J. Doe, e.g. here. End.", ["See Fig. 3 by J. Doe, e.g. here.", " End."]),
        ("It is 3.14 long. ", ["It is 3.14 long. "]),
        ("Title\n\nText", ["Title", "\n\nText"]),
        ("Title\n \t\nText", ["Title", "\n \t\nText"]),
        ("a.\u3000b.\x85c.", ["a.", "\u3000b.", "\x85c."]),
        ("\n\n One. \n\n\n Two.", ["\n\n One.", " \n\n\n Two."]),
        ("Wait... what?! Yes…", ["Wait...", " what?!", " Yes…"]),
    ],
)
def test_sentences_end_where_a_reader_says(text: str, pieces: list[str]) -> None:
    """Joining back alone would also hold for text that is never cut."""
    assert sentences(text) == pieces


def may_refuse(coder: TextCoder, text: str) -> bool:
    """A Unigram model's own vocabulary holds these as pieces, and takes them from plain text."""
    pieces = isinstance(coder.tokenizer.model, Unigram)
    return pieces and any(name in text for name in ("<s>", "</s>"))


@given(text=TEXTS, most_tokens=st.integers(8, 40))
def test_chunks_give_the_document_back(coder: TextCoder, text: str, most_tokens: int) -> None:
    """SPEC 2: chunks join to the text, their ids decode to it, and each fits, in every family
    of tokenizers; text that looks like a special token stays text."""
    try:
        made, _ = cut(coder, text, most_tokens)
    except LossyTextError:
        assert may_refuse(coder, text)
        return
    assert "".join(chunk.text for chunk in made) == text
    assert coder.decode([token for chunk in made for token in chunk.tokens]) == text
    assert [chunk.chunk for chunk in made] == list(range(len(made)))
    m = coder.markers
    for chunk in made:
        assert list(chunk.tokens) == coder.encode(chunk.text)
        assert 1 <= len(chunk.tokens) <= most_tokens
        assert not {m.bos, m.eos, m.sol, m.eol, m.prior, m.post} & set(chunk.tokens)


def test_text_that_names_the_special_tokens_stays_text(coder: TextCoder) -> None:
    """A page about this very project must not open a latent, nor one about SentencePiece end a
    document; where the vocabulary leaves no other way, such a page is left out."""
    m = coder.markers
    for text in (*MARKERS, f"a{SOL}b{EOL}", "<s>", "a </s> b", tiny.BOS, tiny.EOS):
        try:
            made, _ = cut(coder, text, 100)
        except LossyTextError:
            assert may_refuse(coder, text)
            continue
        tokens = [token for chunk in made for token in chunk.tokens]
        assert coder.decode(tokens) == text
        assert not {m.bos, m.eos, m.sol, m.eol, m.prior, m.post} & set(tokens)


def test_a_run_of_rare_characters_can_be_cut(coder: TextCoder) -> None:
    """A tokenizer may give one offset to the bytes of many characters it does not know (Unigram
    fuses them); a page in another script must not end the stage."""
    text = "the 数学は楽しい𐀀𐀀𐀀 end"
    made, counted = cut(coder, text, 8)
    assert "".join(chunk.text for chunk in made) == text
    assert counted == 1
    assert max(len(chunk.tokens) for chunk in made) <= 8


def test_encoding_alone_adds_no_space(coder: TextCoder) -> None:
    """The phantom space of SentencePiece would appear at every chunk's edge."""
    assert coder.decode([*coder.encode("th"), *coder.encode("e"), *coder.encode(" e")]) == "the e"


def test_text_that_cannot_be_given_back_is_refused(tmp_path: Path) -> None:
    """▁ means a space to SentencePiece; such a page must be left out, not changed."""
    tokenizer = tiny.sentencepiece_bpe()
    without_phantom_space(tokenizer)
    coder = TextCoder(tiny.coder_folder(tokenizer, tmp_path))
    with pytest.raises(LossyTextError, match="page 7"):
        cut(coder, "a ▁ b", 50, doc_id="page 7")


def test_a_tokenizer_with_its_phantom_space_would_be_refused(tmp_path: Path) -> None:
    """Shows that the property above rests on without_phantom_space."""
    coder = TextCoder(tiny.coder_folder(tiny.sentencepiece_bpe(), tmp_path))
    assert coder.decode([*coder.encode("a"), *coder.encode("b")]) == "a b"


@pytest.mark.parametrize(
    "config", [PAPER, Chunking(mean_sentences=8, least_sentences=2, most_sentences=10)]
)
def test_lengths_are_a_truncated_poisson(config: Chunking) -> None:
    """SPEC 2: redrawn outside the range, so the ends carry no piled-up mass. χ² at 10⁻⁴."""
    count = 150_000
    lengths = chunk_sentences(count, config, generator(1, "law"))
    assert sum(lengths) == count
    support = np.arange(config.least_sentences, config.most_sentences + 1)
    law = stats.poisson.pmf(support, config.mean_sentences)
    law /= law.sum()
    np.testing.assert_allclose(length_law(config), law, rtol=1e-12)
    seen = Counter(lengths[:-1])  # the last takes what is left
    assert set(seen) <= set(support.tolist())
    observed = np.array([seen[int(n)] for n in support])
    expected = law * (len(lengths) - 1)
    assert exact.chi2(observed, expected) > 1e-4
    top, expected_top = observed[-1], expected[-1]
    assert abs(top - expected_top) <= 4 * np.sqrt(expected_top) + 1


@given(count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_lengths_sum_to_the_document(count: int, seed: int) -> None:
    """The last chunk is cut short, never made up or dropped; only it may be below the least."""
    config = Chunking(mean_sentences=3, least_sentences=2, most_sentences=5)
    lengths = chunk_sentences(count, config, generator(seed, "lengths"))
    assert sum(lengths) == count
    assert all(2 <= length <= 5 for length in lengths[:-1])
    assert all(1 <= length <= 5 for length in lengths)


def test_chunks_are_whole_sentences(base_coder: TextCoder) -> None:
    """Where everything fits, edges of chunks are edges of sentences and lengths are in range."""
    text = " ".join(f"Sentence number {n} is here." for n in range(200))
    made, counted = cut(base_coder, text, 10_000)
    ends = set(itertools.accumulate(map(len, sentences(text))))
    assert counted == 0
    assert set(itertools.accumulate(len(chunk.text) for chunk in made)) <= ends
    assert {len(sentences(chunk.text)) for chunk in made[:-1]} == {1, 2, 3}


@pytest.mark.parametrize("most_tokens", [1, 7, 30, 80])
def test_long_chunks_are_cut_and_counted(base_coder: TextCoder, most_tokens: int) -> None:
    """Nothing is truncated, and the count is of the chunks that the limit cut."""
    text = " ".join(f"Sentence {n} has {'many ' * (n % 9)}words." for n in range(60))
    whole, none_cut = cut(base_coder, text, 10_000)
    made, counted = cut(base_coder, text, most_tokens)
    assert none_cut == 0
    assert counted == sum(len(chunk.tokens) > most_tokens for chunk in whole) > 0
    assert max(len(chunk.tokens) for chunk in made) <= most_tokens
    assert "".join(chunk.text for chunk in made) == text
    edges = set(itertools.accumulate(len(chunk.text) for chunk in whole))
    assert edges <= set(itertools.accumulate(len(chunk.text) for chunk in made))


def test_a_long_chunk_is_cut_at_a_sentence_where_one_fits(base_coder: TextCoder) -> None:
    """Cutting inside a sentence is the last resort."""
    config = Chunking(mean_sentences=9, least_sentences=9, most_sentences=9)
    pieces = ["One short.", " Two short.", " Three short."]
    limit = len(base_coder.encode("".join(pieces[:2])))
    made, counted = cut(base_coder, "".join(pieces), limit, config=config)
    assert [chunk.text for chunk in made] == ["".join(pieces[:2]), pieces[2]]
    assert counted == 1


def test_a_character_wider_than_the_room_is_an_error(base_coder: TextCoder) -> None:
    """Cutting can't go below a character; an endless loop or a lost one would be worse."""
    with pytest.raises(UserError, match="single character"):
        cut(base_coder, "x 👩‍🚀 y", 2)


@pytest.mark.parametrize("max_latent_tokens", [122, 123, 500])
def test_a_window_with_no_room_is_an_error(base_coder: TextCoder, max_latent_tokens: int) -> None:
    """Caught before the first document, with what to change. The window is 128, six tokens go
    to BOS, SoL, EoL, SoL, Post and the latent's EoL."""
    room = most_chunk_tokens(base_coder.window, max_latent_tokens)
    assert room == 122 - max_latent_tokens
    with pytest.raises(UserError, match="max_latent_tokens"):
        Chunker(SHORT, base_coder, room, seed=1)
    assert most_chunk_tokens(base_coder.window, 121) == 1


def test_a_documents_chunks_depend_on_nothing_else(base_coder: TextCoder) -> None:
    """SPEC 2: neither other documents nor their order change what a document draws."""
    text = " ".join(f"Sentence {n}." for n in range(40))
    documents = [Document(doc_id=f"d{i}", text=text, source="tests") for i in range(12)]

    def lengths(order: list[Document]) -> dict[str, list[int]]:
        chunker = Chunker(SHORT, base_coder, 100, seed=1)
        return {d.doc_id: [len(chunk.text) for chunk in chunker.chunks(d)] for d in order}

    together = lengths(documents)
    assert lengths(documents[::-1]) == together
    assert lengths([documents[7]]) == {"d7": together["d7"]}
    assert len({tuple(found) for found in together.values()}) > 6
    other = Chunker(SHORT, base_coder, 100, seed=2)
    assert any([len(c.text) for c in other.chunks(d)] != together[d.doc_id] for d in documents)


def test_impossible_lengths_are_an_error() -> None:
    """A mean of 0 or an empty range would only fail deep inside numpy."""
    for mean, least, most in ((0, 1, 2), (8, 0, 2), (8, 3, 2)):
        with pytest.raises(UserError, match="sentences"):
            Chunking(mean_sentences=mean, least_sentences=least, most_sentences=most)

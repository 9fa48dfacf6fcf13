"""Sentences and chunks: no text is lost, lengths are Poisson, chunks that are too long are cut."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tokenizers.models import Unigram

from boltlm.corpus import chunks
from boltlm.corpus.chunker import Chunker
from boltlm.corpus.chunks import (
    ChunkingConfig,
    chunk_length_distribution,
    sample_chunk_lengths,
    split_sentences,
)
from boltlm.errors import UserError
from boltlm.param_values import build
from boltlm.records import Chunk, Document
from boltlm.seeds import generator
from boltlm.tokens import EOL, SOL, SPECIAL_TOKENS, TextCoder, chunk_token_budget
from boltlm.training.base_model import load_checkpoint
from boltlm.training.tokenizer import remove_leading_space
from tests import reference, tiny

PAPER = ChunkingConfig(mean_sentences=8, min_sentences=1, max_sentences=20, from_source=())
SHORT = ChunkingConfig(mean_sentences=1.5, min_sentences=1, max_sentences=3, from_source=())

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
WORDS += [*SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<0x4", tiny.BOS]
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
        remove_leading_space(tokenizer)
    return TextCoder(tiny.coder_folder(tokenizer, tmp_path_factory.mktemp("coder")))


def chunk_text(
    coder: TextCoder,
    text: str,
    max_chunk_tokens: int,
    config: ChunkingConfig = SHORT,
) -> tuple[list[Chunk] | None, int]:
    """The chunks of a text, None if it cannot be reproduced, and the chunker's count of those that
    it had to cut."""
    chunker = Chunker(config, coder, max_chunk_tokens, seed=1)
    (chunk_list,) = chunker.chunks([Document(doc_id="d", text=text, source="tests")])
    return chunk_list, chunker.cut_chunks


def reproducible_chunks(
    coder: TextCoder,
    text: str,
    max_chunk_tokens: int,
    config: ChunkingConfig = SHORT,
) -> tuple[list[Chunk], int]:
    """The same for a text that can be reproduced."""
    chunk_list, cut_count = chunk_text(coder, text, max_chunk_tokens, config)
    assert chunk_list is not None
    return chunk_list, cut_count


def test_a_page_of_initials_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of names must not hang the stage: the search for an abbreviation examines the end
    of a sentence, and not the complete sentence again for each full stop."""
    examined: list[int] = []

    class RecordingPattern:
        def search(self, text: str) -> re.Match[str] | None:
            examined.append(len(text))
            return pattern.search(text)

    pattern = chunks._NO_END
    monkeypatch.setattr(chunks, "_NO_END", RecordingPattern())
    text = "A. " * 20_000
    assert "".join(split_sentences(text)) == text
    assert len(examined) == 20_000
    assert max(examined) <= 16


@given(TEXTS)
def test_sentences_join_back(text: str) -> None:
    """A byte that is lost between sentences is lost in every later stage."""
    pieces = split_sentences(text)
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
        ("你好。再见！真的？是的", ["你好。", "再见！", "真的？", "是的"]),
        ("." * 20_000, ["." * 20_000]),
        ("。" * 20_000, ["。" * 20_000]),
    ],
)
def test_sentences_end_where_a_reader_expects(text: str, pieces: list[str]) -> None:
    """Joining to the original text also holds for a text that is never split."""
    assert split_sentences(text) == pieces


def may_be_lossy(coder: TextCoder, text: str) -> bool:
    """The vocabulary of a Unigram model contains these strings, and it finds them in plain text."""
    is_unigram = isinstance(coder.tokenizer.model, Unigram)
    return is_unigram and any(name in text for name in ("<s>", "</s>"))


@given(text=TEXTS, max_chunk_tokens=st.integers(8, 40))
def test_chunks_reproduce_the_document(coder: TextCoder, text: str, max_chunk_tokens: int) -> None:
    """For every family of tokenizers: the chunks join to the text, their ids decode to it, each
    chunk fits, and text that looks like a special token stays text (docs/method.md, 2.3)."""
    chunk_list, _ = chunk_text(coder, text, max_chunk_tokens)
    if not chunk_list:
        assert not text or may_be_lossy(coder, text)
        return
    assert "".join(chunk.text for chunk in chunk_list) == text
    assert coder.decode([token for chunk in chunk_list for token in chunk.tokens]) == text
    assert [chunk.chunk for chunk in chunk_list] == list(range(len(chunk_list)))
    m = coder.special_tokens
    for chunk in chunk_list:
        assert list(chunk.tokens) == coder.encode(chunk.text)
        assert 1 <= len(chunk.tokens) <= max_chunk_tokens
        assert not {m.bos, m.eos, m.sol, m.eol, m.prior, m.post} & set(chunk.tokens)


@given(text=TEXTS, max_chunk_tokens=st.integers(8, 40))
def test_cuts_do_not_depend_on_what_is_known_of_the_tokens(
    coder: TextCoder, text: str, max_chunk_tokens: int
) -> None:
    """A text that is cut where its ids say that the limit is becomes the same chunks as one that is
    cut by encoding it again with each sentence."""
    chunker = Chunker(PAPER, coder, max_chunk_tokens, seed=1)
    sentences = split_sentences(text) * 3
    expected = chunker._expected(sentences, np.array(coder.encode("".join(sentences))))
    by_trial = list(chunker._cut(sentences, [None] * len(sentences)))
    assert list(chunker._cut(sentences, expected)) == by_trial
    assert "".join(by_trial) == "".join(sentences)


def test_the_bytes_of_tokens_are_those_of_the_text(coder: TextCoder) -> None:
    """They stand for decoding where the decoder only joins tokens."""
    text = "the 数 👩‍🚀 \x00 end. é\n\tof"
    tokens = coder.encode(text)
    assert coder.reproduces(text, tokens)
    assert not coder.reproduces(text, tokens[1:])
    if coder.token_bytes is not None:
        assert b"".join(coder.token_bytes[token] for token in tokens) == text.encode()
    else:
        assert isinstance(coder.tokenizer.model, Unigram)


def test_a_sentence_without_end_takes_linear_time(
    base_coder: TextCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of data without a full stop must not hang the stage."""
    encoded: list[int] = []
    encode = base_coder.encode

    def recording(text: str) -> list[int]:
        encoded.append(len(text))
        return encode(text)

    monkeypatch.setattr(base_coder, "encode", recording)
    text = " ".join(f"{n % 89} words" for n in range(5000))
    chunk_list, cut_count = reproducible_chunks(base_coder, text, 50)
    assert cut_count == 1
    assert "".join(chunk.text for chunk in chunk_list) == text
    assert min(len(chunk.tokens) for chunk in chunk_list[:-1]) > 40
    assert max(encoded) < len(text) / 10
    assert sum(encoded) < 30 * len(text)


def test_text_that_names_the_special_tokens_stays_text(coder: TextCoder) -> None:
    """A page about this project must not start a latent, and a page about SentencePiece must not
    end a document. Where the vocabulary allows no other encoding, such a page is dropped."""
    m = coder.special_tokens
    for text in (*SPECIAL_TOKENS, f"a{SOL}b{EOL}", "<s>", "a </s> b", tiny.BOS, tiny.EOS):
        chunk_list, _ = chunk_text(coder, text, 100)
        if chunk_list is None:
            assert may_be_lossy(coder, text)
            continue
        tokens = [token for chunk in chunk_list for token in chunk.tokens]
        assert coder.decode(tokens) == text
        assert not {m.bos, m.eos, m.sol, m.eol, m.prior, m.post} & set(tokens)


def test_a_run_of_rare_characters_can_be_cut(coder: TextCoder) -> None:
    """A tokenizer may assign one offset to the bytes of several unknown characters, as Unigram
    does, which fuses them. A page in another script must not stop the stage."""
    text = "the 数学は楽しい𐀀𐀀𐀀 end"
    chunk_list, cut_count = reproducible_chunks(coder, text, 8)
    assert "".join(chunk.text for chunk in chunk_list) == text
    assert cut_count == 1
    assert max(len(chunk.tokens) for chunk in chunk_list) <= 8


def test_encoding_alone_adds_no_space(coder: TextCoder) -> None:
    """The space that SentencePiece prepends would appear at the start of every chunk."""
    assert coder.decode([*coder.encode("th"), *coder.encode("e"), *coder.encode(" e")]) == "the e"


def test_text_that_cannot_be_reproduced_is_refused(tmp_path: Path) -> None:
    """SentencePiece reads ▁ as a space; a page that has one must be dropped, not changed."""
    tokenizer = tiny.sentencepiece_bpe()
    remove_leading_space(tokenizer)
    coder = TextCoder(tiny.coder_folder(tokenizer, tmp_path))
    assert chunk_text(coder, "a ▁ b", 50) == (None, 0)
    assert chunk_text(coder, "a \ud800 b", 50) == (None, 0)


def test_a_tokenizer_that_prepends_a_space_is_not_reversible(tmp_path: Path) -> None:
    """The property above depends on `remove_leading_space`."""
    coder = TextCoder(tiny.coder_folder(tiny.sentencepiece_bpe(), tmp_path))
    assert coder.decode([*coder.encode("a"), *coder.encode("b")]) == "a b"


@pytest.mark.parametrize(
    "config",
    [PAPER, ChunkingConfig(mean_sentences=8, min_sentences=2, max_sentences=10, from_source=())],
)
def test_lengths_are_a_truncated_poisson(config: ChunkingConfig) -> None:
    """Lengths outside the range are drawn again, so that no mass accumulates at its ends
    (docs/method.md, 2.2). χ² test at level 10⁻⁴."""
    count = 150_000
    lengths = sample_chunk_lengths(count, config, generator(1, "law"))
    assert sum(lengths) == count
    support = np.arange(config.min_sentences, config.max_sentences + 1)
    probabilities = stats.poisson.pmf(support, config.mean_sentences)
    probabilities /= probabilities.sum()
    np.testing.assert_allclose(chunk_length_distribution(config), probabilities, rtol=1e-12)
    seen = Counter(lengths[:-1])  # the last one takes the remainder
    assert set(seen) <= set(support.tolist())
    observed = np.array([seen[int(n)] for n in support])
    expected = probabilities * (len(lengths) - 1)
    assert reference.chi2(observed, expected) > 1e-4
    assert abs(observed[-1] - expected[-1]) <= 4 * np.sqrt(expected[-1]) + 1


@given(count=st.integers(0, 60), seed=st.integers(0, 1000))
def test_lengths_sum_to_the_document(count: int, seed: int) -> None:
    """The last chunk is shortened, never extended or dropped; only it may be below the minimum."""
    config = ChunkingConfig(mean_sentences=3, min_sentences=2, max_sentences=5, from_source=())
    lengths = sample_chunk_lengths(count, config, generator(seed, "lengths"))
    assert sum(lengths) == count
    assert all(2 <= length <= 5 for length in lengths[:-1])
    assert all(1 <= length <= 5 for length in lengths)


def test_chunks_are_whole_sentences(base_coder: TextCoder) -> None:
    """If everything fits, chunks end where sentences end, and their lengths are in range."""
    text = " ".join(f"Sentence number {n} is here." for n in range(200))
    chunk_list, cut_count = reproducible_chunks(base_coder, text, 10_000)
    ends = set(itertools.accumulate(map(len, split_sentences(text))))
    assert cut_count == 0
    assert set(itertools.accumulate(len(chunk.text) for chunk in chunk_list)) <= ends
    assert {len(split_sentences(chunk.text)) for chunk in chunk_list[:-1]} == {1, 2, 3}


@pytest.mark.parametrize("max_chunk_tokens", [1, 7, 30, 80])
def test_long_chunks_are_cut_and_counted(base_coder: TextCoder, max_chunk_tokens: int) -> None:
    """Nothing is truncated, and the count is the number of chunks that exceeded the limit."""
    text = " ".join(f"Sentence {n} has {'many ' * (n % 9)}words." for n in range(60))
    uncut, uncut_count = reproducible_chunks(base_coder, text, 10_000)
    chunk_list, cut_count = reproducible_chunks(base_coder, text, max_chunk_tokens)
    assert uncut_count == 0
    assert cut_count == sum(len(chunk.tokens) > max_chunk_tokens for chunk in uncut) > 0
    assert max(len(chunk.tokens) for chunk in chunk_list) <= max_chunk_tokens
    assert "".join(chunk.text for chunk in chunk_list) == text
    edges = set(itertools.accumulate(len(chunk.text) for chunk in uncut))
    assert edges <= set(itertools.accumulate(len(chunk.text) for chunk in chunk_list))


def test_a_long_chunk_is_cut_at_a_sentence_where_one_fits(base_coder: TextCoder) -> None:
    """A sentence is cut only if it does not fit by itself."""
    config = ChunkingConfig(mean_sentences=9, min_sentences=9, max_sentences=9, from_source=())
    pieces = ["One short.", " Two short.", " Three short."]
    limit = len(base_coder.encode("".join(pieces[:2])))
    chunk_list, cut_count = reproducible_chunks(base_coder, "".join(pieces), limit, config=config)
    assert [chunk.text for chunk in chunk_list] == ["".join(pieces[:2]), pieces[2]]
    assert cut_count == 1


PIECES = st.lists(st.text("ab.!? \n\té", max_size=12), min_size=1, max_size=8).filter(any)


@given(PIECES)
def test_the_pieces_of_a_document_are_its_chunks(base_coder: TextCoder, pieces: list[str]) -> None:
    """Exactly, wherever they end; only those without text cannot be chunks."""
    document = Document(
        doc_id="d",
        text="".join(pieces),
        source="tests",
        pieces=tuple(map(len, pieces)),
        thoughts=(None,) * len(pieces),
    )
    chunker = Chunker(SHORT, base_coder, 100, seed=1)
    assert [chunk.text for chunk in chunker.chunks([document])[0] or []] == [p for p in pieces if p]
    assert chunker.cut_chunks == 0


def test_a_piece_that_is_too_long_is_cut_at_a_sentence(base_coder: TextCoder) -> None:
    """The pieces around it stay whole."""
    pieces = ["One.", " Two is longer. Three is longer.", " Four"]
    document = Document(
        doc_id="d",
        text="".join(pieces),
        source="tests",
        pieces=tuple(map(len, pieces)),
        thoughts=(None,) * 3,
    )
    chunker = Chunker(SHORT, base_coder, len(base_coder.encode(" Three is longer.")), seed=1)
    texts = [chunk.text for chunk in chunker.chunks([document])[0] or []]
    assert texts == ["One.", " Two is longer.", " Three is longer.", " Four"]
    assert chunker.cut_chunks == 1


def test_a_character_that_does_not_fit_is_an_error(base_coder: TextCoder) -> None:
    """A character cannot be cut; an endless loop or a lost character would be worse."""
    with pytest.raises(UserError, match="single character"):
        chunk_text(base_coder, "x 👩‍🚀 y", 2)


@pytest.mark.parametrize("max_latent_tokens", [122, 123, 500])
def test_a_context_without_space_for_a_chunk_is_an_error(
    base_coder: TextCoder, max_latent_tokens: int
) -> None:
    """The error comes before the first document and names what to change. The context length is
    128; BOS, SoL, EoL, SoL, Post and the latent's EoL take six tokens."""
    token_budget = chunk_token_budget(base_coder.context_length, max_latent_tokens)
    assert token_budget == 122 - max_latent_tokens
    with pytest.raises(UserError, match="max_latent_tokens"):
        Chunker(SHORT, base_coder, token_budget, seed=1)
    assert chunk_token_budget(base_coder.context_length, 121) == 1


def test_a_documents_chunks_depend_on_nothing_else(base_coder: TextCoder) -> None:
    """Neither other documents nor their order change a document's chunks (docs/method.md, 2.5)."""
    text = " ".join(f"Sentence {n}." for n in range(40))
    documents = [Document(doc_id=f"d{i}", text=text, source="tests") for i in range(12)]

    def lengths(order: list[Document], seed: int = 1) -> dict[str, list[int]]:
        chunked = Chunker(SHORT, base_coder, 100, seed).chunks(order)
        pairs = zip(order, chunked, strict=True)
        return {d.doc_id: [len(chunk.text) for chunk in chunks or []] for d, chunks in pairs}

    together = lengths(documents)
    assert lengths(documents[::-1]) == together
    assert lengths([documents[7]]) == {"d7": together["d7"]}
    assert len({tuple(document_lengths) for document_lengths in together.values()}) > 6
    assert lengths(documents, seed=2) != together


def test_impossible_lengths_are_an_error() -> None:
    """Otherwise a mean of 0 or an empty range would fail inside numpy."""
    for mean, minimum, maximum in ((0, 1, 2), (8, 0, 2), (8, 3, 2)):
        lengths = {"mean_sentences": mean, "min_sentences": minimum, "max_sentences": maximum}
        with pytest.raises(UserError, match="sentences"):
            build(ChunkingConfig, {**lengths, "from_source": []}, "chunks")


@given(st.text(alphabet="ab .!?…。！？｡\"')」\n\tA1é", max_size=80))
def test_sentences_of_scripts_without_spaces(text: str) -> None:
    """No sentence goes on after 。 ！ ？ or ｡ and closing marks, and the text is restored."""
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    for sentence in sentences:
        assert not re.search(
            r"[。！？｡]+[\"'”’)\]」』）】》]*[^\s。！？｡\"'”’)\]」』）】》]", sentence
        )


def test_sentence_ends_in_chinese_text() -> None:
    """Also before a closing quotation mark, and without white space after them."""
    text = "他说：「好。」我们走吧！为什么？ 没有"
    assert split_sentences(text) == ["他说：「好。」", "我们走吧！", "为什么？", " 没有"]

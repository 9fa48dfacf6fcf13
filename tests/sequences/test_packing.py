"""Packing: no token is lost, repeated or shifted twice; modes and orders depend on their keys.

Shape suffixes: R training sequences of a dataset, L sequence length.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences import layouts, mixing, packing, store
from boltlm.sequences.formatter import SequenceFormatter
from boltlm.sequences.layouts import LatentPair, MixUnit, SequenceConfig
from boltlm.sequences.mixing import SequenceSource
from boltlm.sequences.packing import IGNORE_INDEX, PackedDataset
from boltlm.sequences.store import DocumentStore, TokenizedDocument
from boltlm.tokens import SpecialTokens

BOS, EOS, SOL, EOL, PRIOR, POST = range(1000, 1006)
SPECIAL = SpecialTokens(bos=BOS, eos=EOS, sol=SOL, eol=EOL, prior=PRIOR, post=POST)


def make_formatter(**changes: Any) -> SequenceFormatter:
    values: dict[str, Any] = {
        "special_tokens": SPECIAL,
        "sequence_format": "latent",
        "draws": "selected",
        "layout": "document",
        "context_loss": True,
        "context_chunks": 3,
        "token_budget": 100,
        "seed": 1,
    }
    return SequenceFormatter(**{**values, **changes})


def make_documents(count: int, num_chunks: int = 3) -> list[TokenizedDocument]:
    """Documents whose tokens identify document and chunk; every fourth chunk has no latent."""
    documents = []
    for d in range(count):
        pairs = [
            LatentPair([10 * d + c] * (c + 1), None if (d + c) % 4 == 3 else [500 + 10 * d + c])
            for c in range(num_chunks)
        ]
        documents.append(TokenizedDocument(f"d{d}", tuple(pairs)))
    return documents


def make_store(folder: Path, documents: Sequence[TokenizedDocument]) -> DocumentStore:
    return store.write_documents(folder / "documents", documents)


def epoch_tokens(
    formatter: SequenceFormatter, corpus: DocumentStore, epoch: int, scratch: Path
) -> np.ndarray:
    """All tokens of one epoch, in its order."""
    segments = SequenceSource(corpus, formatter).segments(epoch, scratch)
    return np.concatenate([segment.tokens for segment in segments])


def segments_in_order(
    formatter: SequenceFormatter, folder: Path, document: TokenizedDocument
) -> list[list[int]]:
    """The segments of one document, not shuffled."""
    corpus = make_store(folder, [document])
    segments = [
        formatter.segment(corpus, index, 0) for index in range(formatter.num_segments(corpus))
    ]
    return [np.concatenate(pieces).tolist() for pieces in segments if pieces]


def pack(folder: Path, sources: Sequence[SequenceSource], **options: Any) -> PackedDataset:
    """The sources packed with sequences of 8 tokens. `options`: epochs, tokens, vocab_size,
    mix_unit."""
    complete: dict[str, Any] = {"vocab_size": 2000, "epochs": None, "tokens": None, **options}
    return packing.pack_sequences(lambda _: sources, folder, sequence_length=8, seed=1, **complete)


def split_at_bos(stream: np.ndarray) -> list[tuple[int, ...]]:
    """The segments of a stream: each begins with BOS."""
    starts = np.flatnonzero(stream == BOS)
    assert starts[0] == 0
    return [tuple(segment.tolist()) for segment in np.split(stream, starts[1:])]


def unshuffled(stream: np.ndarray, sequence_length: int) -> PackedDataset:
    """The training sequences of a stream in the stream's order."""
    num_sequences = -(-(len(stream) - 1) // sequence_length)
    return PackedDataset(stream, sequence_length, np.arange(num_sequences), "tests")


@given(
    num_tokens=st.integers(2, 200), sequence_length=st.integers(2, 17), batch_size=st.integers(1, 5)
)
def test_sequences_hold_every_token_once(
    num_tokens: int, sequence_length: int, batch_size: int
) -> None:
    """Every token but the first is predicted once, from the token before it, and only the end of
    the last sequence is padded. A double shift or an off-by-one error in packing fails here."""
    stream = np.arange(1, num_tokens + 1, dtype=np.int32)
    dataset = unshuffled(stream, sequence_length)
    assert len(dataset) == -(-(num_tokens - 1) // sequence_length)
    steps = range(-(-len(dataset) // batch_size))
    batches = [dataset.batch(step, batch_size) for step in steps]
    inputs_RL = np.concatenate([inputs for inputs, _ in batches])
    labels_RL = np.concatenate([labels for _, labels in batches])
    assert inputs_RL.shape == labels_RL.shape == (len(dataset), sequence_length)
    labels, inputs = labels_RL.flatten(), inputs_RL.flatten()
    np.testing.assert_array_equal(labels[: num_tokens - 1], stream[1:])
    assert (labels[num_tokens - 1 :] == IGNORE_INDEX).all()
    assert len(labels) - (num_tokens - 1) < sequence_length
    np.testing.assert_array_equal(inputs[: num_tokens - 1], stream[:-1])
    num_targets = [int((labels_RL[step * batch_size :] != IGNORE_INDEX).sum()) for step in steps]
    assert [dataset.num_target_tokens(step, batch_size) for step in steps] == num_targets


def test_sequences_of_a_short_stream_by_hand() -> None:
    """One exact value, so that a shifted pair cannot satisfy the property above."""
    dataset = unshuffled(np.array([7, 8, 9, 5], dtype=np.uint16), 2)
    inputs_RL, labels_RL = dataset.batch(0, 2)
    assert labels_RL.tolist() == [[8, 9], [5, IGNORE_INDEX]]
    assert inputs_RL[0].tolist() == [7, 8]
    assert inputs_RL[1, 0] == 9
    assert (inputs_RL >= 0).all()


def test_the_order_of_sequences_depends_on_the_seed(tmp_path: Path) -> None:
    """A batch depends on (seed, step) alone, and each sequence is in one batch."""
    source = SequenceSource(make_store(tmp_path, make_documents(30)), make_formatter())
    dataset = pack(tmp_path, [source], epochs=2)
    again = packing.open_packed(tmp_path, 8, seed=1)
    other = packing.open_packed(tmp_path, 8, seed=2)
    np.testing.assert_array_equal(dataset.order, generator(1, "rows").permutation(len(dataset)))
    assert sorted(dataset.order) == sorted(other.order) == list(range(len(dataset)))
    assert list(dataset.order) != list(other.order)
    for step in (3, 0):
        np.testing.assert_array_equal(dataset.batch(step, 4), again.batch(step, 4))


@pytest.mark.parametrize("layout", ["document", "chunk"])
def test_an_epoch_holds_every_document_once(layout: str, tmp_path: Path) -> None:
    """No document is dropped or repeated, and each segment has the layout of its document with the
    modes of this epoch."""
    documents, formatter = make_documents(30), make_formatter(layout=layout)
    expected: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        modes = formatter.prior_modes(document.doc_id, 3, 2)
        if layout == "document":
            expected[tuple(layouts.format_document(SPECIAL, document.pairs, modes))] += 1
            continue
        for index, (pair, prior) in enumerate(zip(document.pairs, modes, strict=True)):
            context = [token for earlier in document.pairs[:index] for token in earlier.text]
            row = layouts.format_chunk_row(SPECIAL, context, pair, prior, index == 2)
            expected[tuple(row)] += 1
    corpus = make_store(tmp_path, documents)
    assert Counter(split_at_bos(epoch_tokens(formatter, corpus, 2, tmp_path))) == expected


def test_each_epoch_has_its_own_order(tmp_path: Path) -> None:
    """With a repeated order, the model could learn which document follows which."""
    documents, formatter = make_documents(30), make_formatter(sequence_format="raw")
    corpus = make_store(tmp_path, documents)
    first, again, second = (epoch_tokens(formatter, corpus, epoch, tmp_path) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert split_at_bos(first) != split_at_bos(second)
    assert sorted(split_at_bos(first)) == sorted(split_at_bos(second))
    stored_order = [(BOS, *(i for p in d.pairs for i in p.text), EOS) for d in documents]
    assert split_at_bos(first) != stored_order
    assert sorted(split_at_bos(first)) == sorted(stored_order)
    other_seed = make_formatter(sequence_format="raw", seed=2)
    assert split_at_bos(epoch_tokens(other_seed, corpus, 0, tmp_path)) != split_at_bos(first)


def test_raw_format_has_the_text_alone(tmp_path: Path) -> None:
    """The raw baseline must not see a latent or a latent mark, even where latents exist."""
    for sequence_format in ("raw", "paraphrase"):
        formatter = make_formatter(sequence_format=sequence_format)
        segments = segments_in_order(formatter, tmp_path, make_documents(1)[0])
        assert segments == [[BOS, 0, 1, 1, 2, 2, 2, EOS]]
        document = TokenizedDocument("d", (LatentPair([1, 2], [7]), LatentPair([3], None)))
        assert segments_in_order(formatter, tmp_path, document) == [[BOS, 1, 2, 3, EOS]]


def test_mixed_format_separates_texts_and_latents(tmp_path: Path) -> None:
    """The ablation: each chunk and each latent is a document of its own, and all of them appear."""
    document = TokenizedDocument(
        "d", (LatentPair([1, 2], [7]), LatentPair([3], None), LatentPair([4], [8, 9]))
    )
    expected = [[BOS, 1, 2, EOS], [BOS, 3, EOS], [BOS, 4, EOS], [BOS, 7, EOS], [BOS, 8, 9, EOS]]
    formatter = make_formatter(sequence_format="mixed")
    assert segments_in_order(formatter, tmp_path, document) == expected
    corpus = make_store(tmp_path, [document])
    stream = epoch_tokens(formatter, corpus, 0, tmp_path)
    assert sorted(split_at_bos(stream)) == sorted(map(tuple, expected))
    orders = set()
    for seed in range(8):
        seeded = make_formatter(sequence_format="mixed", seed=seed)
        orders.add(tuple(split_at_bos(epoch_tokens(seeded, corpus, 0, tmp_path))))
    assert len(orders) > 1


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_sources_keep_their_weights(weight: float, tmp_path: Path) -> None:
    """Each source has its fraction of the tokens all along the stream and complete epochs of its
    own; a budget of epochs counts those of the first source."""
    main = SequenceSource(
        make_store(tmp_path / "a", make_documents(40)), make_formatter(), 1 - weight
    )
    raw_documents = [
        TokenizedDocument(f"o{d}", (LatentPair([900 + d % 50] * (d % 7 + 1), None),))
        for d in range(25)
    ]
    raw = SequenceSource(
        make_store(tmp_path / "b", raw_documents), make_formatter(sequence_format="raw"), weight
    )
    dataset = pack(tmp_path, [main, raw], epochs=3)
    segments = split_at_bos(np.asarray(dataset.tokens))
    is_raw = np.array([segment[1] >= 900 and segment[1] < 1000 for segment in segments])
    lengths = np.array([len(segment) for segment in segments])
    raw_fraction = (lengths * is_raw).cumsum() / lengths.cumsum()
    assert np.abs(raw_fraction[len(segments) // 4 :] - weight).max() < 0.05
    main_epochs = [
        split_at_bos(epoch_tokens(main.formatter, main.store, epoch, tmp_path))
        for epoch in range(3)
    ]
    assert [segment for segment, raw in zip(segments, is_raw, strict=True) if not raw] == [
        segment for epoch in main_epochs for segment in epoch
    ]
    raw_segments = [segment for segment, raw in zip(segments, is_raw, strict=True) if raw]
    first_raw_epoch = split_at_bos(epoch_tokens(raw.formatter, raw.store, 0, tmp_path))
    assert sorted(raw_segments[:25]) == sorted(first_raw_epoch)


def test_sources_are_mixed_by_documents(tmp_path: Path) -> None:
    """A quarter of the documents by hand: after every three documents of ten tokens one of four,
    whatever their lengths; by tokens the same share needs more of the short ones."""
    long = [TokenizedDocument(f"l{d}", (LatentPair([d] * 8, None),)) for d in range(9)]
    short = [TokenizedDocument(f"s{d}", (LatentPair([900 + d] * 2, None),)) for d in range(5)]
    formatter = make_formatter(sequence_format="raw")
    main = SequenceSource(make_store(tmp_path / "a", long), formatter, 0.75)
    raw = SequenceSource(make_store(tmp_path / "b", short), formatter, 0.25)
    counts = {}
    for unit in get_args(MixUnit):
        segments = mixing.interleave([main, raw], tmp_path, 1, unit)
        lengths = [len(segment.tokens) for segment in segments]
        counts[unit] = lengths.count(10), lengths.count(4)
        if unit == "documents":
            # Documents of the first source, then one of the second as soon as it lags behind.
            assert lengths == [10, 4, 10, 10] + [10, 4, 10, 10] * 2
    assert counts == {"documents": (9, 3), "tokens": (9, 8)}
    by_documents = pack(tmp_path / "packed", [main, raw], epochs=1, mix_unit="documents")
    assert len(by_documents.tokens) == 9 * 10 + 3 * 4


def test_modes_are_fair_coins() -> None:
    """docs/method.md 3.1: half of the chunks train p, half train q; within 4 standard deviations
    of 20,000 draws. Successive draws are independent."""
    modes = [
        prior
        for epoch in range(10)
        for d in range(100)
        for prior in make_formatter().prior_modes(f"d{d}", 20, epoch)
    ]
    assert abs(sum(modes) - len(modes) / 2) < 4 * np.sqrt(len(modes)) / 2
    num_equal = sum(a == b for a, b in itertools.pairwise(modes))
    assert abs(num_equal - len(modes) / 2) < 4 * np.sqrt(len(modes)) / 2


def test_modes_depend_on_seed_epoch_document_and_chunk_alone() -> None:
    """Over the epochs a document is seen in both modes, and other documents change nothing."""
    names, formatter = [f"d{d}" for d in range(40)], make_formatter()
    modes = {name: formatter.prior_modes(name, 6, 0) for name in names}
    assert formatter.prior_modes("d7", 2, 0) == modes["d7"][:2]
    for other, epoch in ((formatter, 1), (make_formatter(seed=2), 0)):
        changed = [other.prior_modes(name, 6, epoch) != modes[name] for name in names]
        assert sum(changed) > 30
    assert len({tuple(document_modes) for document_modes in modes.values()}) > 20


def test_a_chunk_row_takes_the_context_that_fits(tmp_path: Path) -> None:
    """Layout `chunk`: context and chunk stay within the token budget, as in the E-step, and
    complete chunks are dropped."""
    document = TokenizedDocument(
        "d", (LatentPair([1] * 4, None), LatentPair([2] * 4, None), LatentPair([3] * 4, [9]))
    )
    for token_budget, context in ((12, [1] * 4 + [2] * 4), (11, [2] * 4), (7, [])):
        formatter = make_formatter(layout="chunk", token_budget=token_budget)
        rows = segments_in_order(formatter, tmp_path, document)
        assert all(sum(token in (1, 2, 3) for token in row) <= token_budget for row in rows)
        start = [BOS, *context, SOL]
        assert rows[2][: len(start)] == start
        assert rows[2].count(EOS) == 1
        assert rows[1].count(EOS) == 0
    formatter = make_formatter(layout="chunk", context_chunks=1)
    rows = segments_in_order(formatter, tmp_path, document)
    assert rows[2][:5] == [BOS, 2, 2, 2, 2]


@pytest.mark.parametrize("vocab_size", [2000, 40_000])
def test_context_without_a_loss(vocab_size: int, tmp_path: Path) -> None:
    """Layout `chunk` with `context_loss: false`: every token of a document is a label once in an
    epoch. Inputs and all other labels, SoL behind the context among them, are those of
    `context_loss: true`; a stream with small ids still has two bytes for a token."""
    numbers = itertools.count(1)
    documents = [
        TokenizedDocument(
            f"d{d}", [LatentPair([next(numbers) for _ in range(c + 3)], [1900]) for c in range(5)]
        )
        for d in range(12)
    ]
    corpus, epochs = make_store(tmp_path, documents), 2
    full, masked = (
        pack(
            tmp_path / str(context_loss),
            [SequenceSource(corpus, make_formatter(layout="chunk", context_loss=context_loss))],
            epochs=epochs,
            vocab_size=vocab_size,
        )
        for context_loss in (True, False)
    )
    inputs, labels = full.batch(0, len(full))
    same_inputs, fewer_labels = masked.batch(0, len(masked))
    np.testing.assert_array_equal(inputs, same_inputs)
    has_loss = fewer_labels != IGNORE_INDEX
    np.testing.assert_array_equal(fewer_labels[has_loss], labels[has_loss])
    assert (labels[~has_loss] < next(numbers)).all(), "only text and padding lack a loss"
    counts, full_counts = (Counter(array.flatten().tolist()) for array in (fewer_labels, labels))
    text = [token for d in documents for pair in d.pairs for token in pair.text]
    assert {counts[token] for token in text} == {epochs}
    assert max(full_counts[token] for token in text) > epochs
    assert all(counts[token] == full_counts[token] for token in (SOL, BOS, EOS, 1900))
    for step in (0, 1, 7):
        expected = (fewer_labels[step * 3 :] != IGNORE_INDEX).sum()
        assert masked.num_target_tokens(step, 3) == expected
    assert masked.tokens.itemsize == (2 if vocab_size == 2000 else 4)
    assert full.tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({"layout": "document"}, "24e7e0fa1ab5da1159d854f60345a985"),
        ({"layout": "chunk"}, "ed0c0bb6c3bc89ee090b220becd41370"),
        ({"layout": "chunk", "context_loss": False}, "9e22d7ec70a4b5aeaff80cee84599438"),
        ({"sequence_format": "mixed"}, "901c19c4ced5a486a5124d671eafc2e0"),
    ],
)
def test_a_stream_is_the_same_in_every_version(
    changes: dict[str, Any], digest: str, tmp_path: Path
) -> None:
    """Digests of streams from before `models.<name>.draws` existed. A change here means that
    results with the same params are no longer comparable."""
    source = SequenceSource(make_store(tmp_path, make_documents(30)), make_formatter(**changes))
    assert pack(tmp_path, [source], epochs=3).digest == digest


def test_the_layout_document_has_a_loss_on_every_token() -> None:
    """No token is repeated in it, so there is nothing to leave out."""
    with pytest.raises(UserError, match="context_loss must be true with the layout document"):
        SequenceConfig(sequence_length=8, layout="document", context_loss=False, mix_unit="tokens")


def test_context_stops_at_the_start_of_the_document(tmp_path: Path) -> None:
    """The chunks of all documents lie in one file; the first of a document has no context."""
    corpus = make_store(tmp_path, make_documents(5))
    formatter = make_formatter(layout="chunk", sequence_format="latent")
    for index in (0, 3, 6, 12):
        (row,) = formatter.segment(corpus, index, 0)
        assert list(row[:2]) == [BOS, SOL]


@pytest.mark.parametrize("sequence_format", ["latent", "raw", "mixed"])
def test_budgets_are_exact(sequence_format: str, tmp_path: Path) -> None:
    """Comparisons at equal numbers of tokens are only as good as the count, and a budget of three
    epochs is exactly three."""
    formatter = make_formatter(sequence_format=sequence_format)
    source = SequenceSource(make_store(tmp_path, make_documents(20)), formatter)
    epochs = [epoch_tokens(source.formatter, source.store, n, tmp_path) for n in range(4)]
    three_epochs = pack(tmp_path / "epochs", [source], epochs=3)
    np.testing.assert_array_equal(three_epochs.tokens, np.concatenate(epochs[:3]))
    assert source.num_tokens(3, tmp_path) == len(three_epochs.tokens)
    four_epochs = np.concatenate(epochs)
    for tokens in (2, 17, len(epochs[0]), len(epochs[0]) + 1, len(four_epochs) - 5):
        dataset = pack(tmp_path / str(tokens), [source], tokens=tokens)
        np.testing.assert_array_equal(dataset.tokens, four_epochs[:tokens])


@pytest.mark.parametrize("vocab_size", [2000, 100_000])
def test_ids_are_stored_in_the_smallest_integers(vocab_size: int, tmp_path: Path) -> None:
    """Two bytes for an id where they suffice, else four."""
    document = TokenizedDocument("d", (LatentPair([vocab_size - 1, 7], None),))
    source = SequenceSource(make_store(tmp_path, [document]), make_formatter(sequence_format="raw"))
    dataset = packing.pack_sequences(
        lambda _: [source],
        tmp_path,
        sequence_length=8,
        seed=1,
        vocab_size=vocab_size,
        epochs=1,
        tokens=None,
    )
    assert dataset.tokens.tolist() == [BOS, vocab_size - 1, 7, EOS]
    assert dataset.tokens.itemsize == (2 if vocab_size == 2000 else 4)


def test_a_complete_folder_is_not_packed_again(tmp_path: Path) -> None:
    """But the incomplete folder that a killed run left behind is packed anew."""
    source = SequenceSource(make_store(tmp_path, make_documents(5)), make_formatter())
    (tmp_path / packing.STREAM_FILE).write_bytes(b"incomplete")
    dataset = pack(tmp_path, [source], epochs=1)
    again = packing.pack_sequences(
        lambda _: pytest.fail("packed again"),  # pyright: ignore[reportArgumentType]
        tmp_path, sequence_length=8, seed=1, vocab_size=2000, epochs=1, tokens=None,
    )  # fmt: skip
    np.testing.assert_array_equal(dataset.tokens, again.tokens)
    assert dataset.digest == again.digest == packing.packing_stats(tmp_path)["digest"]


def test_a_corpus_without_documents_is_an_error(tmp_path: Path) -> None:
    """Else packing would never end: epochs without tokens never reach a number of tokens."""
    source = SequenceSource(make_store(tmp_path, []), make_formatter())
    with pytest.raises(UserError, match="no documents"):
        pack(tmp_path, [source], tokens=10)


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "lost"])
def test_a_damaged_stream_is_packed_again(damage: str, tmp_path: Path) -> None:
    """A power failure can leave a file shorter than it was, a disk can flip a bit."""
    source = SequenceSource(make_store(tmp_path, make_documents(5)), make_formatter())
    tokens = pack(tmp_path, [source], epochs=1).tokens.tolist()
    path = tmp_path / packing.STREAM_FILE
    content = path.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    damaged = {"empty": b"", "short": content[:20], "flipped": flipped}
    path.unlink()
    if damage in damaged:
        path.write_bytes(damaged[damage])
    assert pack(tmp_path, [source], epochs=1).tokens.tolist() == tokens


def test_a_budget_without_a_token_to_predict_is_an_error(tmp_path: Path) -> None:
    """A training of no step would publish its parent under another name."""
    source = SequenceSource(make_store(tmp_path, make_documents(5)), make_formatter())
    with pytest.raises(UserError, match="1 tokens leaves no token to predict"):
        pack(tmp_path, [source], tokens=1)


def test_two_sources_of_one_corpus_have_different_orders(tmp_path: Path) -> None:
    """Else a document's latents and its raw text would always be close together."""
    corpus = make_store(tmp_path, make_documents(50))
    formatter = make_formatter(sequence_format="raw")
    first, second = (
        split_at_bos(np.concatenate([segment.tokens for segment in source.segments(0, tmp_path)]))
        for source in (
            SequenceSource(corpus, formatter, 0.5, ()),
            SequenceSource(corpus, formatter, 0.5, ("raw",)),
        )
    )
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


@pytest.mark.parametrize("budget", [(None, None), (1, 10)])
def test_a_budget_is_either_epochs_or_tokens(
    budget: tuple[int | None, int | None], tmp_path: Path
) -> None:
    """With both or neither, it would be unclear which one counts."""
    source = SequenceSource(make_store(tmp_path, make_documents(2)), make_formatter())
    with pytest.raises(UserError, match="either epochs or tokens"):
        pack(tmp_path, [source], epochs=budget[0], tokens=budget[1])

"""The draws of a chunk that are trained on: merging and weights, the choice of an epoch, and the
weights of tokens in the loss."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.records import Chunk, Sample, TeacherLatent, write_shard
from boltlm.sequences import layouts, packing, store
from boltlm.sequences.draws import NEGLIGIBLE_WEIGHT, WeightedLatent, weighted_latents
from boltlm.sequences.layouts import LatentPair
from boltlm.sequences.packing import IGNORE_INDEX, SequenceSource
from boltlm.sequences.store import DocumentStore, TokenizedDocument
from tests.sequences.test_packing import (
    BOS,
    EOS,
    SPECIAL,
    epoch_tokens,
    make_formatter,
    pack,
    split_at_bos,
)

CHI_SQUARED_3 = 21.1  # 3 degrees of freedom: exceeded with a probability of 1e-4


def make_drawn(count: int, weights: np.ndarray, num_chunks: int = 3) -> list[TokenizedDocument]:
    """Documents whose chunks each have the latents (500), (501), …, with the weights
    `weights[document, chunk]`; the first one is selected."""
    return [
        TokenizedDocument(
            f"d{d}",
            [LatentPair([10 + c] * (c + 1), [500]) for c in range(num_chunks)],
            [
                [WeightedLatent([500 + k], float(w)) for k, w in enumerate(weights[d, c])]
                for c in range(num_chunks)
            ],
        )
        for d in range(count)
    ]


def chosen(corpus: DocumentStore, epochs: int, num_latents: int, **changes: Any) -> np.ndarray:
    """Which latent each chunk has in each epoch: [epoch, chunk, latent], one-hot."""
    formatter = make_formatter(draws="resampled", **changes)
    latents = [
        [
            corpus.latent(chunk, formatter.draw_of_epoch(corpus, chunk, epoch))
            for chunk in range(corpus.num_chunks)
        ]
        for epoch in range(epochs)
    ]
    return np.eye(num_latents)[np.array(latents)[:, :, 0] - 500]


# --- Distinct latents and their weights


def test_equal_latents_are_one_with_the_sum_of_their_weights() -> None:
    """By hand; an empty latent is a latent, and the order is that of the first draws."""
    log_w_K = np.log([1.0, 2.0, 4.0, 1.0]) - 700  # exp alone would be 0
    latents = weighted_latents([[7, 8], [], [7, 8], [7]], log_w_K, 0.0)
    assert [(np.asarray(z.latent).tolist(), z.weight) for z in latents] == [
        ([7, 8], pytest.approx(5 / 8)),
        ([], pytest.approx(2 / 8)),
        ([7], pytest.approx(1 / 8)),
    ]


def test_a_negligible_weight_becomes_zero() -> None:
    """The others are normalised again, so that a chunk always has the weight 1."""
    log_w_K = np.log([1.0, 3.0, 0.9 * 3 * NEGLIGIBLE_WEIGHT])
    weights = [z.weight for z in weighted_latents([[1], [2], [3]], log_w_K, NEGLIGIBLE_WEIGHT)]
    assert weights == [pytest.approx(0.25), pytest.approx(0.75), 0.0]
    kept = weighted_latents([[1], [2], [3]], log_w_K, 0.0)
    assert kept[2].weight == pytest.approx(2.7 * NEGLIGIBLE_WEIGHT / 4, rel=1e-3)


@given(
    log_w=st.lists(st.floats(-80, 80), min_size=1, max_size=6),
    latents=st.lists(st.lists(st.integers(0, 2), max_size=2), min_size=6, max_size=6),
)
def test_the_weights_of_a_chunk_have_the_sum_one(
    log_w: list[float], latents: list[list[int]]
) -> None:
    """For any draws, with and without the smallest ones."""
    for min_weight in (0.0, NEGLIGIBLE_WEIGHT):
        merged = weighted_latents(latents[: len(log_w)], np.array(log_w), min_weight)
        ids = [tuple(np.asarray(z.latent).tolist()) for z in merged]
        assert set(ids) == {tuple(latent) for latent in latents[: len(log_w)]}
        assert len(ids) == len(set(ids))
        assert sum(z.weight for z in merged) == pytest.approx(1.0)


@pytest.fixture
def corpus_folders(tmp_path: Path) -> tuple[Path, Path]:
    """The chunks of a document with three chunks, and draws for the first two of them."""
    chunks, latents = tmp_path / "chunks" / "em", tmp_path / "latents" / "em1"
    rows = [Chunk(doc_id="a", chunk=c, text="x", tokens=(c, c)) for c in range(3)]
    write_shard(chunks / "00000.parquet", Chunk, rows)
    samples = [
        Sample(
            doc_id="a", chunk=c, sample=k, latent="", tokens=tokens, finish="stop", log_q=-1.0,
            log_allowed=0.0, log_p_latent=-1.0, log_p_text=-1.0, log_weight=float(np.log(weight)),
            selected=selected,
        )
        for c, k, tokens, weight, selected in [
            (0, 0, (5,), 2.0, False),
            (0, 1, (6, 6), 1.0, True),
            (0, 2, (5,), 1.0, False),
            (1, 0, (), 1.0, True),
        ]
    ]  # fmt: skip
    write_shard(latents / "00000.parquet", Sample, samples)
    return chunks, latents


def test_the_draws_of_a_chunk_are_read_and_stored(
    corpus_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Besides the selected latent. A chunk without a latent has one draw of weight 1."""
    corpus = store.write_documents(tmp_path / "store", store.read_tokenized(*corpus_folders, 0.0))
    assert [corpus.latent(chunk) for chunk in range(3)] == [[6, 6], [], None]
    assert [corpus.draw_range(chunk) for chunk in range(3)] == [(0, 2), (2, 3), (3, 4)]
    assert [corpus.chunk_of(draw) for draw in range(4)] == [0, 0, 1, 2]
    latents = [corpus.pair(corpus.chunk_of(draw), draw).latent for draw in range(4)]
    assert latents == [[5], [6, 6], [], None]
    np.testing.assert_allclose(corpus.draw_weights, [0.75, 0.25, 1.0, 1.0])
    counts = corpus.counts()
    assert (counts["distinct_latents"], counts["negligible_latents"]) == (3, 0)
    assert counts["latent_tokens"] == 2


def test_a_run_on_the_selected_draws_stores_no_others(
    corpus_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Neither on disk nor in what the model folder says of its data."""
    corpus = store.write_documents(tmp_path / "store", store.read_tokenized(*corpus_folders))
    assert corpus.num_draws == 0
    assert (tmp_path / "store" / "draw_tokens").stat().st_size == 0
    assert "distinct_latents" not in corpus.counts()


def test_a_teacher_has_no_draws(corpus_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its table has no weights."""
    chunks, _ = corpus_folders
    written = TeacherLatent(doc_id="a", chunk=0, latent="x", tokens=(5,), reason=None)
    folder = tmp_path / "teacher" / "all"
    write_shard(folder / "00000.parquet", TeacherLatent, [written])
    with pytest.raises(UserError, match="is missing or differs"):
        list(store.read_tokenized(chunks, folder, 0.0))


# --- draws: resampled


def test_every_epoch_chooses_by_the_weights(tmp_path: Path) -> None:
    """docs/method.md, 3.5: over 3000 chunks the choice of each epoch has the distribution ŵ, and a
    latent without weight is never chosen."""
    weights = np.array([0.5, 0.3, 0.0, 0.15, 0.05])
    documents = make_drawn(1000, np.tile(weights, (1000, 3, 1)))
    corpus = store.write_documents(tmp_path, documents)
    for seed in (1, 2):
        counts = chosen(corpus, 8, 5, seed=seed).sum(1)
        assert not counts[:, 2].any()
        expected = 3000 * np.delete(weights, 2)
        chi_squared = ((np.delete(counts, 2, 1) - expected) ** 2 / expected).sum(1)
        assert chi_squared.max() < CHI_SQUARED_3


def test_over_the_epochs_a_latent_has_its_share(tmp_path: Path) -> None:
    """In 8 epochs a latent is chosen 8 ŵ times, give or take less than 2, and the counts scatter
    less than a third as much as with independent choices."""
    weights = np.random.default_rng(1).dirichlet(np.ones(4), (300, 3))
    corpus = store.write_documents(tmp_path, make_drawn(300, weights))
    expected = 8 * weights.reshape(900, 4)
    errors = chosen(corpus, 8, 4).sum(0) - expected
    assert np.abs(errors).max() < 2
    variance = (expected * (1 - expected / 8)).mean()
    assert (errors**2).mean() < variance / 3


def test_a_choice_depends_on_seed_epoch_document_and_chunk_alone(tmp_path: Path) -> None:
    """A resumed run, or one with other documents, chooses alike; chunks and seeds differ."""
    weights = np.full((40, 3, 4), 0.25)
    documents = make_drawn(40, weights)
    corpus = store.write_documents(tmp_path / "a", documents)
    fewer = store.write_documents(tmp_path / "b", documents[7:9])
    choices = chosen(corpus, 3, 4)
    np.testing.assert_array_equal(chosen(fewer, 3, 4), choices[:, 21:27])
    assert (chosen(corpus, 3, 4, seed=2) != choices).any(axis=(1, 2)).all()
    by_chunk = choices[0].argmax(1).reshape(40, 3)
    assert len({tuple(row) for row in by_chunk.tolist()}) > 20


@pytest.mark.parametrize("layout", ["document", "chunk"])
def test_an_epoch_has_the_latents_that_it_chose(layout: str, tmp_path: Path) -> None:
    """In both layouts, with as many tokens as the selected draws of the same length."""
    documents = make_drawn(30, np.full((30, 3, 4), 0.25))
    corpus = store.write_documents(tmp_path / "documents", documents)
    formatter = make_formatter(draws="resampled", layout=layout)
    for epoch in range(2):
        tokens = epoch_tokens(formatter, corpus, epoch, tmp_path)
        choices = chosen(corpus, 2, 4)[epoch].sum(0)
        assert [(tokens == 500 + k).sum() for k in range(4)] == choices.tolist()
        selected = make_formatter(layout=layout)
        assert len(epoch_tokens(selected, corpus, epoch, tmp_path)) == len(tokens)


# --- draws: weighted


def weighted_documents() -> list[TokenizedDocument]:
    """Three chunks: two distinct latents and one without weight; none; one latent."""
    pairs = [LatentPair([1, 2], [7]), LatentPair([3], None), LatentPair([4, 5, 6], [8, 9])]
    draws = [
        [WeightedLatent([7], 0.25), WeightedLatent([], 0.75), WeightedLatent([9], 0.0)],
        [],
        [WeightedLatent([8, 9], 1.0)],
    ]
    return [TokenizedDocument(f"d{d}", pairs, draws) for d in range(9)]


def expected_rows(doc_id: str, epoch: int) -> list[tuple[tuple[int, ...], float]]:
    """The rows of such a document in an epoch and their weights: every latent with a weight, all
    of a chunk in the same mode and behind the same context."""
    modes = make_formatter().prior_modes(doc_id, 3, epoch)
    first = [([1, 2], [7], 0.25), ([1, 2], [], 0.75)]
    rows = [
        (layouts.format_chunk_row(SPECIAL, [], LatentPair(x, z), modes[0], False), w)
        for x, z, w in first
    ]
    rows.append((layouts.format_chunk_row(SPECIAL, [1, 2], LatentPair([3], None), False, False), 1))
    pair = LatentPair([4, 5, 6], [8, 9])
    rows.append((layouts.format_chunk_row(SPECIAL, [1, 2, 3], pair, modes[2], True), 1))
    return [(tuple(row), float(w)) for row, w in rows]


def test_an_epoch_has_every_latent_with_its_weight(tmp_path: Path) -> None:
    """Each latent of a chunk in a row of its own, shuffled; those without weight have no row."""
    corpus = store.write_documents(tmp_path / "documents", weighted_documents())
    source = SequenceSource(corpus, make_formatter(draws="weighted", layout="chunk"))
    segments = [(tuple(s.tokens.tolist()), s.loss_weight) for s in source.segments(1, tmp_path)]
    rows = [row for d in range(9) for row in expected_rows(f"d{d}", 1)]
    assert Counter(segments) == Counter(rows)
    assert segments != rows
    assert corpus.counts()["negligible_latents"] == 9


@pytest.mark.parametrize("context_loss", [True, False])
def test_every_label_has_the_weight_of_its_row(context_loss: bool, tmp_path: Path) -> None:
    """Through packing, shuffling and padding; a row's BOS is a label too. Without the loss on the
    context its labels are missing, and no others."""
    corpus = store.write_documents(tmp_path / "documents", weighted_documents())
    formatter = make_formatter(draws="weighted", layout="chunk", context_loss=context_loss)
    source = SequenceSource(corpus, formatter)
    dataset = pack(tmp_path / "packed", [source], epochs=2)
    assert dataset.loss_weights is not None
    assert dataset.loss_weights.dtype == np.float32
    tokens = np.maximum(dataset.tokens, ~dataset.tokens.astype(np.int64))
    rows = split_at_bos(tokens)
    lengths = [len(row) for row in rows]
    weights = dataset.loss_weights[np.cumsum([0, *lengths[:-1]])]
    expected = [
        row for epoch in range(2) for d in range(9) for row in expected_rows(f"d{d}", epoch)
    ]
    assert Counter(zip(rows, weights.tolist(), strict=True)) == Counter(expected)
    np.testing.assert_array_equal(dataset.loss_weights, np.repeat(weights, lengths))
    inputs, labels, label_weights = dataset.batch(0, len(dataset))
    assert inputs.shape == labels.shape == label_weights.shape
    assert label_weights.dtype == np.float32
    for row, index in enumerate(dataset.order):
        part = slice(index * 8 + 1, index * 8 + 9)
        length = len(dataset.tokens[part])
        targets = np.where(dataset.tokens[part] < 0, IGNORE_INDEX, dataset.tokens[part])
        np.testing.assert_array_equal(labels[row, :length], targets)
        np.testing.assert_allclose(
            label_weights[row, :length] * dataset.loss_weights.mean(), dataset.loss_weights[part]
        )
        assert not label_weights[row, length:].any()
    assert (dataset.tokens < 0).any() == (not context_loss)
    assert dataset.mean_weight == pytest.approx(dataset.loss_weights.mean())


def test_budgets_count_the_tokens_of_all_rows(tmp_path: Path) -> None:
    """An epoch has more of them than one of the selected draws; a budget in tokens cuts the stream
    and its weights alike."""
    corpus = store.write_documents(tmp_path / "documents", weighted_documents())
    weighted = SequenceSource(corpus, make_formatter(draws="weighted", layout="chunk"))
    selected = SequenceSource(corpus, make_formatter(layout="chunk"))
    epoch = pack(tmp_path / "epoch", [weighted], epochs=1)
    assert len(epoch.tokens) == weighted.num_tokens(1, tmp_path) > selected.num_tokens(1, tmp_path)
    cut = pack(tmp_path / "cut", [weighted], tokens=50)
    assert epoch.loss_weights is not None
    assert cut.loss_weights is not None
    np.testing.assert_array_equal(cut.tokens, epoch.tokens[:50])
    np.testing.assert_array_equal(cut.loss_weights, epoch.loss_weights[:50])


def test_raw_documents_beside_it_have_the_weight_one(tmp_path: Path) -> None:
    """`mix_raw` with `draws: weighted`."""
    corpus = store.write_documents(tmp_path / "a", weighted_documents())
    documents = [TokenizedDocument(f"r{d}", [LatentPair([900, 901], None)]) for d in range(9)]
    raw_store = store.write_documents(tmp_path / "b", documents)
    raw = SequenceSource(raw_store, make_formatter(sequence_format="raw"), 0.5)
    main = SequenceSource(corpus, make_formatter(draws="weighted", layout="chunk"), 0.5)
    dataset = pack(tmp_path / "packed", [main, raw], epochs=1)
    assert dataset.loss_weights is not None
    is_raw = np.isin(dataset.tokens, [900, 901])
    assert is_raw.sum() > 20
    assert (dataset.loss_weights[is_raw] == 1).all()


def test_truncated_weights_are_packed_again(tmp_path: Path) -> None:
    """As a truncated stream is; and packing again gives the same bytes."""
    corpus = store.write_documents(tmp_path / "documents", weighted_documents())
    source = SequenceSource(corpus, make_formatter(draws="weighted", layout="chunk"))
    dataset = pack(tmp_path / "packed", [source], epochs=1)
    path = tmp_path / "packed" / packing.WEIGHTS_FILE
    complete = path.read_bytes()
    path.write_bytes(complete[:20])
    assert pack(tmp_path / "packed", [source], epochs=1).digest == dataset.digest
    assert path.read_bytes() == complete


def test_only_weighted_streams_have_weights(tmp_path: Path) -> None:
    """Other runs read and write as little as before."""
    corpus = store.write_documents(tmp_path / "documents", weighted_documents())
    for draws in ("selected", "resampled"):
        source = SequenceSource(corpus, make_formatter(draws=draws, layout="chunk"))
        dataset = pack(tmp_path / draws, [source], epochs=1)
        assert dataset.loss_weights is None
        assert len(dataset.batch(0, 2)) == 2
        assert not (tmp_path / draws / packing.WEIGHTS_FILE).exists()
        assert "weights_digest" not in packing.packing_stats(tmp_path / draws)
        assert {row[0] for row in split_at_bos(dataset.tokens)} == {BOS}
        assert (dataset.tokens == EOS).sum() == 9

"""Packing: no token is lost, doubled or shifted twice; coins and order keep their promises."""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.seeds import generator
from boltlm.sequences import layouts, packing, store
from boltlm.sequences.layouts import Pair
from boltlm.sequences.packing import IGNORED, Rows, SequenceConfig, Source, Writer
from boltlm.sequences.store import Store, Text
from boltlm.tokens import Markers

BOS, EOS, SOL, EOL, PRIOR, POST = range(1000, 1006)
M = Markers(bos=BOS, eos=EOS, sol=SOL, eol=EOL, prior=PRIOR, post=POST)


def writer(**changes: Any) -> Writer:
    values: dict[str, Any] = {
        "markers": M,
        "form": "latent",
        "layout": "document",
        "context_chunks": 3,
        "room": 100,
        "seed": 1,
    }
    return Writer(**{**values, **changes})


def texts(count: int, chunks: int = 3) -> list[Text]:
    """Documents with tokens that tell document and chunk; every fourth chunk has no latent."""
    made = []
    for d in range(count):
        pairs = [
            Pair([10 * d + c] * (c + 1), None if (d + c) % 4 == 3 else [500 + 10 * d + c])
            for c in range(chunks)
        ]
        made.append(Text(f"d{d}", tuple(pairs)))
    return made


def stored(folder: Path, documents: Sequence[Text]) -> Store:
    return store.write(folder / "documents", documents)


def epoch(made: Writer, corpus: Store, number: int, scratch: Path) -> np.ndarray:
    """All tokens of one epoch."""
    return np.concatenate(list(Source(corpus, made).epoch(number, scratch)))


def written(made: Writer, folder: Path, text: Text) -> list[list[int]]:
    """The runs of one document, not shuffled."""
    corpus = stored(folder, [text])
    pieces = [made.run(corpus, index, 0) for index in range(made.runs(corpus))]
    return [np.concatenate(run).tolist() for run in pieces if run]


def pack(folder: Path, sources: Sequence[Source], **budget: int | None) -> Rows:
    chosen: dict[str, Any] = {"epochs": None, "tokens": None, **budget}
    return packing.pack(lambda _: sources, folder, length=8, seed=1, vocabulary=2000, **chosen)


def runs(stream: np.ndarray) -> list[tuple[int, ...]]:
    """The stream cut before every BOS."""
    starts = np.flatnonzero(stream == BOS)
    assert starts[0] == 0
    return [tuple(run.tolist()) for run in np.split(stream, starts[1:])]


def plain(stream: np.ndarray, length: int) -> Rows:
    """Rows that are not shuffled."""
    return Rows(stream, length, np.arange(-(-(len(stream) - 1) // length)), "tests")


@given(count=st.integers(2, 200), length=st.integers(2, 17), batch=st.integers(1, 5))
def test_rows_hold_every_token_once(count: int, length: int, batch: int) -> None:
    """Every token but the first is predicted, once, right behind the tokens before it; only the
    end of the last row is padded. Shifting twice or packing off by one fails here."""
    stream = np.arange(1, count + 1, dtype=np.int32)
    made = plain(stream, length)
    assert len(made) == -(-(count - 1) // length)
    steps = range(-(-len(made) // batch))
    both = [made.batch(step, batch) for step in steps]
    inputs_RL = np.concatenate([one for one, _ in both])
    labels_RL = np.concatenate([other for _, other in both])
    assert inputs_RL.shape == labels_RL.shape == (len(made), length)
    labels, inputs = labels_RL.flatten(), inputs_RL.flatten()
    np.testing.assert_array_equal(labels[: count - 1], stream[1:])
    assert (labels[count - 1 :] == IGNORED).all()
    assert len(labels) - (count - 1) < length
    np.testing.assert_array_equal(inputs[: count - 1], stream[:-1])
    left = [int((labels_RL[step * batch :] != IGNORED).sum()) for step in steps]
    assert [made.predicted(step, batch) for step in steps] == left


def test_rows_of_a_short_stream_by_hand() -> None:
    """One exact value, so that the property above can't be satisfied by a shifted pair."""
    inputs_RL, labels_RL = plain(np.array([7, 8, 9, 5], dtype=np.uint16), 2).batch(0, 2)
    assert labels_RL.tolist() == [[8, 9], [5, IGNORED]]
    assert inputs_RL[0].tolist() == [7, 8]
    assert inputs_RL[1, 0] == 9
    assert (inputs_RL >= 0).all()


def test_rows_come_in_an_order_of_the_seeds(tmp_path: Path) -> None:
    """And a step's rows are found from (seed, step) alone, each row in one step."""
    made = pack(tmp_path, [Source(stored(tmp_path, texts(30)), writer())], epochs=2)
    again = packing.open_rows(tmp_path, 8, seed=1)
    other = packing.open_rows(tmp_path, 8, seed=2)
    np.testing.assert_array_equal(made.order, generator(1, "rows").permutation(len(made)))
    assert sorted(made.order) == sorted(other.order) == list(range(len(made)))
    assert list(made.order) != list(other.order)
    for step in (3, 0):
        np.testing.assert_array_equal(made.batch(step, 4), again.batch(step, 4))


@pytest.mark.parametrize("layout", ["document", "chunk"])
def test_an_epoch_holds_every_document_once(layout: str, tmp_path: Path) -> None:
    """Nothing is dropped or doubled, and each run is the layout of its document with this
    epoch's coins."""
    documents, made = texts(30), writer(layout=layout)
    wanted: Counter[tuple[int, ...]] = Counter()
    for text in documents:
        modes = made.prior_modes(text.doc_id, 3, 2)
        if layout == "document":
            wanted[tuple(layouts.document(M, text.pairs, modes))] += 1
            continue
        for index, (pair, prior) in enumerate(zip(text.pairs, modes, strict=True)):
            before = [token for earlier in text.pairs[:index] for token in earlier.text]
            wanted[tuple(layouts.row(M, before, pair, prior, index == 2))] += 1
    corpus = stored(tmp_path, documents)
    assert Counter(runs(epoch(made, corpus, 2, tmp_path))) == wanted


def test_epochs_come_in_orders_of_their_own(tmp_path: Path) -> None:
    """An order that repeats would let the model learn which page follows which."""
    documents, made = texts(30), writer(form="raw")
    corpus = stored(tmp_path, documents)
    first, again, second = (epoch(made, corpus, number, tmp_path) for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert runs(first) != runs(second)
    assert sorted(runs(first)) == sorted(runs(second))
    in_order = [(BOS, *(i for p in t.pairs for i in p.text), EOS) for t in documents]
    assert runs(first) != in_order
    assert sorted(runs(first)) == sorted(in_order)
    assert runs(epoch(writer(form="raw", seed=2), corpus, 0, tmp_path)) != runs(first)


def test_raw_is_the_text_alone(tmp_path: Path) -> None:
    """The raw arm must not see a latent or a mark, even where latents are there."""
    for form in ("raw", "paraphrase"):
        made = writer(form=form)
        assert written(made, tmp_path, texts(1)[0]) == [[BOS, 0, 1, 1, 2, 2, 2, EOS]]
        text = Text("d", (Pair([1, 2], [7]), Pair([3], None)))
        assert written(made, tmp_path, text) == [[BOS, 1, 2, 3, EOS]]


def test_mixed_unpairs_texts_and_latents(tmp_path: Path) -> None:
    """The ablation: each chunk and each latent is a document of its own, all of them there."""
    text = Text("d", (Pair([1, 2], [7]), Pair([3], None), Pair([4], [8, 9])))
    wanted = [[BOS, 1, 2, EOS], [BOS, 3, EOS], [BOS, 4, EOS], [BOS, 7, EOS], [BOS, 8, 9, EOS]]
    assert written(writer(form="mixed"), tmp_path, text) == wanted
    corpus = stored(tmp_path, [text])
    stream = epoch(writer(form="mixed"), corpus, 0, tmp_path)
    assert sorted(runs(stream)) == sorted(map(tuple, wanted))
    orders = {
        tuple(runs(epoch(writer(form="mixed", seed=s), corpus, 0, tmp_path))) for s in range(8)
    }
    assert len(orders) > 1


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_sources_keep_their_shares(share: float, tmp_path: Path) -> None:
    """Each source has its share of the tokens, all along the stream, and its own epochs whole; so
    many epochs are those of the first."""
    main = Source(stored(tmp_path / "a", texts(40)), writer(), 1 - share)
    other = [Text(f"o{d}", (Pair([900 + d % 50] * (d % 7 + 1), None),)) for d in range(25)]
    raw = Source(stored(tmp_path / "b", other), writer(form="raw"), share)
    made = pack(tmp_path, [main, raw], epochs=3)
    found = runs(np.asarray(made.tokens))
    of_raw = np.array([run[1] >= 900 and run[1] < 1000 for run in found])
    lengths = np.array([len(run) for run in found])
    so_far = (lengths * of_raw).cumsum() / lengths.cumsum()
    assert np.abs(so_far[len(found) // 4 :] - share).max() < 0.05
    alone = [runs(epoch(main.writer, main.store, number, tmp_path)) for number in range(3)]
    assert [run for run, told in zip(found, of_raw, strict=True) if not told] == [
        run for found in alone for run in found
    ]
    rest = [run for run, told in zip(found, of_raw, strict=True) if told]
    assert sorted(rest[:25]) == sorted(runs(epoch(raw.writer, raw.store, 0, tmp_path)))


def test_coins_are_fair() -> None:
    """SPEC 3: half of the chunks teach p, half teach q; within 4 standard deviations of 20,000."""
    coins = [
        prior
        for number in range(10)
        for d in range(100)
        for prior in writer().prior_modes(f"d{d}", 20, number)
    ]
    assert abs(sum(coins) - len(coins) / 2) < 4 * np.sqrt(len(coins)) / 2
    agree = sum(a == b for a, b in itertools.pairwise(coins))
    assert abs(agree - len(coins) / 2) < 4 * np.sqrt(len(coins)) / 2


def test_coins_depend_on_seed_epoch_document_and_chunk_alone() -> None:
    """A document sees both modes over epochs, and its neighbours change nothing."""
    names, made = [f"d{d}" for d in range(40)], writer()
    modes = {name: made.prior_modes(name, 6, 0) for name in names}
    assert made.prior_modes("d7", 2, 0) == modes["d7"][:2]
    for other, number in ((made, 1), (writer(seed=2), 0)):
        changed = [other.prior_modes(name, 6, number) != modes[name] for name in names]
        assert sum(changed) > 30
    assert len({tuple(found) for found in modes.values()}) > 20


def test_a_row_takes_the_context_that_fits(tmp_path: Path) -> None:
    """Layout `chunk`: context and chunk stay within the room, as in the E-step; whole chunks go."""
    text = Text("d", (Pair([1] * 4, None), Pair([2] * 4, None), Pair([3] * 4, [9])))
    for room, before in ((12, [1] * 4 + [2] * 4), (11, [2] * 4), (7, [])):
        found = written(writer(layout="chunk", room=room), tmp_path, text)
        assert all(sum(token in (1, 2, 3) for token in row) <= room for row in found)
        start = [BOS, *before, SOL]
        assert found[2][: len(start)] == start
        assert found[2].count(EOS) == 1
        assert found[1].count(EOS) == 0
    found = written(writer(layout="chunk", context_chunks=1), tmp_path, text)
    assert found[2][:5] == [BOS, 2, 2, 2, 2]


def test_context_ends_at_the_documents_edge(tmp_path: Path) -> None:
    """Chunks lie behind each other in one file; the first of a document has none before it."""
    corpus = stored(tmp_path, texts(5))
    made = writer(layout="chunk", form="latent")
    for index in (0, 3, 6, 12):
        (row,) = made.run(corpus, index, 0)
        assert list(row[:2]) == [BOS, SOL]


@pytest.mark.parametrize("form", ["latent", "raw", "mixed"])
def test_budgets_are_exact(form: str, tmp_path: Path) -> None:
    """Comparisons at equal tokens are only as good as the count; so many epochs are so many."""
    made = Source(stored(tmp_path, texts(20)), writer(form=form))
    epochs = [epoch(made.writer, made.store, number, tmp_path) for number in range(4)]
    three = pack(tmp_path / "epochs", [made], epochs=3)
    np.testing.assert_array_equal(three.tokens, np.concatenate(epochs[:3]))
    assert made.tokens(3, tmp_path) == len(three.tokens)
    whole = np.concatenate(epochs)
    for tokens in (2, 17, len(epochs[0]), len(epochs[0]) + 1, len(whole) - 5):
        found = pack(tmp_path / str(tokens), [made], tokens=tokens)
        np.testing.assert_array_equal(found.tokens, whole[:tokens])


@pytest.mark.parametrize("vocabulary", [2000, 100_000])
def test_ids_fit_into_the_file(vocabulary: int, tmp_path: Path) -> None:
    """Two bytes an id where they suffice, four where they do not."""
    text = Text("d", (Pair([vocabulary - 1, 7], None),))
    source = Source(stored(tmp_path, [text]), writer(form="raw"))
    made = packing.pack(
        lambda _: [source], tmp_path, length=8, seed=1, vocabulary=vocabulary, epochs=1, tokens=None
    )
    assert made.tokens.tolist() == [BOS, vocabulary - 1, 7, EOS]
    assert made.tokens.itemsize == (2 if vocabulary == 2000 else 4)


def test_what_is_packed_is_not_packed_again(tmp_path: Path) -> None:
    """Only when it was finished: a folder that a killed run left is written anew."""
    source = Source(stored(tmp_path, texts(5)), writer())
    (tmp_path / "stream").write_bytes(b"torn")
    made = pack(tmp_path, [source], epochs=1)
    again = packing.pack(
        lambda _: pytest.fail("packed again"),  # pyright: ignore[reportArgumentType]
        tmp_path, length=8, seed=1, vocabulary=2000, epochs=1, tokens=None,
    )  # fmt: skip
    np.testing.assert_array_equal(made.tokens, again.tokens)
    assert made.digest == again.digest == packing.facts(tmp_path)["digest"]


def test_a_corpus_without_documents_is_an_error(tmp_path: Path) -> None:
    """Epochs of nothing never reach a number of tokens."""
    with pytest.raises(UserError, match="no documents"):
        pack(tmp_path, [Source(stored(tmp_path, []), writer())], tokens=10)


@pytest.mark.parametrize("size", [0, 20])
def test_a_torn_stream_is_packed_again(size: int, tmp_path: Path) -> None:
    """A machine that went down can leave a file shorter than it was."""
    source = Source(stored(tmp_path, texts(5)), writer())
    whole = pack(tmp_path, [source], epochs=1).tokens.tolist()
    path = tmp_path / "stream"
    path.write_bytes(path.read_bytes()[:size])
    assert pack(tmp_path, [source], epochs=1).tokens.tolist() == whole


def test_a_budget_that_predicts_nothing_is_an_error(tmp_path: Path) -> None:
    """No step at all would copy the parent under another name."""
    source = Source(stored(tmp_path, texts(5)), writer())
    with pytest.raises(UserError, match="no token to predict"):
        pack(tmp_path, [source], tokens=1)


def test_two_sources_of_one_corpus_come_in_orders_of_their_own(tmp_path: Path) -> None:
    """Else a document's latents and its raw text would follow each other all along."""
    corpus, made = stored(tmp_path, texts(50)), writer(form="raw")
    first, beside = (
        runs(np.concatenate(list(Source(corpus, made, 0.5, extra).epoch(0, tmp_path))))
        for extra in ((), ("raw",))
    )
    assert sorted(first) == sorted(beside)
    assert sum(one == other for one, other in zip(first, beside, strict=True)) < 10


@pytest.mark.parametrize("budget", [(None, None), (1, 10)])
def test_a_budget_is_one_of_two(budget: tuple[int | None, int | None], tmp_path: Path) -> None:
    """Both or neither would make one of them a lie."""
    source = Source(stored(tmp_path, texts(2)), writer())
    with pytest.raises(UserError, match="either epochs or tokens"):
        pack(tmp_path, [source], epochs=budget[0], tokens=budget[1])


def test_a_row_has_two_tokens_or_more() -> None:
    """A row of one token teaches nothing about what follows what."""
    with pytest.raises(UserError, match="length"):
        SequenceConfig(length=1, layout="document")

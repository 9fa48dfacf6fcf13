"""Packing: no token is lost, doubled or shifted twice; coins and order keep their promises."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boltlm.errors import UserError
from boltlm.records import Chunk, Document, Sample, TeacherLatent, write_shard
from boltlm.sequences import layouts, packing
from boltlm.sequences.layouts import Pair
from boltlm.sequences.packing import IGNORED, SequenceConfig, Text, Writer
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


def corpus(count: int, chunks: int = 3) -> list[Text]:
    """Documents with tokens that tell document and chunk; every fourth chunk has no latent."""
    made = []
    for d in range(count):
        pairs = [
            Pair([10 * d + c] * (c + 1), None if (d + c) % 4 == 3 else [500 + 10 * d + c])
            for c in range(chunks)
        ]
        made.append(Text(f"d{d}", tuple(pairs)))
    return made


def runs(stream: np.ndarray) -> list[tuple[int, ...]]:
    """The stream cut before every BOS."""
    starts = np.flatnonzero(stream == BOS)
    assert starts[0] == 0
    return [tuple(run.tolist()) for run in np.split(stream, starts[1:])]


@given(count=st.integers(1, 200), length=st.integers(2, 17))
def test_rows_hold_every_token_once(count: int, length: int) -> None:
    """Every token but the first is predicted, once, right behind the tokens before it; only the
    end of the last row is padded. Shifting twice or packing off by one fails here."""
    stream = np.arange(1, count + 1, dtype=np.int32)
    inputs_RL, labels_RL = packing.rows(stream, length)
    assert inputs_RL.shape == labels_RL.shape == (-(-(count - 1) // length), length)
    labels, inputs = labels_RL.flatten(), inputs_RL.flatten()
    np.testing.assert_array_equal(labels[: count - 1], stream[1:])
    assert (labels[count - 1 :] == IGNORED).all()
    assert len(labels) - (count - 1) < length
    np.testing.assert_array_equal(inputs[: count - 1], stream[:-1])
    np.testing.assert_array_equal(
        inputs_RL[:, 1:][labels_RL[:, 1:] != IGNORED],
        labels_RL[:, :-1][labels_RL[:, 1:] != IGNORED],
    )


def test_rows_of_a_short_stream_by_hand() -> None:
    """One exact value, so that the property above can't be satisfied by a shifted pair."""
    inputs_RL, labels_RL = packing.rows(np.array([7, 8, 9, 5], dtype=np.int32), 2)
    assert labels_RL.tolist() == [[8, 9], [5, IGNORED]]
    assert inputs_RL[0].tolist() == [7, 8]
    assert inputs_RL[1, 0] == 9
    assert (inputs_RL >= 0).all()


@pytest.mark.parametrize("layout", ["document", "chunk"])
def test_an_epoch_holds_every_document_once(layout: str) -> None:
    """Nothing is dropped or doubled, and each run is the layout of its document with this
    epoch's coins."""
    texts, made = corpus(30), writer(layout=layout)
    wanted: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        modes = made.prior_modes(text, 2)
        if layout == "document":
            wanted[tuple(layouts.document(M, text.pairs, modes))] += 1
            continue
        for index, (pair, prior) in enumerate(zip(text.pairs, modes, strict=True)):
            before = [token for earlier in text.pairs[:index] for token in earlier.text]
            wanted[tuple(layouts.row(M, before, pair, prior, index == 2))] += 1
    assert Counter(runs(made.epoch(texts, 2))) == wanted


def test_epochs_come_in_orders_of_their_own() -> None:
    """An order that repeats would let the model learn which page follows which."""
    texts, made = corpus(30), writer(form="raw")
    first, again, second = made.epoch(texts, 0), made.epoch(texts, 0), made.epoch(texts, 1)
    np.testing.assert_array_equal(first, again)
    assert runs(first) != runs(second)
    assert sorted(runs(first)) == sorted(runs(second))
    assert runs(first) != [tuple(layouts.raw(M, [p.text for p in t.pairs])) for t in texts]
    assert runs(writer(form="raw", seed=2).epoch(texts, 0)) != runs(first)


def test_raw_is_the_text_alone() -> None:
    """The raw arm must not see a latent or a mark, even where latents are there."""
    assert writer(form="raw").write(corpus(1)[0], 0) == [[BOS, 0, 1, 1, 2, 2, 2, EOS]]
    text = Text("d", (Pair([1, 2], [7]), Pair([3], None)))
    assert writer(form="raw").write(text, 0) == [[BOS, 1, 2, 3, EOS]]


def test_mixed_unpairs_texts_and_latents() -> None:
    """The ablation: each chunk and each latent is a document of its own, all of them there."""
    text = Text("d", (Pair([1, 2], [7]), Pair([3], None), Pair([4], [8, 9])))
    wanted = [[BOS, 1, 2, EOS], [BOS, 3, EOS], [BOS, 4, EOS], [BOS, 7, EOS], [BOS, 8, 9, EOS]]
    assert writer(form="mixed").write(text, 0) == wanted
    stream = writer(form="mixed").epoch([text], 0)
    assert sorted(runs(stream)) == sorted(map(tuple, wanted))
    orders = {tuple(runs(writer(form="mixed", seed=s).epoch([text], 0))) for s in range(8)}
    assert len(orders) > 1


def test_coins_are_fair() -> None:
    """SPEC 3: half of the chunks teach p, half teach q; within 4 standard deviations of 20,000."""
    text = Text("d", tuple(Pair([1], [2]) for _ in range(20)))
    coins = [
        prior
        for epoch in range(10)
        for d in range(100)
        for prior in writer().prior_modes(Text(f"d{d}", text.pairs), epoch)
    ]
    assert abs(sum(coins) - len(coins) / 2) < 4 * np.sqrt(len(coins)) / 2
    agree = sum(a == b for a, b in itertools.pairwise(coins))
    assert abs(agree - len(coins) / 2) < 4 * np.sqrt(len(coins)) / 2


def test_coins_depend_on_seed_epoch_document_and_chunk_alone() -> None:
    """A document sees both modes over epochs, and its neighbours change nothing."""
    texts, made = corpus(40, chunks=6), writer()
    modes = {text.doc_id: made.prior_modes(text, 0) for text in texts}
    assert {t.doc_id: made.prior_modes(t, 0) for t in texts[::-1]} == modes
    shorter = Text("d7", texts[7].pairs[:2])
    assert made.prior_modes(shorter, 0) == modes["d7"][:2]
    for other, epoch in ((made, 1), (writer(seed=2), 0)):
        changed = [other.prior_modes(text, epoch) != modes[text.doc_id] for text in texts]
        assert sum(changed) > 30
    assert len({tuple(found) for found in modes.values()}) > 20


def test_a_row_takes_the_context_that_fits() -> None:
    """Layout `chunk`: context and chunk stay within the room, as in the E-step; whole chunks go."""
    text = Text("d", (Pair([1] * 4, None), Pair([2] * 4, None), Pair([3] * 4, [9])))
    for room, before in ((12, [1] * 4 + [2] * 4), (11, [2] * 4), (7, [])):
        rows = writer(layout="chunk", room=room).write(text, 0)
        assert all(sum(token in (1, 2, 3) for token in row) <= room for row in rows)
        start = [BOS, *before, SOL]
        assert rows[2][: len(start)] == start
        assert rows[2].count(EOS) == 1
        assert rows[1].count(EOS) == 0
    assert writer(layout="chunk", context_chunks=1).write(text, 0)[2][:5] == [BOS, 2, 2, 2, 2]


@pytest.mark.parametrize("form", ["latent", "raw", "mixed"])
def test_budgets_are_exact(form: str) -> None:
    """Comparisons at equal tokens are only as good as the count; so many epochs are so many."""
    texts, made = corpus(20), writer(form=form)
    epochs = [made.epoch(texts, epoch) for epoch in range(4)]
    np.testing.assert_array_equal(
        packing.stream(made, texts, epochs=3, tokens=None), np.concatenate(epochs[:3])
    )
    whole = np.concatenate(epochs)
    for tokens in (1, 17, len(epochs[0]), len(epochs[0]) + 1, len(whole) - 5):
        stream = packing.stream(made, texts, epochs=None, tokens=tokens)
        np.testing.assert_array_equal(stream, whole[:tokens])


@pytest.mark.parametrize("budget", [(None, None), (1, 10)])
def test_a_budget_is_one_of_two(budget: tuple[int | None, int | None]) -> None:
    """Both or neither would make one of them a lie."""
    with pytest.raises(UserError, match="either epochs or tokens"):
        packing.stream(writer(), corpus(2), epochs=budget[0], tokens=budget[1])


def test_a_row_has_two_tokens_or_more() -> None:
    """A row of one token teaches nothing about what follows what."""
    with pytest.raises(UserError, match="length"):
        SequenceConfig(length=1, layout="document")


def sample(doc_id: str, chunk: int, k: int, tokens: tuple[int, ...], selected: bool) -> Sample:
    return Sample(
        doc_id=doc_id, chunk=chunk, sample=k, latent="", tokens=tokens, finish="stop",
        log_q=-1.0, log_p_latent=-1.0, log_p_text=-1.0, log_weight=-1.0, selected=selected,
    )  # fmt: skip


def test_kept_latents_are_the_selected_ones(tmp_path: Path) -> None:
    """Of K draws only the selected one is trained on; a chunk without one is left bare."""
    folder = tmp_path / "latents" / "em1"
    drawn = [sample("a", 0, 0, (1,), False), sample("a", 0, 1, (2, 3), True)]
    write_shard(folder / "00000.parquet", Sample, drawn)
    others = [sample("b", 0, 0, (4,), False), sample("b", 1, 0, (), True)]
    write_shard(folder / "00001.parquet", Sample, others)
    assert packing.kept_latents(folder) == {("a", 0): (2, 3), ("b", 1): ()}


def test_kept_latents_are_what_the_teacher_wrote(tmp_path: Path) -> None:
    """Rows with a reason instead of a latent are chunks without one."""
    folder = tmp_path / "teacher" / "warmstart"
    wrote = TeacherLatent(doc_id="a", chunk=0, latent="x", tokens=(5, 6), reason=None)
    silent = TeacherLatent(doc_id="a", chunk=1, latent=None, tokens=None, reason="too_long")
    write_shard(folder / "00000.parquet", TeacherLatent, [wrote, silent])
    assert packing.kept_latents(folder) == {("a", 0): (5, 6)}


def test_latents_of_another_kind_of_table_are_an_error(tmp_path: Path) -> None:
    """`data: split/em` beside a latent format is a mistake that must not train raw."""
    page = Document(doc_id="a", text="x", source="tests")
    write_shard(tmp_path / "split" / "em" / "00000.parquet", Document, [page])
    with pytest.raises(UserError, match=r"split/em.*data/latents"):
        packing.kept_latents(tmp_path / "split" / "em")
    with pytest.raises(UserError, match="nowhere"):
        packing.kept_latents(tmp_path / "latents" / "nowhere")


def chunk(doc_id: str, index: int, tokens: tuple[int, ...]) -> Chunk:
    return Chunk(doc_id=doc_id, chunk=index, text="x", tokens=tokens)


def test_texts_pair_chunks_with_their_latents(tmp_path: Path) -> None:
    """Joined by document and chunk, across shards, in reading order."""
    first = [chunk("a", 0, (1,)), chunk("a", 1, (2, 2)), chunk("b", 0, (3,))]
    write_shard(tmp_path / "00000.parquet", Chunk, first)
    write_shard(tmp_path / "00001.parquet", Chunk, [chunk("c", 0, (4,))])
    latents = {("a", 1): (7, 7), ("c", 0): (), ("elsewhere", 0): (9,)}
    assert packing.texts(tmp_path, latents) == [
        Text("a", (Pair((1,), None), Pair((2, 2), (7, 7)))),
        Text("b", (Pair((3,), None),)),
        Text("c", (Pair((4,), ()),)),
    ]
    assert all(p.latent is None for text in packing.texts(tmp_path, {}) for p in text.pairs)
    with pytest.raises(UserError, match="no latent belongs"):
        packing.texts(tmp_path, {("elsewhere", 0): (9,)})

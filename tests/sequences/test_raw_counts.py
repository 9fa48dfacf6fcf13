"""The count of raw tokens by training sequence, compared with counts by hand."""

from pathlib import Path

import numpy as np
import pytest

from boltlm.sequences import packing, raw_counts
from boltlm.sequences.draws import WeightedLatent
from boltlm.sequences.layouts import LatentPair
from boltlm.sequences.packing import IGNORE_INDEX, PackedDataset, SequenceSource
from boltlm.sequences.raw_counts import RawTokenCounter, text_mask
from boltlm.sequences.store import TokenizedDocument
from tests.sequences.test_packing import (
    BOS,
    EOL,
    EOS,
    POST,
    PRIOR,
    SOL,
    SPECIAL,
    make_documents,
    make_formatter,
    make_store,
)

RAW_TOKENS = 30 * (1 + 2 + 3)  # of thirty documents of `make_documents`


def pack(folder: Path, sources: list[SequenceSource], **budget: int | None) -> PackedDataset:
    options = {"epochs": None, "tokens": None, **budget}
    return packing.pack_sequences(
        lambda _: sources,
        folder,
        sequence_length=8,
        seed=1,
        vocab_size=2000,
        count_raw_tokens=True,
        **options,
    )


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        ([BOS, 1, 2, 3, EOS], [0, 1, 1, 1, 0]),
        ([BOS, SOL, PRIOR, 9, 9, EOL, 1, 2, EOS], [0, 0, 0, 0, 0, 0, 1, 1, 0]),
        ([BOS, SOL, EOL, 1, 2, SOL, POST, 9, EOL, EOS], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]),
        ([BOS, 7, 8, SOL, EOL, 1, SOL, POST, 9, EOL], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
        ([BOS, ~7, ~8, SOL, PRIOR, 9, EOL, 1, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]),
        ([BOS, SOL, EOL, 1, SOL, PRIOR, 9, EOL, 2, EOS], [0, 0, 0, 1, 0, 0, 0, 0, 1, 0]),
    ],
    ids=["raw", "prior", "posterior", "context", "context without a loss", "two chunks"],
)
def test_what_is_raw_text_by_hand(segment: list[int], expected: list[int]) -> None:
    """The text of chunks: no latent, no special token, and no context, which is counted where it
    is a chunk of its own."""
    assert text_mask(SPECIAL, np.array(segment, np.int32)).astype(int).tolist() == expected


def test_a_stream_is_counted_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of three targets, the first token of the stream being none; the segments' ends and the
    blocks in which the counts are made fall within rows."""
    segments = [[BOS, 1, 2, EOS], [BOS, SOL, PRIOR, 9, EOL, 3, 4, 5], [BOS, 6], [BOS, 7]]
    for block in (1, 4, 1 << 20):
        monkeypatch.setattr(raw_counts, "_BLOCK", block)
        counter = RawTokenCounter(SPECIAL, 3)
        for index, segment in enumerate(segments):
            counter.add(np.array(segment, np.int32), has_text=index != 2)
        counter.write(tmp_path)
        counts = raw_counts.read_raw_counts(tmp_path)
        assert counts is not None
        # BOS | 1 2 EOS | BOS SOL PRIOR | 9 EOL 3 | 4 5 BOS | 6 BOS 7, where the 6 is a latent
        assert counts.tolist() == [2, 0, 1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"sequence_format": "raw"}, 1),
        ({"sequence_format": "mixed"}, 1),
        ({"sequence_format": "latent"}, 1),
        ({"sequence_format": "latent", "layout": "chunk"}, 1),
        ({"sequence_format": "latent", "layout": "chunk", "context_loss": False}, 1),
        ({"sequence_format": "paraphrase"}, 0),
    ],
)
def test_an_epoch_has_the_raw_tokens_of_the_corpus(
    changes: dict[str, object], factor: int, tmp_path: Path
) -> None:
    """In every format and layout; paraphrases are no raw text."""
    corpus = make_store(tmp_path, make_documents(30))
    dataset = pack(tmp_path, [SequenceSource(corpus, make_formatter(**changes))], epochs=2)
    steps = -(-len(dataset) // 4)
    assert dataset.num_raw_tokens(steps, 4) == 2 * RAW_TOKENS * factor
    assert dataset.num_raw_tokens(0, 4) == 0


def test_the_raw_tokens_of_some_steps_by_hand(tmp_path: Path) -> None:
    """Counted over the labels of the batches of these steps; the tokens of text are below 500."""
    corpus = make_store(tmp_path, make_documents(30))
    sources = [SequenceSource(corpus, make_formatter())]
    for folder, budget in (("epochs", {"epochs": 2}), ("cut", {"tokens": 333})):
        dataset = pack(tmp_path / folder, sources, **budget)
        counted, steps = 0, -(-len(dataset) // 3)
        for step in range(steps):
            assert dataset.num_raw_tokens(step, 3) == counted
            _, labels_BL = dataset.batch(step, 3)
            counted += int(((labels_BL < 500) & (labels_BL != IGNORE_INDEX)).sum())
        assert dataset.num_raw_tokens(steps, 3) == counted > 0


def test_text_counts_with_each_of_its_weighted_latents(tmp_path: Path) -> None:
    """Each of them has a sequence of its own in an epoch."""
    draws = [WeightedLatent((500,), 0.75), WeightedLatent((501,), 0.25)]
    document = TokenizedDocument("d", (LatentPair([1, 2, 3], [500]),), (draws,))
    source = SequenceSource(
        make_store(tmp_path, [document]), make_formatter(layout="chunk", draws="weighted")
    )
    assert pack(tmp_path, [source], epochs=1).num_raw_tokens(9, 1) == 2 * 3


def test_raw_documents_beside_paraphrases_count(tmp_path: Path) -> None:
    """The second source of a mix is raw text."""
    corpus = make_store(tmp_path, make_documents(30))
    paraphrases = SequenceSource(corpus, make_formatter(sequence_format="paraphrase"), 0.5)
    raw = SequenceSource(corpus, make_formatter(sequence_format="raw"), 0.5, ("raw",))
    dataset = pack(tmp_path, [paraphrases, raw], epochs=1)
    counted = dataset.num_raw_tokens(len(dataset), 1)
    assert abs(counted - RAW_TOKENS) <= 6  # one document more or less


def test_without_counting_there_is_no_file(tmp_path: Path) -> None:
    """Trainings without snapshots pack what they packed before."""
    source = SequenceSource(make_store(tmp_path, make_documents(5)), make_formatter())
    options = {"sequence_length": 8, "seed": 1, "vocab_size": 2000, "epochs": 1, "tokens": None}
    plain = packing.pack_sequences(lambda _: [source], tmp_path / "plain", **options)
    counted = pack(tmp_path / "counted", [source], epochs=1)
    assert plain.raw_counts is None
    assert not (tmp_path / "plain" / raw_counts.RAW_COUNTS_FILE).exists()
    assert plain.digest == counted.digest
    stats = [packing.packing_stats(tmp_path / name) for name in ("plain", "counted")]
    assert stats[0] == stats[1]

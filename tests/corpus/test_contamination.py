"""Contamination: the n-grams that training text shares with evaluation sets, counted exactly."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.corpus import contamination
from boltlm.corpus.contamination import Contamination, NgramHasher
from boltlm.errors import UserError
from boltlm.records import Document, read_table, shard_name, shard_paths
from boltlm.tokens import TextCoder
from tests.corpus.test_split import settings, split_into, split_params

Texts = dict[str, list[str]]
PLANTED = "the quick brown fox jumps over"  # six words


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def brute_force(sets: Texts, training: Texts, n: int) -> dict[str, int]:
    """The expected result of `counts`, from sets of tuples of words."""
    counts: dict[str, int] = {}
    training_ngrams = {g for texts in training.values() for text in texts for g in ngrams(text, n)}
    for name, items in sets.items():
        counts[f"contamination/{name}/items"] = len(items)
        counts[f"contamination/{name}/overlapping_items"] = sum(
            not training_ngrams.isdisjoint(ngrams(item, n)) for item in items
        )
        set_ngrams = {g for item in items for g in ngrams(item, n)}
        for corpus, texts in training.items():
            shared = sum(not set_ngrams.isdisjoint(ngrams(text, n)) for text in texts)
            counts[f"contamination/{name}/{corpus}/documents"] = shared
    return counts


def count_overlaps(sets: Texts, training: Texts, n: int) -> dict[str, int]:
    checker = Contamination(sets, list(training), n)
    for corpus, texts in training.items():
        shared_DS, matched_M = checker.ngrams.overlaps(texts)
        checker.add(corpus, shared_DS.sum(axis=0).tolist(), matched_M.tolist())
    return checker.counts()


def random_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Texts of a few words from a small vocabulary, so that some n-grams are shared. There are
    capitals, letters of one to four bytes, a letter whose lower case is two characters, unpaired
    surrogates, and words with a common prefix."""
    words = ["a", "A", "aa", "Bé", "bÉ", "中", "𝒳b", "İ", "_7", "ß", "\ud800", "...", "b"]
    separators = [" ", ", ", "\n", "-", " \ud800"]
    texts: list[str] = []
    for _ in range(count):
        length = int(rng.integers(0, 7))
        pairs = zip(rng.choice(words, length), rng.choice(separators, length), strict=True)
        texts.append("".join(word + separator for word, separator in pairs))
    return texts


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_those_of_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing is an optimisation that changes no count, however the texts are batched."""
    rng = np.random.default_rng(seed)
    sets = {name: random_texts(rng, 40) for name in ("one", "two")}
    training = {name: random_texts(rng, 60) for name in ("em", "raw", "none")}
    training["none"] = []
    monkeypatch.setattr(contamination, "_BATCH_CHARACTERS", [1, 50, 100_000][seed % 3])
    monkeypatch.setattr(contamination, "_FILTER_BITS", [2, 24][seed % 2])  # most pass, or few do
    expected = brute_force(sets, training, 3)
    assert count_overlaps(sets, training, 3) == expected
    assert 0 < expected["contamination/one/em/documents"] < 60
    assert 0 < expected["contamination/one/overlapping_items"] < 40


def test_each_document_is_checked_separately() -> None:
    """Documents are dropped by this result, which is in the order of the documents."""
    rng = np.random.default_rng(1)
    items, texts = random_texts(rng, 40), random_texts(rng, 200)
    checker = Contamination({"set": items}, ["em"], 3)
    set_ngrams = {g for item in items for g in ngrams(item, 3)}
    expected = [not set_ngrams.isdisjoint(ngrams(text, 3)) for text in texts]
    assert checker.ngrams.overlaps(texts)[0].any(axis=1).tolist() == expected
    assert True in expected
    assert False in expected


def test_the_hash_of_an_ngram_does_not_depend_on_its_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in a text so long that the tables of powers have to be extended."""
    monkeypatch.setattr(contamination, "_BATCH_CHARACTERS", 20)
    words = [f"word{i * i % 97}" for i in range(3000)]
    hashes, owners = NgramHasher(4).hash_ngrams([" ".join(words)])
    separate = [
        NgramHasher(4).hash_ngrams([" ".join(words[i : i + 4])])[0][0] for i in range(0, 2997, 111)
    ]
    assert hashes[::111].tolist() == separate
    assert len(hashes) == 2997
    assert not owners.any()


def test_case_and_punctuation_do_not_hide_an_overlap() -> None:
    """A sentence with other typography is the same sentence."""
    sets = {"set": ["Over — THE quick, brown\u00a0fox! (jumps)"]}
    assert count_overlaps(sets, {"em": [PLANTED]}, 5)["contamination/set/em/documents"] == 1
    assert count_overlaps(sets, {"em": [PLANTED]}, 6)["contamination/set/em/documents"] == 0


@pytest.mark.parametrize(
    ("items", "training"),
    [
        (["the quick brown", "fox jumps over"], [PLANTED]),
        ([PLANTED], ["the quick brown", "fox jumps over"]),
        (["brown fox"], ["the", "quick brown fox"]),
        (["", " . "], ["", " . "]),
        ([], [PLANTED]),
    ],
)
def test_no_ngram_spans_two_texts_and_short_texts_have_none(
    items: list[str], training: list[str]
) -> None:
    """The end of one text and the start of the next are not consecutive words."""
    assert count_overlaps({"set": items}, {"em": training}, 4) == {
        "contamination/set/items": len(items),
        "contamination/set/overlapping_items": 0,
        "contamination/set/em/documents": 0,
    }


def test_different_words_have_different_hashes() -> None:
    """The same letters in another order, at other positions or in other words are other n-grams."""
    words = [
        "".join(letters) for k in (1, 2, 3, 4) for letters in itertools.product("abé_0", repeat=k)
    ]
    texts = [*words, *(f"{a} {b}" for a, b in itertools.product(words[:150], repeat=2))]
    unigrams, _ = NgramHasher(1).hash_ngrams(texts[: len(words)])
    bigrams, _ = NgramHasher(2).hash_ngrams(texts)
    assert len(set(unigrams.tolist())) == len(words)
    assert len(set(bigrams.tolist())) == 150**2


TEXTS = [f"plain text number {n} which says {n * n} things of its own {n}." for n in range(15)]
TEXTS[1] = f"Once {PLANTED} a dog."
TEXTS[7] = "She sells nine duck eggs; nobody buys all of those duck eggs today."
TEXTS[10] = f"But, {PLANTED.upper()}!"
TEXTS[14] = "Nobody buys all of those."
CORPORA = {"base": 1, "raw": 4, "em": 5, "test": 3, "side": 2}  # consecutive ranges of TEXTS
# Text 1 of `raw` overlaps with text 10 of `test`; text 7 of `em` with text 14 of `side` and with an
# item of the benchmark.
EXPECTED = {
    "test/items": 3,
    "test/overlapping_items": 1,
    "test/raw/documents": 1,
    "test/em/documents": 0,
    "side/items": 2,
    "side/overlapping_items": 1,
    "side/raw/documents": 0,
    "side/em/documents": 1,
    "questions/items": 0,
    "questions/overlapping_items": 0,
    "questions/raw/documents": 0,
    "questions/em/documents": 0,
    "gsm8k/items": 2,
    "gsm8k/overlapping_items": 1,
    "gsm8k/raw/documents": 0,
    "gsm8k/em/documents": 1,
}


def contamination_params(folder: Path, shard_documents: int = 2, **changes: Any) -> dict[str, Any]:
    """Params with CORPORA and a benchmark in which an n-gram spans a question and its answer;
    `changes` replace keys of `split`."""
    folder.mkdir(exist_ok=True)
    items = [("How many?", "Two."), ("Nine duck", "eggs nobody buys\n#### all")]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in items]
    (folder / "bench.jsonl").write_text("\n".join(rows), encoding="utf-8")
    params = split_params(folder / "a.jsonl", TEXTS, CORPORA)
    del params["corpora"]["heldout"]
    params["split"] = {
        "shard_documents": shard_documents,
        "workers": 1,
        "ngram_size": 5,
        "drop_contaminated": False,
        **changes,
    }
    params["evaluate"] = {"corpus": "test", "extra_corpora": ["side"]}
    params["benchmarks"] = {"gsm8k": str(folder / "bench.jsonl")}
    return params


def contamination_counts(counts: dict[str, int | float]) -> dict[str, int | float]:
    prefix = "contamination/"
    return {k.removeprefix(prefix): v for k, v in counts.items() if k.startswith(prefix)}


def retained(folder: Path, name: str) -> list[int]:
    """The indices in TEXTS of the documents that were written."""
    documents = read_table(folder / "split" / name, Document)
    return [TEXTS.index(document.text) for document in documents]


@pytest.mark.parametrize("shard_documents", [1, 2, 100])
def test_split_counts_overlaps_with_evaluation_sets(
    base_coder: TextCoder, tmp_path: Path, shard_documents: int
) -> None:
    """For every set and every training corpus, zeros included, whatever the shards; without
    `drop_contaminated` nothing is dropped."""
    params = contamination_params(tmp_path, shard_documents)
    counts = split_into(tmp_path, params, base_coder)
    assert contamination_counts(counts) == EXPECTED
    assert not [name for name in counts if "dropped" in name]
    assert retained(tmp_path, "raw") == [1, 2, 3, 4]
    assert retained(tmp_path, "em") == [5, 6, 7, 8, 9]


def test_split_drops_contaminated_documents(base_coder: TextCoder, tmp_path: Path) -> None:
    """The counts include the dropped documents; held-out documents and other shards are
    unchanged."""
    everything = tmp_path / "everything"
    all_counts = split_into(everything, contamination_params(everything), base_coder)
    params = contamination_params(tmp_path, drop_contaminated=True)
    counts = split_into(tmp_path, params, base_coder)
    assert contamination_counts(counts) == EXPECTED
    assert retained(tmp_path, "raw") == [2, 3, 4]
    assert retained(tmp_path, "em") == [5, 6, 8, 9]
    assert retained(tmp_path, "test") == [10, 11, 12]
    assert retained(tmp_path, "side") == [13, 14]
    for name in ("raw", "em"):
        assert counts[f"{name}/dropped_contaminated"] == 1
        assert counts[f"{name}/documents"] == all_counts[f"{name}/documents"] - 1
        assert counts[f"{name}/tokens"] < all_counts[f"{name}/tokens"]
        assert counts[f"{name}/chunks"] < all_counts[f"{name}/chunks"]
    for folder in (tmp_path, everything):
        assert [path.name for path in shard_paths(folder / "chunks" / "em")] == [
            *map(shard_name, range(3))
        ]


def test_a_count_of_zero_dropped_documents_is_reported(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """A zero says that contamination was checked."""
    params = contamination_params(tmp_path, drop_contaminated=True, ngram_size=7)
    assert split_into(tmp_path, params, base_coder)["em/dropped_contaminated"] == 0


def test_a_corpus_that_is_dropped_completely_is_an_error(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """No document would remain to train on."""
    params = contamination_params(tmp_path, drop_contaminated=True, ngram_size=1)
    with pytest.raises(UserError, match=r"corpora\.raw: every document was dropped"):
        split_into(tmp_path, params, base_coder)


def test_questions_are_an_evaluation_set(base_coder: TextCoder, tmp_path: Path) -> None:
    """Prompt and answer are one text: a page that states the problem and its result overlaps."""
    params = contamination_params(tmp_path)
    params["questions"] = {
        "count": 2,
        "source": {
            "kind": "gsm8k",
            "path": str(tmp_path / "bench.jsonl"),
            "split": "test",
            "shuffle_buffer": 0,
        },
    }
    text = '{"question": "Nobody buys all of?", "answer": "#### those"}'
    (tmp_path / "bench.jsonl").write_text(f"{text}\n{text}\n", encoding="utf-8")
    counts = contamination_counts(split_into(tmp_path, params, base_coder))
    assert counts["questions/items"] == counts["questions/overlapping_items"] == 2
    assert counts["questions/em/documents"] == 1
    assert counts["questions/raw/documents"] == 0


def test_a_corpus_for_evaluation_is_not_training_text(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """It would overlap with itself and be dropped."""
    params = contamination_params(tmp_path, drop_contaminated=True)
    params["evaluate"]["extra_corpora"] = ["em", "test"]
    counts = split_into(tmp_path, params, base_coder)
    assert "contamination/em/em/documents" not in counts
    assert counts["contamination/em/items"] == counts["em/documents"] == 5


def test_an_evaluation_corpus_must_be_one_of_the_corpora(tmp_path: Path) -> None:
    """A misspelt name would otherwise not be checked for contamination."""
    params = contamination_params(tmp_path)
    params["evaluate"]["extra_corpora"] = ["side", "absent"]
    with pytest.raises(UserError, match=r"evaluate\.extra_corpora.*'absent'"):
        settings(params)

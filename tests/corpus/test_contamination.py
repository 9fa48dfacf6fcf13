"""Contamination: n-grams of words that training text shares with evaluation sets, to the letter."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.corpus import contamination
from boltlm.corpus.chunks import Chunker
from boltlm.corpus.contamination import Contamination, Hasher
from boltlm.corpus.split import split
from boltlm.errors import UserError
from boltlm.records import Document, read, shard_name, shards
from boltlm.tokens import TextCoder
from tests.corpus.test_split import LENGTHS, params_of

Texts = dict[str, list[str]]
PLANTED = "the quick brown fox jumps over"  # six words


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def brute_force(sets: Texts, training: Texts, n: int) -> dict[str, int]:
    """What `counts` must say, by sets of tuples."""
    found: dict[str, int] = {}
    for name, items in sets.items():
        found[f"contamination/{name}/items"] = len(items)
        everywhere = {g for texts in training.values() for text in texts for g in grams(text, n)}
        found[f"contamination/{name}/overlapping_items"] = sum(
            not everywhere.isdisjoint(grams(item, n)) for item in items
        )
        held = {g for item in items for g in grams(item, n)}
        for corpus, texts in training.items():
            shared = sum(not held.isdisjoint(grams(text, n)) for text in texts)
            found[f"contamination/{name}/{corpus}/documents"] = shared
    return found


def counted(sets: Texts, training: Texts, n: int) -> dict[str, int]:
    overlap = Contamination(sets.items(), list(training), n)
    for corpus, texts in training.items():
        overlap.repeats(corpus, texts)
    return overlap.counts()


def random_texts(draw: np.random.Generator, count: int) -> list[str]:
    """Runs of a few words, so that some are shared: capitals, letters of one to four bytes, one
    that is two when small, half a surrogate pair, and words that begin alike."""
    words = ["a", "A", "aa", "Bé", "bÉ", "中", "𝒳b", "İ", "_7", "ß", "\ud800", "...", "b"]
    marks = [" ", ", ", "\n", "-", " \ud800"]
    texts: list[str] = []
    for _ in range(count):
        length = int(draw.integers(0, 7))
        drawn = zip(draw.choice(words, length), draw.choice(marks, length), strict=True)
        texts.append("".join(word + mark for word, mark in drawn))
    return texts


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_what_brute_force_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes are an optimisation: they change nothing, wherever groups of texts are cut."""
    draw = np.random.default_rng(seed)
    sets = {name: random_texts(draw, 40) for name in ("one", "two")}
    training = {name: random_texts(draw, 60) for name in ("em", "raw", "none")}
    training["none"] = []
    monkeypatch.setattr(contamination, "_GROUP", [1, 50, 100_000][seed % 3])
    monkeypatch.setattr(contamination, "_TOP", [2, 24][seed % 2])  # most pass the look-up, or few
    wanted = brute_force(sets, training, 3)
    assert counted(sets, training, 3) == wanted
    assert 0 < wanted["contamination/one/em/documents"] < 60
    assert 0 < wanted["contamination/one/overlapping_items"] < 40


def test_each_document_is_judged_by_itself() -> None:
    """Dropping goes by these answers, in the order of the documents."""
    draw = np.random.default_rng(1)
    held, texts = random_texts(draw, 40), random_texts(draw, 200)
    overlap = Contamination([("set", held)], ["em"], 3)
    known = {g for item in held for g in grams(item, 3)}
    wanted = [not known.isdisjoint(grams(text, 3)) for text in texts]
    assert overlap.repeats("em", texts).tolist() == wanted
    assert True in wanted
    assert False in wanted


def test_a_text_longer_than_a_group_is_hashed_as_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An n-gram's hash must not depend on its place: a book's tables of powers have to grow."""
    monkeypatch.setattr(contamination, "_GROUP", 20)
    words = [f"word{i * i % 97}" for i in range(3000)]
    hashes, owners = Hasher(4).grams([" ".join(words)])
    alone = [Hasher(4).grams([" ".join(words[i : i + 4])])[0][0] for i in range(0, 2997, 111)]
    assert hashes[::111].tolist() == alone
    assert len(hashes) == 2997
    assert not owners.any()


def test_case_and_punctuation_do_not_hide_a_run() -> None:
    """A sentence that was set anew is the same sentence."""
    held = {"set": ["Over — THE quick, brown\u00a0fox! (jumps)"]}
    assert counted(held, {"em": [PLANTED]}, 5)["contamination/set/em/documents"] == 1
    assert counted(held, {"em": [PLANTED]}, 6)["contamination/set/em/documents"] == 0


@pytest.mark.parametrize(
    ("held", "training"),
    [
        (["the quick brown", "fox jumps over"], [PLANTED]),
        ([PLANTED], ["the quick brown", "fox jumps over"]),
        (["brown fox"], ["the", "quick brown fox"]),
        (["", " . "], ["", " . "]),
        ([], [PLANTED]),
    ],
)
def test_no_run_crosses_texts_and_a_short_text_has_none(
    held: list[str], training: list[str]
) -> None:
    """Two texts beside each other do not say what neither says."""
    found = counted({"set": held}, {"em": training}, 4)
    assert found == {
        "contamination/set/items": len(held),
        "contamination/set/overlapping_items": 0,
        "contamination/set/em/documents": 0,
    }


def test_different_words_have_different_hashes() -> None:
    """Equal letters in another order, at another place or in other words are other n-grams."""
    words = [
        "".join(letters) for k in (1, 2, 3, 4) for letters in itertools.product("abé_0", repeat=k)
    ]
    texts = [*words, *(f"{a} {b}" for a, b in itertools.product(words[:150], repeat=2))]
    one, _ = Hasher(1).grams(texts[: len(words)])
    two, _ = Hasher(2).grams(texts)
    assert len(set(one.tolist())) == len(words)
    assert len(set(two.tolist())) == 150**2


TEXTS = [f"plain text number {n} which says {n * n} things of its own {n}." for n in range(15)]
TEXTS[1] = f"Once {PLANTED} a dog."
TEXTS[7] = "She sells nine duck eggs; nobody buys all of those duck eggs today."
TEXTS[10] = f"But, {PLANTED.upper()}!"
TEXTS[14] = "Nobody buys all of those."
CORPORA = {"base": 1, "raw": 4, "em": 5, "test": 3, "side": 2}  # runs of TEXTS
WANTED = {  # text 1 is raw's and repeats test's 10; 7 is em's and repeats side's 14 and an item
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


def house(folder: Path, shard_documents: int = 2, **changes: Any) -> dict[str, Any]:
    """Params of CORPORA and a benchmark; an item's run goes from its question into its answer."""
    folder.mkdir(exist_ok=True)
    bench = [("How many?", "Two."), ("Nine duck", "eggs nobody buys\n#### all")]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in bench]
    (folder / "bench.jsonl").write_text("\n".join(rows), encoding="utf-8")
    params = params_of(folder / "a.jsonl", TEXTS, CORPORA)
    params["split"] = {
        "shard_documents": shard_documents,
        "overlap_words": 5,
        "drop_contaminated": False,
        **changes,
    }
    params["evaluate"] = {"corpus": "test", "beside": ["side", "absent"]}
    params["benchmarks"] = {"gsm8k": str(folder / "bench.jsonl")}
    return params


def run(params: dict[str, Any], coder: TextCoder, folder: Path) -> dict[str, int | float]:
    return split(params, Chunker(LENGTHS, coder, 100, seed=1), folder / "split", folder / "chunks")


def contaminated(counts: dict[str, int | float]) -> dict[str, int | float]:
    start = "contamination/"
    return {k.removeprefix(start): v for k, v in counts.items() if k.startswith(start)}


def kept(folder: Path, name: str) -> list[int]:
    return [TEXTS.index(document.text) for document in read(folder / "split" / name, Document)]


@pytest.mark.parametrize("shard_documents", [1, 2, 100])
def test_split_counts_what_repeats_an_evaluation_set(
    base_coder: TextCoder, tmp_path: Path, shard_documents: int
) -> None:
    """Every set against every training corpus, zeros told, whatever the shards; all is kept."""
    counts = run(house(tmp_path, shard_documents), base_coder, tmp_path)
    assert contaminated(counts) == WANTED
    assert not [name for name in counts if "left_out" in name]
    assert kept(tmp_path, "raw") == [1, 2, 3, 4]
    assert kept(tmp_path, "em") == [5, 6, 7, 8, 9]


def test_split_drops_what_repeats_an_evaluation_set(base_coder: TextCoder, tmp_path: Path) -> None:
    """The counts tell what was found before; held-out documents stay, and other shards do too."""
    whole = run(house(tmp_path / "whole"), base_coder, tmp_path / "whole")
    counts = run(house(tmp_path, drop_contaminated=True), base_coder, tmp_path)
    assert contaminated(counts) == WANTED
    assert kept(tmp_path, "raw") == [2, 3, 4]
    assert kept(tmp_path, "em") == [5, 6, 8, 9]
    assert kept(tmp_path, "test") == [10, 11, 12]
    assert kept(tmp_path, "side") == [13, 14]
    for name in ("raw", "em"):
        assert counts[f"{name}/left_out_contaminated"] == 1
        assert counts[f"{name}/documents"] == whole[f"{name}/documents"] - 1
        assert counts[f"{name}/tokens"] < whole[f"{name}/tokens"]
        assert counts[f"{name}/chunks"] < whole[f"{name}/chunks"]
    for folder in (tmp_path, tmp_path / "whole"):
        assert [path.name for path in shards(folder / "chunks" / "em")] == [
            *map(shard_name, range(3))
        ]


def test_nothing_to_drop_is_told(base_coder: TextCoder, tmp_path: Path) -> None:
    """A zero says that it was looked for."""
    params = house(tmp_path, drop_contaminated=True, overlap_words=7)
    assert run(params, base_coder, tmp_path)["em/left_out_contaminated"] == 0


def test_a_corpus_that_is_dropped_whole_is_an_error(base_coder: TextCoder, tmp_path: Path) -> None:
    """There is nothing left to train on."""
    params = house(tmp_path, drop_contaminated=True, overlap_words=1)
    with pytest.raises(UserError, match=r"corpora\.raw: every document was left out"):
        run(params, base_coder, tmp_path)


def test_questions_are_an_evaluation_set(base_coder: TextCoder, tmp_path: Path) -> None:
    """Prompt and answer together: a page of the same problem, with its result, repeats it."""
    params = house(tmp_path)
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
    found = contaminated(run(params, base_coder, tmp_path))
    assert found["questions/items"] == found["questions/overlapping_items"] == 2
    assert found["questions/em/documents"] == 1
    assert found["questions/raw/documents"] == 0


def test_a_corpus_that_is_measured_on_is_not_training_text(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """It would repeat itself, and be dropped."""
    params = house(tmp_path, drop_contaminated=True)
    params["evaluate"]["beside"] = ["em", "test"]
    found = run(params, base_coder, tmp_path)
    assert "contamination/em/em/documents" not in found
    assert found["contamination/em/items"] == found["em/documents"] == 5


def test_a_corpus_with_a_benchmark_s_name_is_an_error(
    base_coder: TextCoder, tmp_path: Path
) -> None:
    """The counts of one would stand under the other's name."""
    params = house(tmp_path)
    params["corpora"]["gsm8k"] = params["corpora"].pop("side")
    params["evaluate"]["beside"] = ["gsm8k"]
    with pytest.raises(UserError, match=r"two evaluation sets are called 'gsm8k'"):
        run(params, base_coder, tmp_path)


@pytest.mark.parametrize("overlap_words", [0, -1])
def test_no_words_are_no_run(base_coder: TextCoder, tmp_path: Path, overlap_words: int) -> None:
    """Every text would share the empty run."""
    with pytest.raises(UserError, match=r"split: overlap_words must be 1 or more"):
        run(house(tmp_path, overlap_words=overlap_words), base_coder, tmp_path)

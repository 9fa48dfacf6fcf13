"""Training text that repeats an evaluation set: the documents and items that share a run of words.

A word is what `\\w+` finds in the lower-case text. An n-gram is n words in a row of one text, known
by 64 bits: two that differ are taken for one with probability 2^-64 a pair, in all 1e-3 for 1e10
words of training text against 2e6 of evaluation sets.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from boltlm.errors import UserError
from boltlm.progress import track

_LETTER, _WORD = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # ≡ 5 mod 8: powers mod 2^64 last longest
_UNICODE = 0x110000  # code points
_GROUP = 100_000  # characters hashed at once; they and what is made of them fit a core's cache
_TOP = 24  # bits of a hash that are looked up first; few n-grams of training text pass


class Contamination:
    """What the training corpora share with evaluation sets, asked document by document.

    `sets`: names with the texts of their items, read once; `training`: the corpora to be asked
    about, which have their counts also where nothing is found. Raises UserError for two sets of one
    name.
    """

    def __init__(
        self, sets: Iterable[tuple[str, Iterable[str]]], training: Sequence[str], words: int
    ) -> None:
        self.hasher = Hasher(words)
        self.sizes: dict[str, int] = {}
        grams, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.intp)]
        total = 0
        for name, texts in sets:
            if name in self.sizes:
                raise UserError(f"two evaluation sets are called '{name}'; rename that corpus")
            self.sizes[name] = 0
            shown = track(texts, what=f"n-grams of {name}", total=None, unit="items")
            for group in _groups(shown):
                hashes, owners = self.hasher.grams(group)
                grams.append(hashes)
                items.append(owners + total)
                self.sizes[name] += len(group)
                total += len(group)
        # Sorted n-grams G; an entry E says that the item `items[e]` holds the n-gram `entries[e]`.
        self.items_E = np.concatenate(items)
        self.grams_G, self.entries_E = np.unique(np.concatenate(grams), return_inverse=True)
        self.found_G = np.zeros(len(self.grams_G), bool)
        self.set_of_item = np.repeat(np.arange(len(self.sizes)), list(self.sizes.values()))
        self.sets_GS = np.zeros((len(self.grams_G), len(self.sizes)), bool)
        self.sets_GS[self.entries_E, self.set_of_item[self.items_E]] = True
        self.known = np.zeros(2**_TOP, bool)
        self.known[_top(self.grams_G)] = True
        self.documents = {name: np.zeros(len(self.sizes), np.int64) for name in training}

    def repeats(self, corpus: str, texts: Sequence[str]) -> np.ndarray:
        """For each of these documents of a training corpus, whether it shares an n-gram with any
        set; they, and the items that they repeat, are counted."""
        shared_DS = np.zeros((len(texts), len(self.sizes)), bool)
        start = 0
        for group in _groups(texts):
            hashes, owners = self.hasher.grams(group)
            maybe = np.flatnonzero(self.known[_top(hashes)])
            places = np.searchsorted(self.grams_G, hashes[maybe])
            places = np.minimum(places, len(self.grams_G) - 1)
            same = self.grams_G[places] == hashes[maybe]
            places, owners = places[same], owners[maybe][same]
            self.found_G[places] = True
            np.logical_or.at(shared_DS, start + owners, self.sets_GS[places])
            start += len(group)
        self.documents[corpus] += shared_DS.sum(axis=0)
        return np.logical_or.reduce(shared_DS, axis=1)

    def counts(self) -> dict[str, int]:
        """Of every set: its items, those found so far, and each corpus's overlapping documents."""
        found = np.zeros(len(self.set_of_item), bool)
        found[self.items_E[self.found_G[self.entries_E]]] = True
        overlapping = np.bincount(self.set_of_item[found], minlength=len(self.sizes))
        counts: dict[str, int] = {}
        for index, (name, size) in enumerate(self.sizes.items()):
            counts[f"contamination/{name}/items"] = size
            counts[f"contamination/{name}/overlapping_items"] = int(overlapping[index])
            for corpus, documents_S in self.documents.items():
                counts[f"contamination/{name}/{corpus}/documents"] = int(documents_S[index])
        return counts


class Hasher:
    """Texts to the hashes of their n-grams, without a Python object for a word.

    A word is hashed by a polynomial of its characters, an n-gram by one of its words.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.letter, self.word = _Powers(_LETTER), _Powers(_WORD)

    def grams(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(hash, index of its text) of every n-gram in order."""
        lower = [text.lower() for text in texts]
        joined = " ".join(("", *lower, ""))
        # JSON can hold half a surrogate pair; it is no letter, and no reason to stop.
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        letters = _letters()[characters]
        inside = letters != 0
        edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        starts, ends = edges[::2], edges[1::2]
        words = _mixed(self.letter.sums(letters, starts, ends))
        behind = np.searchsorted(starts, np.cumsum([len(text) + 1 for text in lower]))
        owners = np.repeat(np.arange(len(texts)), np.diff(behind, prepend=0))
        first = np.arange(max(len(words) - self.words + 1, 0))
        whole = first[owners[first] == owners[first + self.words - 1]]
        return self.word.sums(words, whole, whole + self.words), owners[whole]


class _Powers:
    """The powers of an odd base and of its inverse mod 2^64, as many as were needed so far."""

    def __init__(self, base: int) -> None:
        self.steps = (base, pow(base, -1, 2**64))
        self._reach(2 * _GROUP)

    def _reach(self, count: int) -> None:
        tables = (np.full(count, step, np.uint64) for step in self.steps)
        self.up, self.down = (np.multiply.accumulate(table) for table in tables)

    def sums(self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Σ_k values[start + k] · base^k mod 2^64 over each run [start, end)."""
        if len(values) > len(self.up):
            self._reach(2 * len(values))
        totals = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * self.up[: len(values)], out=totals[1:])
        return (totals[ends] - totals[starts]) * self.down[starts]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= _GROUP:
            yield held
            held, size = [], 0
    if held:
        yield held


def _top(hashes: np.ndarray) -> np.ndarray:
    return hashes >> np.uint64(64 - _TOP)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: words that differ in a letter have nothing left in common."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _letters() -> np.ndarray:
    """A uint64 for each code point; 0 for those that are in no word."""
    inside = [chr(code).isalnum() or chr(code) == "_" for code in range(_UNICODE)]
    return np.where(inside, _mixed(np.arange(1, _UNICODE + 1, dtype=np.uint64)), np.uint64(0))

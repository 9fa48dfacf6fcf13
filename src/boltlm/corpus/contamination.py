"""Contamination: which training documents and evaluation items share an n-gram of words.

A word is a match of `\\w+` in the lower-case text. An n-gram consists of n consecutive words of one
text and is represented by a 64-bit hash. Two different n-grams have the same hash with probability
2^-64; for 1e10 words of training text and 2e6 words of evaluation sets the probability that any
pair collides is about 1e-3.

Shape suffixes: D documents, E entries (occurrences of n-grams in evaluation items), G distinct
n-grams of the evaluation sets, I items of all sets, M n-grams of a batch that match, S sets.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Bases of the polynomial hashes; numbers ≡ 5 mod 8 have the largest order modulo 2^64.
_CHARACTER_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95
_CODE_POINTS = 0x110000
_BATCH_CHARACTERS = 100_000  # hashed at once, so that the intermediate arrays fit a core's cache
_FILTER_BITS = 24  # leading bits of a hash; the filter rejects most n-grams of training text


class EvaluationNgrams:
    """The distinct n-grams of evaluation sets, with which documents are compared.

    `in_set_GS`: which sets each n-gram `ngrams_G` belongs to.
    """

    def __init__(self, hasher: "NgramHasher", ngrams_G: np.ndarray, in_set_GS: np.ndarray) -> None:
        self.hasher, self.ngrams_G, self.in_set_GS = hasher, ngrams_G, in_set_GS
        self.prefix_filter = np.zeros(2**_FILTER_BITS, bool)
        self.prefix_filter[_prefixes(ngrams_G)] = True

    def overlaps(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Whether each of these documents shares an n-gram with each set, (D, S), and the indices
        in `ngrams_G` of the n-grams that any of them shares, (M,)."""
        shared_DS = np.zeros((len(texts), self.in_set_GS.shape[1]), bool)
        matched = [np.zeros(0, np.intp)]
        start = 0
        for batch in text_batches(texts):
            hashes, owners = self.hasher.hash_ngrams(batch)
            candidates = np.flatnonzero(self.prefix_filter[_prefixes(hashes)])
            indices = np.searchsorted(self.ngrams_G, hashes[candidates])
            indices = np.minimum(indices, len(self.ngrams_G) - 1)
            equal = self.ngrams_G[indices] == hashes[candidates]
            indices_M, owners_M = indices[equal], owners[candidates][equal]
            np.logical_or.at(shared_DS, start + owners_M, self.in_set_GS[indices_M])
            matched.append(indices_M)
            start += len(batch)
        return shared_DS, np.unique(np.concatenate(matched))

    def facts(self) -> list[Any]:
        """What overlaps depend on, for a fingerprint."""
        digest = hashlib.blake2b(self.ngrams_G.tobytes(), digest_size=16)
        digest.update(np.packbits(self.in_set_GS).tobytes())
        return [self.hasher.ngram_size, list(self.in_set_GS.shape), digest.hexdigest()]


class Contamination:
    """Counts the n-grams that training corpora share with evaluation sets.

    `sets`: the name and the texts of the items of each evaluation set, each read once. `training`:
    the names of the training corpora; all of them appear in `counts`, with zeros where nothing is
    shared. `ngrams`: what documents are compared with.
    """

    def __init__(
        self, sets: Mapping[str, Iterable[str]], training: Sequence[str], ngram_size: int
    ) -> None:
        hasher = NgramHasher(ngram_size)
        self.set_sizes: dict[str, int] = {}
        hashes_E, items_E = self._hash_sets(sets, hasher)
        # Entry e says that the item `items_E[e]` contains the n-gram `ngrams_G[entries_E[e]]`.
        self.items_E = items_E
        ngrams_G, self.entries_E = np.unique(hashes_E, return_inverse=True)
        self.matched_G = np.zeros(len(ngrams_G), bool)
        set_count = len(self.set_sizes)
        self.set_of_item_I = np.repeat(np.arange(set_count), list(self.set_sizes.values()))
        in_set_GS = np.zeros((len(ngrams_G), set_count), bool)
        in_set_GS[self.entries_E, self.set_of_item_I[self.items_E]] = True
        self.ngrams = EvaluationNgrams(hasher, ngrams_G, in_set_GS)
        self.documents_S = {name: np.zeros(set_count, np.int64) for name in training}

    def _hash_sets(
        self, sets: Mapping[str, Iterable[str]], hasher: "NgramHasher"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(hash, index of its item) of every n-gram of the sets; fills `set_sizes`."""
        hashes, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.intp)]
        total = 0
        for name, texts in sets.items():
            self.set_sizes[name] = 0
            for batch in text_batches(texts):
                batch_hashes, owners = hasher.hash_ngrams(batch)
                hashes.append(batch_hashes)
                items.append(owners + total)
                self.set_sizes[name] += len(batch)
                total += len(batch)
        return np.concatenate(hashes), np.concatenate(items)

    def add(self, corpus: str, documents_S: Sequence[int], matched_M: Sequence[int]) -> None:
        """Count documents of a training corpus: how many of them share an n-gram with each set, and
        the indices of the n-grams that they share."""
        self.documents_S[corpus] += np.array(documents_S, np.int64)
        self.matched_G[np.array(matched_M, np.intp)] = True

    def counts(self) -> dict[str, int]:
        """For each set: its items, how many of them share an n-gram with a document that was
        checked, and how many documents of each training corpus share one with the set."""
        overlapping_I = np.zeros(len(self.set_of_item_I), bool)
        overlapping_I[self.items_E[self.matched_G[self.entries_E]]] = True
        overlapping_S = np.bincount(
            self.set_of_item_I[overlapping_I], minlength=len(self.set_sizes)
        )
        counts: dict[str, int] = {}
        for index, (name, size) in enumerate(self.set_sizes.items()):
            counts[f"contamination/{name}/items"] = size
            counts[f"contamination/{name}/overlapping_items"] = int(overlapping_S[index])
            for corpus, documents_S in self.documents_S.items():
                counts[f"contamination/{name}/{corpus}/documents"] = int(documents_S[index])
        return counts


class NgramHasher:
    """Hashes all n-grams of many texts with array operations, without a Python object per word.

    A word's hash is a polynomial of its characters; an n-gram's hash is a polynomial of the hashes
    of its words.
    """

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = ngram_size
        self.character_powers, self.word_powers = _Powers(_CHARACTER_BASE), _Powers(_WORD_BASE)

    def hash_ngrams(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(hash, index of its text) of every n-gram, in the order of the texts."""
        lower = [text.lower() for text in texts]
        joined = " ".join(("", *lower, ""))
        # JSON can hold an unpaired surrogate. It is part of no word and must not stop the run.
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        values = _character_hashes()[characters]
        in_word = values != 0
        edges = np.flatnonzero(in_word[1:] != in_word[:-1]) + 1
        starts, ends = edges[::2], edges[1::2]
        words = _mix(self.character_powers.range_sums(values, starts, ends))
        last_words = np.searchsorted(starts, np.cumsum([len(text) + 1 for text in lower]))
        owners = np.repeat(np.arange(len(texts)), np.diff(last_words, prepend=0))
        first = np.arange(max(len(words) - self.ngram_size + 1, 0))
        first = first[owners[first] == owners[first + self.ngram_size - 1]]  # within one text
        return self.word_powers.range_sums(words, first, first + self.ngram_size), owners[first]


class _Powers:
    """Tables of the powers of an odd base and of its inverse modulo 2^64, extended as needed."""

    def __init__(self, base: int) -> None:
        self.bases = (base, pow(base, -1, 2**64))
        self._extend(2 * _BATCH_CHARACTERS)

    def _extend(self, count: int) -> None:
        tables = (np.full(count, base, np.uint64) for base in self.bases)
        self.powers, self.inverse_powers = (np.multiply.accumulate(table) for table in tables)

    def range_sums(self, values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Σ_k values[start + k] · base^k modulo 2^64 over each range [start, end)."""
        if len(values) > len(self.powers):
            self._extend(2 * len(values))
        totals = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(values * self.powers[: len(values)], out=totals[1:])
        return (totals[ends] - totals[starts]) * self.inverse_powers[starts]


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive texts; each list but the last has at least _BATCH_CHARACTERS characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prefixes(hashes: np.ndarray) -> np.ndarray:
    """The leading bits of each hash."""
    return hashes >> np.uint64(64 - _FILTER_BITS)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a change of one bit changes about half the bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _character_hashes() -> np.ndarray:
    """A uint64 for each code point; 0 for those that are part of no word."""
    in_word = [chr(code).isalnum() or chr(code) == "_" for code in range(_CODE_POINTS)]
    hashes = _mix(np.arange(1, _CODE_POINTS + 1, dtype=np.uint64))
    return np.where(in_word, hashes, np.uint64(0))

"""Random numbers that depend on (seed, purpose, ids) and on nothing else (docs/method.md, 2.5)."""

import hashlib

import numpy as np


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """A generator for one purpose and one object, such as `generator(seed, "chunks", doc_id)`.

    What it draws does not depend on shards, workers, batches, or the order of calls.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(seed: int, *key: str | int) -> float:
    """One number in [0, 1) for one purpose and one object; cheaper than a generator."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

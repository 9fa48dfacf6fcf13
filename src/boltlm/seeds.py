"""Random numbers that depend on (seed, purpose, ids) and on nothing else (SPEC section 2)."""

import hashlib

import numpy as np


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """A generator for one purpose and one thing, e.g. `generator(seed, "chunks", doc_id)`.

    Neither the shard, the worker, the batch nor the order of calls changes what it draws.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(seed: int, *key: str | int) -> float:
    """One number in [0, 1) for one purpose and one thing; cheaper than a generator."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

"""The chunks that the E-step works on, each with as much raw context as fits."""

import pytest

from boltlm.errors import UserError
from boltlm.estep.contexts import chunks_in_context
from boltlm.records import Chunk
from tests import tiny


def test_context_is_raw_and_within_the_token_budget() -> None:
    """Up to L preceding chunks of the same document; complete chunks only, as many as fit."""
    chunks = [
        Chunk(doc_id=doc, chunk=n, text="", tokens=tokens)
        for doc, n, tokens in (
            ("a", 0, (1, 1)), ("a", 1, (2,)), ("a", 2, (3, 3, 3)), ("a", 3, (4,)), ("b", 0, (5,)),
            ("b", 1, (6,) * 9),
        )
    ]  # fmt: skip
    unlimited = chunks_in_context(chunks, 2, 100)
    assert [(c.doc_id, c.chunk, c.context) for c in unlimited] == [
        ("a", 0, ()),
        ("a", 1, (1, 1)),
        ("a", 2, (1, 1, 2)),
        ("a", 3, (2, 3, 3, 3)),
        ("b", 0, ()),
        ("b", 1, (5,)),
    ]
    assert [c.text for c in unlimited] == [chunk.tokens for chunk in chunks]
    assert [c.context for c in chunks_in_context(chunks, 2, 5)] == [
        (),
        (1, 1),
        (2,),
        (2, 3, 3, 3),
        (),
        (),
    ]
    assert [c.context for c in chunks_in_context(chunks, 2, 4)][3] == (3, 3, 3)
    assert all(c.context == () for c in chunks_in_context(chunks, 0, 100))


@pytest.mark.parametrize("key", ["batch_tokens", "workers", "threads"])
def test_counts_are_positive(key: str) -> None:
    """Zero would read as `no limit`, and then fail far from its cause."""
    with pytest.raises(UserError, match=rf"sampling\.{key} must be 1 or more, found 0"):
        tiny.sampling_config(**{key: 0})


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_memory_fraction_leaves_memory_for_both(fraction: float) -> None:
    """The sampler and the scorer each need a part of the GPU's memory."""
    with pytest.raises(UserError, match=r"gpu_memory_utilization must be in \(0, 1\)"):
        tiny.sampling_config(gpu_memory_utilization=fraction)

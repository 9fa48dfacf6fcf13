"""What the E-step is asked: chunks, each with as much raw context as fits."""

import pytest

from boltlm.errors import UserError
from boltlm.records import Chunk
from boltlm.sampling.estep import items
from tests import tiny


def test_items_have_raw_context_within_the_room() -> None:
    """Up to L chunks of the same document, whole ones, as many as fit beside the chunk."""
    chunks = [
        Chunk(doc_id=doc, chunk=n, text="", tokens=tokens)
        for doc, n, tokens in (
            ("a", 0, (1, 1)), ("a", 1, (2,)), ("a", 2, (3, 3, 3)), ("a", 3, (4,)), ("b", 0, (5,)),
            ("b", 1, (6,) * 9),
        )
    ]  # fmt: skip
    wide = items(chunks, 2, 100)
    assert [(i.doc_id, i.chunk, i.context) for i in wide] == [
        ("a", 0, ()),
        ("a", 1, (1, 1)),
        ("a", 2, (1, 1, 2)),
        ("a", 3, (2, 3, 3, 3)),
        ("b", 0, ()),
        ("b", 1, (5,)),
    ]
    assert [i.text for i in wide] == [chunk.tokens for chunk in chunks]
    assert [i.context for i in items(chunks, 2, 5)] == [(), (1, 1), (2,), (2, 3, 3, 3), (), ()]
    assert [i.context for i in items(chunks, 2, 4)][3] == (3, 3, 3)
    assert all(i.context == () for i in items(chunks, 0, 100))


def test_a_batch_holds_at_least_a_token() -> None:
    """Zero would read as `no limit`."""
    with pytest.raises(UserError, match="batch_tokens"):
        tiny.sampling_config(batch_tokens=0)

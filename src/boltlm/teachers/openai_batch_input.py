"""Writes the input file of a batch: JSON Lines with one request each."""

import json
from collections.abc import Iterator

from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_server import ENDPOINT
from boltlm.teachers.requests import PendingRequest


def make_custom_id(key: str, attempt: int) -> str:
    """The `custom_id` of a line in a batch's input file."""
    return f"{key}-{attempt}"


def input_line(pending: PendingRequest, config: OpenAIBatchConfig) -> bytes:
    """The line of a request, with its line feed."""
    request = {
        "custom_id": make_custom_id(pending.request.key, pending.attempt),
        "method": "POST",
        "url": ENDPOINT,
        "body": config.request_body(pending.request, pending.attempt),
    }
    return json.dumps(request, ensure_ascii=False).encode() + b"\n"


class PeekableRequests:
    """An iterator of requests whose next element can be read without consuming it."""

    def __init__(self, requests: Iterator[PendingRequest]) -> None:
        self.requests = requests
        self.next: PendingRequest | None = None

    def peek(self) -> PendingRequest | None:
        """The next request, or None where there is none."""
        if self.next is None:
            self.next = next(self.requests, None)
        return self.next

    def pop(self) -> PendingRequest:
        """Consume the request that `peek` has returned."""
        request, self.next = self.next, None
        assert request is not None
        return request

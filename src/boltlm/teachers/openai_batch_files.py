"""Reads the output and error files of a batch, JSON Lines that the server holds."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import openai


def read_batch_lines(
    client: openai.OpenAI, file_id: str, max_retries: int
) -> Iterator[dict[str, Any]]:
    """The lines of a remote file that are JSON objects; other lines are skipped. Where the
    connection breaks, the file is read again from its start, so a line may come twice.

    Raises openai.OpenAIError where the file cannot be read after `max_retries` retries.
    """
    for retry in range(max_retries + 1):
        try:
            with client.files.with_streaming_response.content(file_id) as response:
                for line in _split_lines(response.iter_bytes()):
                    try:
                        value = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(value, dict):
                        yield value
            return
        except httpx2.TransportError as error:
            if retry == max_retries:
                raise openai.APIConnectionError(request=error.request) from error


def _split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end with a line feed. Other line separators may occur inside a JSON string, so
    `splitlines` would not do."""
    unfinished: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        unfinished.append(first)
        for line in others:
            yield b"".join(unfinished)
            unfinished = [line]
    yield b"".join(unfinished)


def make_custom_id(key: str, attempt: int) -> str:
    """The `custom_id` of a line in a batch's input file."""
    return f"{key}-{attempt}"


def parse_custom_id(line: dict[str, Any]) -> tuple[str, int] | None:
    """(key, attempt) of the request that a line responds to; None where it has no such id."""
    key, _, attempt = str(line.get("custom_id")).rpartition("-")
    return (key, int(attempt)) if attempt.isdecimal() else None

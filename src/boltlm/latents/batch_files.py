"""The output and error files of a batch, line by line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import openai


def lines(client: openai.OpenAI, file: str, retries: int) -> Iterator[dict[str, Any]]:
    """The lines of a remote file that are JSON objects; from its start again where the connection
    broke, so a line may come twice."""
    for attempt in range(retries + 1):
        try:
            with client.files.with_streaming_response.content(file) as response:
                for line in _split(response.iter_bytes()):
                    try:
                        found = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(found, dict):
                        yield found
            return
        except httpx2.TransportError as error:
            if attempt == retries:
                raise openai.APIConnectionError(request=error.request) from error


def _split(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end with a line feed; other separators of lines may stand inside a JSON text."""
    held: list[bytes] = []
    for part in parts:
        first, *rest = part.split(b"\n")
        held.append(first)
        for line in rest:
            yield b"".join(held)
            held = [line]
    yield b"".join(held)


def place_of(line: dict[str, Any]) -> tuple[str, int] | None:
    """(key, attempt) that a line answers."""
    key, _, attempt = str(line.get("custom_id")).rpartition("-")
    return (key, int(attempt)) if attempt.isdecimal() else None

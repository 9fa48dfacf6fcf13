"""Reads the results of a batch: its output and error files, JSON Lines that the server holds."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from boltlm.errors import redact
from boltlm.teachers.completions import MalformedResponseError, parse_completion, reported_tokens
from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_server import BatchServer, RemoteBatchState, is_temporary
from boltlm.teachers.response_cache import TeacherResponse

_MALFORMED = "malformed"  # the `finish` of a response that is not a chat completion
_MAX_MESSAGE_CHARACTERS = 200
_MAX_ATTEMPT_DIGITS = 6


class IncompleteResultsError(Exception):
    """The results of a batch that has ended cannot be read, or not all of them."""


@dataclass(slots=True)
class BatchResults:
    """The results of a batch by (key, attempt). `rejected`: messages of the server for requests
    that it does not accept. `failed`: its messages for requests whose processing failed. Requests
    in none of them were not processed. `lost_usd`: the assumed cost of results that do not exist,
    although the server counts their requests as completed."""

    responses: dict[tuple[str, int], TeacherResponse] = field(default_factory=dict)
    rejected: dict[tuple[str, int], str] = field(default_factory=dict)
    failed: dict[tuple[str, int], str] = field(default_factory=dict)
    lost_usd: float = 0.0

    def lacks(self, request: tuple[str, int]) -> bool:
        """Whether a request has no result."""
        return not any(request in group for group in (self.responses, self.rejected, self.failed))

    @property
    def reported_usd(self) -> float:
        """The cost of the responses whose usage the server has reported."""
        return sum(r.cost_usd for r in self.responses.values() if not r.is_estimated)

    @property
    def estimated_usd(self) -> float:
        """The most that the other responses and the lost results can have cost."""
        usd = sum(r.cost_usd for r in self.responses.values() if r.is_estimated)
        return usd + self.lost_usd


class ResultsReader:
    """Reads the results of batches. Raises IncompleteResultsError where they have to be downloaded
    again."""

    def __init__(self, server: BatchServer, config: OpenAIBatchConfig) -> None:
        self.server, self.config = server, config

    def read(
        self, batch: RemoteBatchState, requests: set[tuple[str, int]], cost_usd: float
    ) -> BatchResults:
        """The results of a batch that has ended. `requests`: those that it was created for.
        `cost_usd`: the assumed cost of a response that does not say how many tokens it used. A
        result that is completed but does not exist counts as a failure that costs as much."""
        results, num_lost = BatchResults(), 0
        if batch.completed and batch.output_file is None:
            raise IncompleteResultsError(f"{batch.completed} requests are completed without a file")
        for file_id in filter(None, (batch.output_file, batch.error_file)):
            file = _RemoteLines(self.server.client, file_id)
            num_read = 0
            for line in file:
                num_read += self._add(line, requests, batch.id, cost_usd, results)
            expected = 0
            if file_id == batch.output_file:
                expected = 1 if batch.completed is None else batch.completed
            if (file.num_damaged or num_read < expected) and not self._is_whole(file):
                raise IncompleteResultsError(
                    f"the file {file_id} has {num_read:,} results and {file.num_damaged:,} damaged"
                    f" lines instead of {expected:,} results"
                )
            num_lost += max(0, expected - num_read)
        if num_lost:
            results.lost_usd = num_lost * cost_usd
            for request in filter(results.lacks, requests):
                results.failed[request] = "the file of results does not hold this one"
        return results

    def _is_whole(self, file: "_RemoteLines") -> bool:
        """Whether all of a file was downloaded, so that another download would be the same."""
        return file.num_bytes > 0 and file.num_bytes == self.server.file_bytes(file.id)

    def _add(
        self,
        line: dict[str, Any],
        requests: set[tuple[str, int]],
        batch_id: str,
        cost_usd: float,
        results: BatchResults,
    ) -> bool:
        """Add a line to the results. Returns whether it is the first for one of the requests."""
        request = parse_custom_id(line)
        if request not in requests:
            return False
        is_first = results.lacks(request)
        http_response = line.get("response")
        if not isinstance(http_response, dict):
            return is_first  # it has expired or was cancelled
        body, status = http_response.get("body"), http_response.get("status_code")
        if status == 200:
            response = self._parse(body, request, batch_id, cost_usd)
            results.responses.setdefault(request, response)
        elif isinstance(status, int):
            is_rejected = 400 <= status < 500 and status != 429
            messages = results.rejected if is_rejected else results.failed
            messages[request] = _error_message(body) or str(status)
        return is_first

    def _parse(
        self, body: Any, request: tuple[str, int], batch_id: str, cost_usd: float
    ) -> TeacherResponse:
        """The response in a line. It was paid for, so also a malformed one counts as an attempt."""
        config = self.config
        try:
            return parse_completion(body, config, *request, max_usd=cost_usd, batch=batch_id)
        except MalformedResponseError:
            usage = reported_tokens(body)
            usd = config.prices.cost(*usage, batch=True) if usage else cost_usd
            tokens = usage or (0, 0)
            return TeacherResponse(*request, "", _MALFORMED, *tokens, usd, config.model, batch_id)


class _RemoteLines:
    """The lines of a remote file that are JSON objects. `num_bytes`: how much has been downloaded,
    `num_damaged`: the number of other lines so far."""

    def __init__(self, client: openai.OpenAI, file_id: str) -> None:
        self.client, self.id = client, file_id
        self.num_bytes = self.num_damaged = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            with self.client.files.with_streaming_response.content(self.id) as response:
                for line in _split_lines(self._count(response.iter_bytes())):
                    try:
                        value = json.loads(line) if line.strip() else None
                    except (ValueError, RecursionError):
                        value = ""
                    if isinstance(value, dict):
                        yield value
                    elif value is not None:
                        self.num_damaged += 1
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise IncompleteResultsError(f"the download of {self.id} broke off") from error
        except openai.NotFoundError as error:
            raise IncompleteResultsError(f"the server has no file {self.id}") from error
        except openai.APIError as error:
            if not is_temporary(error):
                raise
            raise IncompleteResultsError(f"the file {self.id} cannot be downloaded") from error

    def _count(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.num_bytes += len(block)
            yield block


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


def _error_message(body: Any) -> str:
    """The server's message in the body of an error; empty where there is none."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return redact(str(message or ""))[:_MAX_MESSAGE_CHARACTERS]


def parse_custom_id(line: dict[str, Any]) -> tuple[str, int]:
    """(key, attempt) of the request that a line responds to; ("", -1) where it has no such id."""
    key, _, attempt = str(line.get("custom_id")).rpartition("-")
    is_number = attempt.isdecimal() and len(attempt) <= _MAX_ATTEMPT_DIGITS
    return (key, int(attempt)) if is_number else ("", -1)

"""Chat completions through OpenAI's Files and Batches API: cheaper, with results within a day.

A batch is saved in the response cache before anything is sent, the id of its file before the batch
is created, and a token of ours is part of the batch's metadata. A process that is killed at any
moment therefore finds its batches again and creates none twice.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, Literal, cast

import openai
from openai.types import Batch as RemoteBatch

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.teachers.config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_files import make_custom_id, parse_custom_id, read_batch_lines
from boltlm.teachers.openai_chat import (
    MalformedResponseError,
    parse_completion,
    read_api_key,
    to_user_error,
)
from boltlm.teachers.requests import PendingRequest, RequestLedger
from boltlm.teachers.response_cache import PendingBatch, TeacherResponse

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
METADATA_KEY = "boltlm"  # the key of our token in a batch's metadata
TOO_MANY_TOKENS = "token_limit_exceeded"
TERMINAL_STATUSES = ("completed", "failed", "expired", "cancelled")

_MAX_EMPTY_BATCHES = 3  # consecutive batches without any response, after which the run stops
_MAX_MESSAGE_CHARACTERS = 200

# What became of a batch: still in progress; it has ended and its responses are saved; or it failed
# because the account may not enqueue so many tokens.
_Outcome = Literal["in_progress", "ended", "too_many_tokens"]


class OpenAIBatchClient:
    """The client for `kind: openai_batch`."""

    def __init__(self, config: OpenAIBatchConfig) -> None:
        self.config = config
        self.teacher = fingerprint(config.sampling_facts)
        self.api_key = read_api_key(config)
        self.client: openai.OpenAI  # open during `run`
        self.max_batch_requests = config.max_requests_per_batch
        self.queue_full = False  # no more tokens may be enqueued until a batch has ended
        self.empty_batches = 0

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """See `TeacherClient.run`."""
        try:
            with openai.OpenAI(
                api_key=self.api_key,
                base_url=self.config.base_url,
                max_retries=self.config.max_retries,
                timeout=self.config.timeout_seconds,
            ) as self.client:
                return self._run(requests, ledger)
        except openai.OpenAIError as error:
            raise to_user_error(error, self.config) from error

    def _run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """Keep as many batches in progress as allowed until all requests are sent and all results
        are read. Returns the number of batches."""
        saved = ledger.cache.pending_batches(self.teacher)
        in_progress = [self._resume(batch, ledger) for batch in saved]
        for batch in in_progress:
            ledger.budget.reserved += batch.expected_usd
        count = len(in_progress)
        queue = _PeekableRequests(requests)
        while True:
            while not self.queue_full and len(in_progress) < self.config.max_concurrent_batches:
                batch = self._submit(queue, ledger) if ledger.stop_error is None else None
                if batch is None:
                    break
                in_progress.append(batch)
                count += 1
            if not in_progress:
                return count
            outcomes: dict[str, _Outcome] = {b.token: self._poll(b, ledger) for b in in_progress}
            in_progress = [b for b in in_progress if outcomes[b.token] == "in_progress"]
            self._adapt_batch_size(set(outcomes.values()), ledger)
            if "ended" not in outcomes.values():
                time.sleep(self.config.poll_interval_seconds)

    def _adapt_batch_size(self, outcomes: set[_Outcome], ledger: RequestLedger) -> None:
        """After a batch with too many tokens, submit none until another batch has ended. Where no
        other is in progress, halve the size of the batches."""
        too_many_tokens = self.queue_full or "too_many_tokens" in outcomes
        self.queue_full = too_many_tokens and "ended" not in outcomes
        if self.queue_full and "in_progress" not in outcomes:
            if self.max_batch_requests == 1:
                ledger.stop(
                    UserError(
                        f"{ledger.teacher}: this account may not enqueue the tokens of even one"
                        " request; wait until batches of other programs have ended, or use a"
                        " teacher of kind openai"
                    )
                )
            self.max_batch_requests = max(1, self.max_batch_requests // 2)
            self.queue_full = False

    def _submit(self, queue: "_PeekableRequests", ledger: RequestLedger) -> PendingBatch | None:
        """Write the next input file and create its batch. Returns None where no request is left or
        the budget does not allow another one."""
        with tempfile.TemporaryFile() as file:
            batch_requests: list[PendingRequest] = []
            expected_usd = 0.0
            while len(batch_requests) < self.max_batch_requests:
                pending = queue.peek()
                if pending is None:
                    break
                line = self._input_line(pending)
                if batch_requests and file.tell() + len(line) > self.config.max_bytes_per_batch:
                    break
                request_usd = self.config.expected_usd(pending.request)
                if not ledger.budget.reserve(request_usd):
                    ledger.stop(ledger.budget.exceeded_error(ledger.teacher))
                    break
                expected_usd += request_usd
                file.write(line)
                batch_requests.append(queue.pop())
            if not batch_requests:
                return None
            batch = PendingBatch(uuid.uuid4().hex, self.teacher, "", "", expected_usd)
            keys = [(pending.request.key, pending.attempt) for pending in batch_requests]
            ledger.cache.add_batch(batch, keys)
            return self._create_from_file(batch, cast(BinaryIO, file), ledger)

    def _input_line(self, pending: PendingRequest) -> bytes:
        request = {
            "custom_id": make_custom_id(pending.request.key, pending.attempt),
            "method": "POST",
            "url": ENDPOINT,
            "body": self.config.request_body(pending.request),
        }
        return json.dumps(request, ensure_ascii=False).encode() + b"\n"

    def _create_from_file(
        self, batch: PendingBatch, file: BinaryIO, ledger: RequestLedger
    ) -> PendingBatch:
        """Upload the input file and create the batch; each id is saved as soon as it is known."""
        file.seek(0)
        remote_file = self.client.files.create(
            file=(f"boltlm-{batch.token}.jsonl", file), purpose="batch"
        )
        batch = replace(batch, file=remote_file.id)
        ledger.cache.update_batch(batch.token, file=batch.file, id="")
        return self._save_id(batch, self._create(batch), ledger)

    def _resume(self, batch: PendingBatch, ledger: RequestLedger) -> PendingBatch:
        """Bring a batch of a killed run to the point where it exists at the server.

        If its file was not uploaded completely, the batch is given up and its requests are sent
        again. If its id was not saved, it is searched for, and created where it does not exist.
        """
        if batch.id:
            return batch
        if not batch.file:
            ledger.cache.complete_batch(batch, [])
            return replace(batch, expected_usd=0.0)
        return self._save_id(batch, self._find(batch) or self._create(batch), ledger)

    def _save_id(
        self, batch: PendingBatch, remote: RemoteBatch, ledger: RequestLedger
    ) -> PendingBatch:
        ledger.cache.update_batch(batch.token, file=batch.file, id=remote.id)
        return replace(batch, id=remote.id)

    def _create(self, batch: PendingBatch) -> RemoteBatch:
        """Create the batch exactly once. The client's own retries are switched off: after an error
        the batch may exist all the same, so it is searched for before each retry."""
        client = self.client.with_options(max_retries=0)
        for retry in range(self.config.max_retries + 1):
            try:
                return client.batches.create(
                    completion_window="24h",
                    endpoint=ENDPOINT,
                    input_file_id=batch.file,
                    metadata={METADATA_KEY: batch.token},
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                if retry == self.config.max_retries:
                    raise
                time.sleep(min(2.0**retry, self.config.poll_interval_seconds))
            if (remote := self._find(batch)) is not None:
                return remote
        raise AssertionError("the loop returns or raises")

    def _find(self, batch: PendingBatch) -> RemoteBatch | None:
        """The batch at the server whose metadata hold our token, or None."""
        for remote in self.client.batches.list(limit=100):
            if (remote.metadata or {}).get(METADATA_KEY) == batch.token:
                return remote
        return None

    def _poll(self, batch: PendingBatch, ledger: RequestLedger) -> _Outcome:
        """Look up a batch. If it has ended, save its responses; its other requests may then be sent
        again."""
        if not batch.id:
            return "ended"  # given up in `_resume`
        remote = self._retrieve(batch, ledger)
        if remote.status not in TERMINAL_STATUSES:
            counts = remote.request_counts
            completed = f", {counts.completed}/{counts.total} of a batch" if counts else ""
            ledger.progress.note(f"${ledger.budget.spent:.4f}{completed}")
            return "in_progress"
        responses, rejected = self._read_results(remote, ledger.cache.batch_requests(batch.token))
        ledger.cache.complete_batch(batch, responses)
        ledger.budget.settle(batch.expected_usd, sum(response.cost_usd for response in responses))
        for response in responses:
            ledger.record(response)
        for key, message in rejected.items():
            ledger.reject(key, message)
        errors = (remote.errors.data if remote.errors else None) or []
        if any(error.code == TOO_MANY_TOKENS for error in errors):
            return "too_many_tokens"
        if remote.status == "failed" and errors:
            messages = "; ".join(filter(None, (error.message for error in errors[:3])))
            ledger.stop(UserError(f"{ledger.teacher}: the batch {remote.id} failed: {messages}"))
        self.empty_batches = 0 if responses or rejected else self.empty_batches + 1
        if self.empty_batches >= _MAX_EMPTY_BATCHES:
            ledger.stop(
                UserError(
                    f"{ledger.teacher}: {self.empty_batches} consecutive batches ended"
                    f" ({remote.status}) without a response; look them up in the API's dashboard,"
                    " then run the stage again"
                )
            )
        return "ended"

    def _retrieve(self, batch: PendingBatch, ledger: RequestLedger) -> RemoteBatch:
        try:
            return self.client.batches.retrieve(batch.id)
        except openai.NotFoundError as error:
            condition = f"where token = '{batch.token}'"
            raise UserError(
                f"{ledger.teacher}: the server does not know the batch {batch.id} for this API key;"
                " use the server and the key with which it was created. To give the batch up and"
                f" pay for its requests again: sqlite3 {ledger.cache.path}"
                f' "delete from asked {condition}; delete from batches {condition}"'
            ) from error

    def _read_results(
        self, remote: RemoteBatch, requests: set[tuple[str, int]]
    ) -> tuple[list[TeacherResponse], dict[str, str]]:
        """The responses to `requests` in a batch's output and error files, and the messages for
        rejected requests by key. Requests that are in neither, or whose line cannot be parsed, are
        sent again later."""
        responses: dict[tuple[str, int], TeacherResponse] = {}
        rejected: dict[str, str] = {}
        for file_id in filter(None, (remote.output_file_id, remote.error_file_id)):
            for line in read_batch_lines(self.client, file_id, self.config.max_retries):
                request_id = parse_custom_id(line)
                if request_id is None or request_id not in requests:
                    continue
                http_response = line.get("response") or {}
                body, status = http_response.get("body") or {}, http_response.get("status_code")
                if status == 200:
                    try:
                        response = parse_completion(body, self.config, *request_id, batch=remote.id)
                    except MalformedResponseError:
                        continue
                    responses.setdefault(request_id, response)
                elif status is not None and 400 <= status < 500 and status != 429:
                    error = body.get("error") or {}
                    message = str(error.get("message") or status)
                    rejected[request_id[0]] = message[:_MAX_MESSAGE_CHARACTERS]
        return list(responses.values()), rejected


class _PeekableRequests:
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

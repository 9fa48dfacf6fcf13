"""Chat completions through the Files and Batches API: half the price, within a day.

A batch is in the journal before anything is sent, its file's id before the batch is made, and
our own token for it in its metadata, so a process that dies at any moment finds its batches again
and makes none twice.
"""

import json
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal, cast

import openai
from openai.types import Batch as Remote

from boltlm import engine
from boltlm.errors import UserError
from boltlm.latents.asking import Ask, Book, Paid
from boltlm.latents.batch_files import lines, place_of
from boltlm.latents.journal import Answer, Batch
from boltlm.latents.online import MalformedError, answer_of, secret, told

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # what the API documents for one batch
TOKEN = "boltlm"  # the key under which our token stands in a batch's metadata
TOO_MANY_TOKENS = "token_limit_exceeded"
ENDED = ("completed", "failed", "expired", "cancelled")
_MOST_FRUITLESS = 3  # batches in a row that may end without any answer


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTeacher(Paid):
    """Params entry of `kind: openai_batch`. Files hold at most `batch_requests` requests and
    `batch_bytes` bytes; `batches_in_flight` are under way at once, looked at every
    `poll_seconds`."""

    kind: Literal["openai_batch"]
    batch_requests: int
    batch_bytes: int
    batches_in_flight: int
    poll_seconds: float

    def __post_init__(self) -> None:
        super(BatchTeacher, self).__post_init__()
        if not 1 <= self.batch_requests <= MOST_REQUESTS:
            raise UserError(f"batch_requests must lie within 1 and {MOST_REQUESTS}")
        if not 1 <= self.batch_bytes <= MOST_BYTES:
            raise UserError(f"batch_bytes must lie within 1 and {MOST_BYTES}")
        if self.batches_in_flight < 1:
            raise UserError("batches_in_flight must be 1 or more")


class Batched:
    """Asks over `kind: openai_batch`."""

    def __init__(self, config: BatchTeacher) -> None:
        self.config = config
        self.asker = engine.key(config.settings)
        self.client = openai.OpenAI(
            api_key=secret(config),
            base_url=config.base_url,
            max_retries=config.retries,
            timeout=config.timeout_seconds,
        )
        self.most = config.batch_requests
        self.full = False  # no more tokens may be enqueued until a batch has ended
        self.fruitless = 0

    def ask(self, asks: Iterator[Ask], book: Book) -> int:
        try:
            return self._ask(asks, book)
        except openai.OpenAIError as error:
            raise told(error, self.config) from error

    def _ask(self, asks: Iterator[Ask], book: Book) -> int:
        """Keep as many batches under way as allowed until all requests are sent and read."""
        flying = [self._launched(batch, book) for batch in book.journal.batches(self.asker)]
        for batch in flying:
            book.purse.reserved += batch.expected_usd
        count = len(flying)
        queue = _Queue(asks)
        while True:
            while not self.full and len(flying) < self.config.batches_in_flight:
                batch = self._submit(queue, book) if book.halted is None else None
                if batch is None:
                    break
                flying.append(batch)
                count += 1
            if not flying:
                return count
            ends = {batch.token: self._landed(batch, book) for batch in flying}
            flying = [batch for batch in flying if ends[batch.token] == "flying"]
            self._make_room(set(ends.values()), book)
            if "landed" not in ends.values():
                time.sleep(self.config.poll_seconds)

    def _make_room(self, ends: set[str], book: Book) -> None:
        """No further batch after one that found too many tokens enqueued, until another has
        landed; where there is no other, smaller ones."""
        self.full = (self.full or "too many" in ends) and "landed" not in ends
        if self.full and "flying" not in ends:
            if self.most == 1:
                book.halt(
                    UserError(
                        f"{book.where}: not even one request fits the tokens that this account may"
                        " enqueue; wait for batches of other programs, or take kind openai"
                    )
                )
            self.most, self.full = max(1, self.most // 2), False

    def _submit(self, queue: "_Queue", book: Book) -> Batch | None:
        """Write the next file and launch its batch; None where there is nothing left, or no
        money for it."""
        with tempfile.TemporaryFile() as file:
            taken: list[Ask] = []
            expected = 0.0
            while len(taken) < self.most and (ask := queue.peek()) is not None:
                line = self._line(ask)
                if taken and file.tell() + len(line) > self.config.batch_bytes:
                    break
                price = self.config.expected_usd(ask.request)
                if not book.purse.take(price):
                    book.halt(book.purse.refuse(book.where))
                    break
                expected += price
                file.write(line)
                taken.append(queue.pop())
            if not taken:
                return None
            batch = Batch(uuid.uuid4().hex, self.asker, "", "", expected)
            book.journal.begin_batch(batch, [(ask.request.key, ask.attempt) for ask in taken])
            return self._launched(batch, book, cast(BinaryIO, file))

    def _line(self, ask: Ask) -> bytes:
        request = {
            "custom_id": f"{ask.request.key}-{ask.attempt}",
            "method": "POST",
            "url": ENDPOINT,
            "body": self.config.body(ask.request),
        }
        return json.dumps(request, ensure_ascii=False).encode() + b"\n"

    def _launched(self, batch: Batch, book: Book, file: BinaryIO | None = None) -> Batch:
        """Bring a batch from wherever it stands to being made: its file uploaded, its id known.

        A batch that died before its file was up has its requests freed: they are asked anew.
        """
        if batch.id:
            return batch
        if not batch.file:
            if file is None:
                book.journal.end_batch(batch.token, [])
                return replace(batch, expected_usd=0.0)
            file.seek(0)
            up = self.client.files.create(
                file=(f"boltlm-{batch.token}.jsonl", file), purpose="batch"
            )
            batch = replace(batch, file=up.id)
            book.journal.note_batch(batch.token, file=batch.file, id="")
            made = self._create(batch)
        else:
            made = self._found(batch) or self._create(batch)
        batch = replace(batch, id=made.id)
        book.journal.note_batch(batch.token, file=batch.file, id=batch.id)
        return batch

    def _create(self, batch: Batch) -> Remote:
        """Make the batch once. The client must not repeat this by itself: what looks like an
        error here may have been done there."""
        once = self.client.with_options(max_retries=0)
        for attempt in range(self.config.retries + 1):
            try:
                return once.batches.create(
                    completion_window="24h",
                    endpoint=ENDPOINT,
                    input_file_id=batch.file,
                    metadata={TOKEN: batch.token},
                )
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                if attempt == self.config.retries:
                    raise
                time.sleep(min(2.0**attempt, self.config.poll_seconds))
            if (made := self._found(batch)) is not None:
                return made
        raise AssertionError("the loop returns or raises")

    def _found(self, batch: Batch) -> Remote | None:
        """The batch that carries our token, if there is one there."""
        for remote in self.client.batches.list(limit=100):
            if (remote.metadata or {}).get(TOKEN) == batch.token:
                return remote
        return None

    def _landed(self, batch: Batch, book: Book) -> Literal["flying", "landed", "too many"]:
        """Whether a batch has ended; then its answers are in the journal and the rest of its
        requests is free to be asked anew."""
        if not batch.id:
            return "landed"  # it died before its file was up
        remote = self._remote(batch, book)
        if remote.status not in ENDED:
            counts = remote.request_counts
            done = f", {counts.completed}/{counts.total} of a batch" if counts else ""
            book.progress.note(f"${book.purse.spent:.4f}{done}")
            return "flying"
        asked = book.journal.asked_of(batch.token)
        answers, refused = self._read(remote, asked)
        book.journal.end_batch(batch.token, answers)
        book.purse.settle(batch.expected_usd, sum(answer.cost_usd for answer in answers))
        for answer in answers:
            book.note(answer)
        for key, why in refused.items():
            book.reject(key, why)
        errors = (remote.errors.data if remote.errors else None) or []
        if any(error.code == TOO_MANY_TOKENS for error in errors):
            return "too many"
        if remote.status == "failed" and errors:
            said = "; ".join(filter(None, (error.message for error in errors[:3])))
            book.halt(UserError(f"{book.where}: the batch {remote.id} was refused: {said}"))
        self.fruitless = 0 if answers or refused else self.fruitless + 1
        if self.fruitless >= _MOST_FRUITLESS:
            book.halt(
                UserError(
                    f"{book.where}: {self.fruitless} batches in a row ended ({remote.status})"
                    " without an answer; look at them in the API's dashboard, then run again"
                )
            )
        return "landed"

    def _remote(self, batch: Batch, book: Book) -> Remote:
        try:
            return self.client.batches.retrieve(batch.id)
        except openai.NotFoundError as error:
            where = f"where token = '{batch.token}'"
            raise UserError(
                f"{book.where}: this server and key do not know the batch {batch.id}; use those"
                " that it was made with. To give it up and pay for its requests again: sqlite3"
                f' {book.journal.path} "delete from asked {where}; delete from batches {where}"'
            ) from error

    def _read(
        self, remote: Remote, asked: set[tuple[str, int]]
    ) -> tuple[list[Answer], dict[str, str]]:
        """(answers, rejected requests with the reason) of a batch's two files. Requests that are
        in neither, or whose line cannot be read, are asked anew."""
        answers: dict[tuple[str, int], Answer] = {}
        refused: dict[str, str] = {}
        for file in filter(None, (remote.output_file_id, remote.error_file_id)):
            for line in lines(self.client, file, self.config.retries):
                place = place_of(line)
                if place is None or place not in asked:
                    continue
                response = line.get("response") or {}
                body, status = response.get("body") or {}, response.get("status_code")
                if status == 200:
                    try:
                        found = answer_of(body, self.config, *place, batch=remote.id)
                    except MalformedError:
                        continue
                    answers.setdefault(place, found)
                elif status is not None and 400 <= status < 500 and status != 429:
                    error = body.get("error") or {}
                    refused[place[0]] = str(error.get("message") or status)[:200]
        return list(answers.values()), refused


class _Queue:
    """Requests that can be looked at before they are taken."""

    def __init__(self, asks: Iterator[Ask]) -> None:
        self.asks = asks
        self.next: Ask | None = None

    def peek(self) -> Ask | None:
        if self.next is None:
            self.next = next(self.asks, None)
        return self.next

    def pop(self) -> Ask:
        taken, self.next = self.next, None
        assert taken is not None
        return taken

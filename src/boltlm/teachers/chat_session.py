"""One pass over the open requests of a teacher of kind `openai`: when each is sent, what becomes of
it, and when the run must end.

A request whose tries are used up goes back to the queue. It is given up only after `max_attempts`
such rounds in which the server answered other requests, so an outage gives up nothing.
"""

import asyncio
import heapq
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.teachers.api_errors import (
    CONFLICT_STATUS_CODE,
    ErrorKind,
    describe_error,
    error_kind,
    error_message,
    lost_reason,
    retry_after_seconds,
    to_user_error,
)
from boltlm.teachers.cache_writer import CacheWriter
from boltlm.teachers.charges import GIVEN_UP, MALFORMED, Charge, add_charges, record_in_flight
from boltlm.teachers.completions import MalformedResponseError, parse_completion, reported_tokens
from boltlm.teachers.model_config import OpenAIChatConfig
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.rate_limiter import RateLimiter, SentRequest
from boltlm.teachers.requests import PendingRequest, RequestLedger
from boltlm.teachers.server_address import IDEMPOTENCY_HEADER
from boltlm.teachers.server_health import ServerHealth

# The pause before a request is sent again, doubled with each try up to the maximum.
MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 0.5, 30.0
TIMEOUT_MARGIN_SECONDS = 0.5  # within which the client's own timeouts come first
CHECK_SECONDS = 0.5  # how often what is waiting looks whether the run has ended
_MALFORMED_MESSAGE = "the response is not a chat completion"


@dataclass(slots=True)
class _Task:
    """A request on its way. `tries` of the current round and complete `rounds` have failed."""

    pending: PendingRequest
    max_usd: float
    tokens: float
    round_start: float
    tries: int = 0
    rounds: int = 0
    num_malformed: int = 0


class ChatSession:
    """Sends requests through a client until there are none or the ledger has stopped."""

    def __init__(
        self,
        config: OpenAIChatConfig,
        client: openai.AsyncOpenAI,
        limiter: RateLimiter,
        requests: Iterator[PendingRequest],
        ledger: RequestLedger,
        writer: CacheWriter,
    ) -> None:
        self.config, self.client, self.limiter = config, client, limiter
        self.requests, self.ledger, self.writer = requests, ledger, writer
        self.clock = asyncio.get_running_loop().time
        self.teacher = fingerprint(config.sampling_facts)
        self.count = 0
        self.waiting: list[tuple[float, int, _Task]] = []  # a heap by the time of the next try
        self.numbers = itertools.count()  # so that equal times are in order
        self.gate = asyncio.Lock()  # one worker at a time waits for its turn
        self.changed = asyncio.Event()  # a request has returned
        self.recorded_usd = 0.0  # what the cache says is in flight
        self.health = ServerHealth(config, self._send, ledger, writer)

    async def run(self) -> int:
        """Send the requests. Returns their number."""
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*(self._work() for _ in range(self.config.concurrency)))
        finally:
            watch.cancel()
            self._show()
        if self.recorded_usd:
            await self.writer.call(record_in_flight, self.teacher, 0.0)
        return self.count

    async def _work(self) -> None:
        """Send one request after another."""
        try:
            while (task := await self._next()) is not None:
                sent = await self._admit(task)
                if sent is None:
                    return
                await self._try(task, sent)
        except UserError as error:  # the response cache cannot be written
            self.ledger.stop(error)

    async def _next(self) -> _Task | None:
        """The next request; None where there is none or the ledger has stopped. While all open
        requests are in flight there is none: who sent one takes it again if it fails."""
        while self.ledger.stop_error is None:
            now = self.clock()
            if self.waiting and self.waiting[0][0] <= now:
                return heapq.heappop(self.waiting)[2]
            if (pending := next(self.requests, None)) is not None:
                self.count += 1
                tokens = self.config.expected_tokens(pending.request)[0]
                max_usd = self.config.max_usd(pending.request)
                return _Task(pending, max_usd, tokens + self.config.max_output_tokens, now)
            if not self.waiting:
                return None
            await asyncio.sleep(min(self.waiting[0][0] - now, CHECK_SECONDS))
        return None

    def _put_back(self, task: _Task, seconds: float) -> None:
        heapq.heappush(self.waiting, (self.clock() + seconds, next(self.numbers), task))

    async def _admit(self, task: _Task) -> SentRequest | None:
        """Wait until the server's limits and the budget allow the request, and enter it as sent.
        Returns None where the ledger has stopped."""
        budget = self.ledger.budget
        async with self.gate:
            while self.ledger.stop_error is None:
                now = self.clock()
                wait = self.limiter.wait_seconds(task.tokens, now)
                if wait == 0 and budget.reserve(task.max_usd):
                    sent = self.limiter.send(task.tokens, now)
                    await self._record_in_flight()
                    return sent
                if wait == 0 and not budget.fits_alone(task.max_usd):
                    self.ledger.stop(budget.exceeded_error(self.ledger.teacher, task.max_usd))
                    break
                self.changed.clear()
                try:
                    async with asyncio.timeout(min(wait or math.inf, CHECK_SECONDS)):
                        await self.changed.wait()
                except TimeoutError:
                    continue
        return None

    async def _record_in_flight(self) -> None:
        """Save the most that may be in flight, rarely: with room for more than there is now."""
        budget = self.ledger.budget
        in_flight = budget.reserved * budget.ratio
        if in_flight > self.recorded_usd:
            self.recorded_usd = max(in_flight, min(2 * in_flight, budget.limit - budget.spent))
            await self.writer.call(record_in_flight, self.teacher, self.recorded_usd)

    async def _try(self, task: _Task, sent: SentRequest) -> None:
        """Send a request once."""
        cost_usd, estimated = 0.0, False
        try:
            request, attempt = task.pending.request, task.pending.attempt
            # The same in every run: servers that honour it repeat a response that was lost when a
            # process died, without charging for it again.
            idempotency_key = f"{request.key}-{attempt}-{task.num_malformed}"
            raw = await self._send(request, attempt, idempotency_key)
            cost_usd, estimated = await self._receive(task, sent, raw)
        except openai.OpenAIError as error:
            cost_usd, estimated = await self._handle_error(task, sent, error)
        finally:
            self.ledger.budget.settle(task.max_usd, cost_usd, estimated=estimated)
            self.changed.set()

    async def _send(self, request: TeacherRequest, attempt: int, idempotency_key: str) -> Any:
        body, seconds = self.config.request_body(request, attempt), self.config.timeout_seconds
        try:
            # The client's own timeout is for each read: a body that drips never reaches it.
            async with asyncio.timeout(seconds + TIMEOUT_MARGIN_SECONDS):
                return await self.client.chat.completions.with_raw_response.create(
                    model=body.pop("model"),
                    messages=body.pop("messages"),
                    extra_body=body,
                    extra_headers={IDEMPOTENCY_HEADER: idempotency_key},
                )
        except TimeoutError:
            raise openai.APITimeoutError(httpx2.Request("POST", self.config.url)) from None

    async def _receive(self, task: _Task, sent: SentRequest, raw: Any) -> tuple[float, bool]:
        """Save the response. Returns its cost, and whether that is an estimate."""
        request, attempt = task.pending.request, task.pending.attempt
        body: Any = None
        try:
            body = json.loads(raw.text)
            response = parse_completion(
                body, self.config, request.key, attempt, max_usd=task.max_usd
            )
        except (MalformedResponseError, ValueError):
            return await self._handle_malformed(task, sent, reported_tokens(body))
        await self.writer.add(response)
        self.health.succeed()
        tokens = response.input_tokens + response.output_tokens
        self.limiter.succeed(sent, raw.headers, tokens, self.clock())
        self.ledger.record(response, request.source)
        return response.cost_usd, response.is_estimated

    async def _handle_malformed(
        self, task: _Task, sent: SentRequest, tokens: tuple[int, int] | None
    ) -> tuple[float, bool]:
        """Count an answer that is not a chat completion, and try again. Returns its cost, and
        whether that is an estimate."""
        self.limiter.fail(sent, self.clock(), overloaded=False)
        task.num_malformed += 1
        cost_usd = self.config.prices.cost(*tokens, batch=False) if tokens else task.max_usd
        charge = Charge(task.pending.request.key, MALFORMED, cost_usd, tokens is None)
        await self.writer.call(add_charges, [charge])
        if task.num_malformed > self.config.max_retries and not self.health.has_succeeded:
            self.ledger.stop(
                UserError(
                    f"{self.config.server} sends responses that are not chat completions; check"
                    " base_url"
                )
            )
        else:
            await self._retry(task, _MALFORMED_MESSAGE, None)
        return cost_usd, tokens is None

    async def _handle_error(
        self, task: _Task, sent: SentRequest, error: openai.OpenAIError
    ) -> tuple[float, bool]:
        """Decide what an error means. Returns what the request may have cost, and whether that is
        an estimate."""
        kind, now = error_kind(error), self.clock()
        self.health.last_error = describe_error(error, self.config)
        headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
        wait = retry_after_seconds(headers)
        if kind is ErrorKind.RATE_LIMITED:
            self.limiter.limit(sent, headers, wait, now)
            self._put_back(task, 0.0)
            return 0.0, False
        overloaded = kind in (ErrorKind.SERVER, ErrorKind.UNREACHABLE, ErrorKind.LOST)
        self.limiter.fail(sent, now, overloaded=overloaded)
        if kind is ErrorKind.REJECTED:
            self.health.last_reply = now
            self.ledger.reject(task.pending.request.key, error_message(error))
            return 0.0, False
        unreachable = kind is ErrorKind.UNREACHABLE and not self.health.has_succeeded
        if kind is ErrorKind.FATAL or (unreachable and task.tries >= self.config.max_retries):
            self.ledger.stop(to_user_error(error, self.config))
            return 0.0, False
        lost = kind is ErrorKind.LOST
        if lost:
            key, reason = task.pending.request.key, lost_reason(error)
            charge = Charge(key, reason, task.max_usd, estimated=True)
            await self.writer.call(add_charges, [charge])
        if getattr(error, "status_code", None) == CONFLICT_STATUS_CODE:
            wait = self.config.timeout_seconds / (self.config.max_retries + 1)
        await self._retry(task, self.health.last_error, wait)
        return (task.max_usd if lost else 0.0), lost

    async def _retry(self, task: _Task, message: str, wait: float | None) -> None:
        """Send a request again later. After the last try of a round, see whether the server is at
        fault or this request."""
        task.tries += 1
        pause = min(MIN_RETRY_SECONDS * 2.0 ** (task.tries - 1), MAX_RETRY_SECONDS)
        pause = max(pause, wait or 0.0)
        if task.tries <= self.config.max_retries:
            self._put_back(task, pause)
            return
        if self.health.last_success > task.round_start or await self.health.probe():
            task.rounds += 1
        if task.rounds >= self.ledger.max_attempts:
            key = task.pending.request.key
            await self.writer.call(add_charges, [Charge(key, GIVEN_UP, 0.0, False, message)])
            self.ledger.give_up(key, message)
            return
        task.tries, task.round_start = 0, self.clock()
        self._put_back(task, pause)

    def _show(self) -> None:
        limiter = self.limiter
        self.ledger.activity = f"{limiter.in_flight} in flight, {limiter.describe(self.clock())}"
        self.ledger.show()

    async def _watch(self) -> None:
        """Show the progress, also of a run that hangs, and end a run in which nothing succeeds."""
        while True:
            await asyncio.sleep(min(1.0, self.config.max_outage_seconds / 4))
            self._show()
            self.ledger.progress.tick()
            try:
                if self.ledger.stop_error is None and await self.health.has_outage():
                    self.ledger.stop(self.health.outage_error())
            except UserError as error:  # the response cache cannot be written
                self.ledger.stop(error)

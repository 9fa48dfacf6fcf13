"""The state of a teacher's requests: which are still to be sent, which have a usable response, and
when the run must stop."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from boltlm.errors import UserError, redact
from boltlm.progress import Progress
from boltlm.teachers.cost import CostBudget
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.response_cache import ResponseCache, TeacherResponse
from boltlm.tokens import SPECIAL_TOKENS

# The reasons why a response cannot be used.
EMPTY, REFUSED, TRUNCATED, SPECIAL_TOKEN = "empty", "refused", "truncated", "special_token"
INCOMPLETE = "incomplete"  # it ended neither by the model itself nor at the token limit
REJECTED = "rejected"  # the server did not accept the request; it costs nothing
NO_ANSWER = "no_answer"  # the server answered other requests, but not this one, however often sent

_APOLOGY = re.compile(
    r"(I'm|I am|I’m) (very )?sorry\b|(Sorry|I apologi[sz]e),|I (can't|can’t|cannot) "
)
# The values of finish_reason, of various servers, that mean that the model ended the text itself.
_STOP_REASONS = ("stop", "eos", "eos_token", "end_turn")
# A run stops after this many unusable responses if they outnumber the usable ones.
_MIN_FAILURES_TO_STOP = 20


def unusable_reason(response: TeacherResponse) -> str | None:
    """Why a response cannot be used, or None where it can."""
    if response.finish == "length":
        return TRUNCATED
    if response.finish in ("refused", "content_filter"):
        return REFUSED
    if response.finish not in _STOP_REASONS:
        return INCOMPLETE
    text = response.text.strip()
    if not text:
        return EMPTY
    if any(token in text for token in SPECIAL_TOKENS):
        return SPECIAL_TOKEN
    return REFUSED if _APOLOGY.match(text) else None


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request to be sent. `attempt` counts from 0; after an unusable response there is another
    attempt."""

    request: TeacherRequest
    attempt: int


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why there will be no response to a request: REJECTED or NO_ANSWER, and the message."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """The status of a request. Exactly one of the first three fields is not None: the usable
    response, the reason why there will be none, or the number of the next attempt. `responses`
    holds the responses to all attempts so far."""

    response: TeacherResponse | None
    reason: str | None
    next_attempt: int | None
    responses: list[TeacherResponse]


@dataclass(slots=True)
class RequestLedger:
    """The state of one teacher's requests: the response cache, and what happened in this run.

    `teacher`: the teacher's key in params, for messages. `failed`: the requests that will have no
    response, by key. `in_flight`: keys of the requests that were handed out and have not returned.
    `usable`, `unusable`: the numbers of responses so far, the latter by reason and with requests
    that failed in this run. `stop_error`: why no further request is sent; responses to requests in
    flight are still saved. `activity`: what the client is doing, for the progress display.
    """

    teacher: str
    cache: ResponseCache
    max_attempts: int
    budget: CostBudget
    progress: Progress
    failed: dict[str, RequestFailure] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    usable: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    stop_error: BaseException | None = None
    activity: str = ""

    def status(self, key: str) -> RequestStatus:
        """The status of the request with this key."""
        responses = self.cache.responses(key)
        for response in responses:
            if unusable_reason(response) is None:
                return RequestStatus(response, None, None, responses)
        if (failure := self.failed.get(key)) is not None:
            return RequestStatus(None, failure.reason, None, responses)
        if len(responses) >= self.max_attempts:
            return RequestStatus(None, unusable_reason(responses[-1]), None, responses)
        return RequestStatus(None, None, len(responses), responses)

    def pending(self, requests: Iterable[TeacherRequest]) -> Iterator[PendingRequest]:
        """Those of `requests` that are to be sent now. A request is skipped where its status is
        final, or where the same request is in flight or part of a pending batch."""
        self.in_flight.clear()
        for request in requests:
            attempt = self.status(request.key).next_attempt
            if attempt is None or request.key in self.in_flight:
                continue
            if not self.cache.is_in_batch(request.key, attempt):
                self.in_flight.add(request.key)
                yield PendingRequest(request, attempt)

    def record(self, response: TeacherResponse) -> None:
        """Count a response of this run. Stops the run where most responses are unusable."""
        self.in_flight.discard(response.key)
        reason = unusable_reason(response)
        self.usable += reason is None
        if reason is not None:
            self.unusable[reason] += 1
        self._check_failures()
        self.show()
        self.progress.advance(1)

    def reject(self, key: str, message: str) -> None:
        """Record that the server did not accept a request, and its message."""
        self._fail(key, RequestFailure(REJECTED, redact(message)))

    def give_up(self, key: str, message: str) -> None:
        """Record that the server never answered a request, and what it did instead."""
        self._fail(key, RequestFailure(NO_ANSWER, redact(message)))

    def _fail(self, key: str, failure: RequestFailure) -> None:
        self.in_flight.discard(key)
        self.failed[key] = failure
        self.unusable[failure.reason] += 1
        self._check_failures(failure)
        self.show()
        self.progress.advance(1)

    def show(self) -> None:
        """Bring the progress display up to date: failures by reason, and the cost if it matters."""
        failures = self._describe_failures()
        cost = self.budget.describe() if self.budget.limit else ""
        failed = f"failed: {failures}" if failures else ""
        self.progress.note("; ".join(filter(None, (self.activity, failed, cost))))

    def stop(self, error: BaseException) -> None:
        """Send no further request. The first error is the one that will be reported."""
        if self.stop_error is None:
            self.stop_error = error

    def _describe_failures(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.unusable.items())

    def _check_failures(self, failure: RequestFailure | None = None) -> None:
        failures = self.unusable.total()
        if failures < _MIN_FAILURES_TO_STOP or failures <= self.usable:
            return
        example = f"; one of them: {failure.message}" if failure else ""
        self.stop(
            UserError(
                f"{self.teacher}: stopped because {failures} of the first"
                f" {failures + self.usable} responses cannot be used"
                f" ({self._describe_failures()}{example});"
                " check max_output_tokens, the model and the prompt"
            )
        )


class TeacherClient(Protocol):
    """A way to send requests to a teacher."""

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """Send `requests` until there are none or the ledger has stopped; save every response in
        the ledger's cache and record it in the ledger. Returns how many requests or batches were
        sent or, left over from an earlier run, read. Raises UserError for errors of the server."""
        ...

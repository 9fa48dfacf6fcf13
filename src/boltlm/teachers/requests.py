"""The state of a teacher's requests: which are still to be sent, which have a usable response, and
when the run must stop."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from boltlm.errors import UserError, redact
from boltlm.progress import Progress
from boltlm.teachers.cost import CostBudget
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.response_cache import ResponseCache, TeacherResponse
from boltlm.teachers.response_checks import NO_ANSWER, REJECTED, ResponseChecks

# A run stops after this many unusable responses if they outnumber the usable ones.
_MIN_FAILURES_TO_STOP = 20


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

    `teacher`: the teacher's key in params, for messages. `requests`: begins anew with the first
    of all its requests. `checks`: which responses are usable.
    `failed`: the requests that will have no response, by key. `in_flight`: keys of the requests
    that were handed out and have not returned. `usable`, `unusable`: the numbers of responses so
    far, the latter by reason and with requests that failed in this run. `stop_error`: why no
    further request is sent; responses to requests in flight are still saved. `activity`: what the
    client is doing, for the progress display.
    """

    teacher: str
    requests: Callable[[], Iterable[TeacherRequest]]
    cache: ResponseCache
    max_attempts: int
    checks: ResponseChecks
    budget: CostBudget
    progress: Progress
    failed: dict[str, RequestFailure] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    usable: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    stop_error: BaseException | None = None
    activity: str = ""

    def status(self, request: TeacherRequest) -> RequestStatus:
        """The status of a request."""
        responses, reason = self.cache.responses(request.key), None
        for response in responses:
            reason = self._unusable_reason(response, request.source)
            if reason is None:
                return RequestStatus(response, None, None, responses)
        if (failure := self.failed.get(request.key)) is not None:
            return RequestStatus(None, failure.reason, None, responses)
        if len(responses) >= self.max_attempts:
            return RequestStatus(None, reason, None, responses)
        return RequestStatus(None, None, len(responses), responses)

    def pending(self) -> Iterator[PendingRequest]:
        """The requests that are to be sent now. A request is skipped where its status is final, or
        where the same request is in flight or part of a pending batch."""
        self.in_flight.clear()
        for request in self.requests():
            attempt = self.status(request).next_attempt
            if attempt is None or request.key in self.in_flight:
                continue
            if not self.cache.is_in_batch(request.key, attempt):
                self.in_flight.add(request.key)
                yield PendingRequest(request, attempt)

    def sources(self, keys: set[str]) -> dict[str, str]:
        """The texts that requests with these keys ask about; none where no check needs them. They
        are searched for in the corpus, because the cache does not hold them and a batch may be of
        an earlier run."""
        sources: dict[str, str] = {}
        for request in self.requests() if keys and self.checks.config.need_source else ():
            if request.key in keys:
                sources[request.key] = request.source
            if len(sources) == len(keys):
                break
        return sources

    def record(self, response: TeacherResponse, source: str | None) -> None:
        """Count a response of this run to a request that asks about `source`. Stops the run where
        most responses are unusable."""
        self.in_flight.discard(response.key)
        reason = self._unusable_reason(response, source)
        self.usable += reason is None
        if reason is not None:
            self.unusable[reason] += 1
        self._check_failures()
        self.show()
        self.progress.advance(1)

    def _unusable_reason(self, response: TeacherResponse, source: str | None) -> str | None:
        return self.cache.verdict(response, lambda: self.checks.unusable_reason(response, source))

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
        reasons = self._describe_failures()
        example = f"; one of them: {failure.message}" if failure else ""
        main_reason = self.unusable.most_common(1)[0][0]
        self.stop(
            UserError(
                f"{self.teacher}: stopped because {failures} of the first"
                f" {failures + self.usable} responses cannot be used ({reasons}{example});"
                f" {self.checks.remedy(main_reason)}"
            )
        )


class TeacherClient(Protocol):
    """A way to send requests to a teacher."""

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """Send `requests` until there are none or the ledger has stopped; save every response in
        the ledger's cache and record it in the ledger. Returns how many requests or batches were
        sent or, left over from an earlier run, read. Raises UserError for errors of the server."""
        ...

"""The state of a teacher's requests: which are still to be sent, which have a usable response, and
when the run must stop."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from boltlm.errors import UserError
from boltlm.progress import Progress
from boltlm.teachers.cost import CostBudget
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.response_cache import ResponseCache, TeacherResponse
from boltlm.teachers.response_checks import REJECTED, ResponseChecks

# A run stops after this many unusable responses if they outnumber the usable ones.
_MIN_FAILURES_TO_STOP = 20


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request to be sent. `attempt` counts from 0; after an unusable response there is another
    attempt."""

    request: TeacherRequest
    attempt: int


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

    `teacher`: the teacher's key in params, for messages. `checks`: which responses are usable.
    `rejected`: the server's message for each
    rejected request, by key. `in_flight`: keys of the requests that were handed out and have not
    returned. `usable`, `unusable`: the numbers of responses so far, the latter by reason.
    `stop_error`: why no further request is sent; responses to requests in flight are still saved.
    """

    teacher: str
    cache: ResponseCache
    max_attempts: int
    checks: ResponseChecks
    budget: CostBudget
    progress: Progress
    rejected: dict[str, str] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    usable: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    stop_error: BaseException | None = None

    def status(self, request: TeacherRequest) -> RequestStatus:
        """The status of a request."""
        responses, reason = self.cache.responses(request.key), None
        for response in responses:
            reason = self.checks.unusable_reason(response, request.source)
            if reason is None:
                return RequestStatus(response, None, None, responses)
        if request.key in self.rejected:
            return RequestStatus(None, REJECTED, None, responses)
        if len(responses) >= self.max_attempts:
            return RequestStatus(None, reason, None, responses)
        return RequestStatus(None, None, len(responses), responses)

    def pending(self, requests: Iterable[TeacherRequest]) -> Iterator[PendingRequest]:
        """Those of `requests` that are to be sent now. A request is skipped where its status is
        final, or where the same request is in flight or part of a pending batch."""
        self.in_flight.clear()
        for request in requests:
            attempt = self.status(request).next_attempt
            if attempt is None or request.key in self.in_flight:
                continue
            if not self.cache.is_in_batch(request.key, attempt):
                self.in_flight.add(request.key)
                yield PendingRequest(request, attempt)

    def record(self, response: TeacherResponse, request: TeacherRequest | None = None) -> None:
        """Count a response of this run. Stops the run where most responses are unusable. Without
        its request, a copy counts as usable here; `status` knows better."""
        self.in_flight.discard(response.key)
        reason = self.checks.unusable_reason(response, request.source if request else None)
        self.usable += reason is None
        if reason is not None:
            self.unusable[reason] += 1
        self._check_failures()
        self.progress.note(f"${self.budget.spent:.4f}")
        self.progress.advance(1)

    def reject(self, key: str, message: str) -> None:
        """Record that the server did not accept a request, and its message."""
        self.in_flight.discard(key)
        self.rejected[key] = message
        self._check_failures()
        self.progress.advance(1)

    def stop(self, error: BaseException) -> None:
        """Send no further request. The first error is the one that will be reported."""
        if self.stop_error is None:
            self.stop_error = error

    def _check_failures(self) -> None:
        failures = self.unusable.total() + len(self.rejected)
        if failures < _MIN_FAILURES_TO_STOP or failures <= self.usable:
            return
        reasons = [f"{count} {reason}" for reason, count in self.unusable.items()]
        main_reason = (self.unusable.most_common(1) or [(REJECTED, 0)])[0][0]
        if self.rejected:
            example = next(iter(self.rejected.values()))
            reasons.append(f"{len(self.rejected)} {REJECTED}, one of them with: {example}")
        self.stop(
            UserError(
                f"{self.teacher}: stopped because {failures} of the first"
                f" {failures + self.usable} responses cannot be used ({'; '.join(reasons)});"
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

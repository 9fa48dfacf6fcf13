"""The rate limiter against simulated servers, in simulated time."""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from boltlm.teachers.rate_limiter import Allowance, RateLimiter, SentRequest, parse_duration

PER_MINUTE = 500
LATENCY_SECONDS = 2.5
# The requests that a server accepts at once when it was idle, as seconds of its rate.
BURST_SECONDS = 6.0


@dataclass
class Bucket:
    """A server with a token bucket. `headers`: it reports its limit; `retry_after`: after a 429 it
    says when the next request is accepted."""

    headers: bool
    retry_after: bool
    rate: float = PER_MINUTE / 60
    level: float = BURST_SECONDS * PER_MINUTE / 60
    at: float = 0.0

    def admit(self, now: float) -> tuple[bool, Mapping[str, str], float | None]:
        """Whether a request is accepted, the headers, and the pause that is asked for."""
        full = BURST_SECONDS * self.rate
        self.level, self.at = min(full, self.level + self.rate * (now - self.at)), now
        accepted = self.level >= 1
        self.level -= accepted
        headers = {
            "x-ratelimit-limit-requests": f"{full:.0f}",
            "x-ratelimit-remaining-requests": f"{max(0, math.floor(self.level))}",
            "x-ratelimit-reset-requests": f"{(full - self.level) / self.rate:.3f}s",
        }
        pause = (1 - self.level) / self.rate if self.retry_after and not accepted else None
        return accepted, headers if self.headers else {}, pause


@dataclass
class Window:
    """A server that counts from zero every minute, and says when the minute is over."""

    count: int = 0
    start: float = 0.0

    def admit(self, now: float) -> tuple[bool, Mapping[str, str], float | None]:
        """As `Bucket.admit`."""
        if now >= self.start + 60:
            self.start, self.count = now - now % 60, 0
        self.count += 1
        accepted = self.count <= PER_MINUTE
        left = self.start + 60 - now
        headers = {
            "x-ratelimit-limit-requests": f"{PER_MINUTE}",
            "x-ratelimit-remaining-requests": f"{max(0, PER_MINUTE - self.count)}",
            "x-ratelimit-reset-requests": f"{math.ceil(left)}s",
        }
        return accepted, headers, None if accepted else math.ceil(left)


def simulate(
    server: Bucket | Window, num_requests: int, concurrency: int, latency: float
) -> tuple[float, RateLimiter]:
    """The time at which all requests are answered, and the limiter."""
    limiter, now, num_open, num_done = RateLimiter(concurrency), 0.0, num_requests, 0
    returns: list[tuple[float, int, SentRequest, bool, Mapping[str, str], float | None]] = []
    number = 0
    while num_done < num_requests:
        wait = limiter.wait_seconds(1, now) if num_open else math.inf
        if wait == 0:
            sent = limiter.send(1, now)
            accepted, headers, pause = server.admit(now)
            number, num_open = number + 1, num_open - 1
            delay = latency if accepted else 0.05
            heapq.heappush(returns, (now + delay, number, sent, accepted, headers, pause))
        elif returns and returns[0][0] <= now + wait:
            now, _, sent, accepted, headers, pause = heapq.heappop(returns)
            if accepted:
                limiter.succeed(sent, headers, 1, now)
                num_done += 1
            else:
                limiter.limit(sent, headers, pause, now)
                num_open += 1
        else:
            assert math.isfinite(wait), "nothing is in flight, and nothing may be sent"
            now += wait
    return now, limiter


@pytest.mark.parametrize("latency", [0.05, LATENCY_SECONDS])
@pytest.mark.parametrize(
    "make_server",
    [
        lambda: Bucket(headers=True, retry_after=True),
        lambda: Bucket(headers=False, retry_after=True),
        lambda: Bucket(headers=False, retry_after=False),
        Window,
    ],
    ids=["headers", "retry-after", "bare", "window"],
)
def test_a_run_under_a_steady_limit_uses_nine_tenths_of_it(
    make_server: Callable[[], Bucket | Window], latency: float
) -> None:
    """Whatever the server reports, also with far more workers than the limit needs."""
    for concurrency in (32, 200):
        num_requests = 6 * PER_MINUTE
        seconds, limiter = simulate(make_server(), num_requests, concurrency, latency)
        least = (num_requests / PER_MINUTE) * 60 - BURST_SECONDS
        print(
            concurrency,
            latency,
            round(num_requests / (seconds * PER_MINUTE / 60), 3),
            limiter.num_limited,
            round(limiter.concurrency, 1),
        )

"""The rate limiter against simulated servers, in simulated time."""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from boltlm.teachers.rate_limiter import Pace, RateLimiter, SentRequest, parse_duration

PER_MINUTE = 500
LATENCY_SECONDS = 2.5
# The requests that a server accepts at once when it was idle, as seconds of its rate.
BURST_SECONDS, SMALL_BURST_SECONDS, NO_BURST_SECONDS = 6.0, 1.2, 60 / PER_MINUTE


@dataclass
class Bucket:
    """A server with a token bucket. `headers`: it reports its limit; `retry_after`: after a 429 it
    says when the next request is accepted."""

    headers: bool
    retry_after: bool
    burst_seconds: float = BURST_SECONDS
    rate: float = PER_MINUTE / 60
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.burst_seconds * self.rate

    def admit(self, now: float) -> tuple[bool, Mapping[str, str], float | None]:
        """Whether a request is accepted, the headers, and the pause that is asked for."""
        full = self.burst_seconds * self.rate
        self.level, self.at = min(full, self.level + self.rate * (now - self.at)), now
        accepted = self.level >= 1 - 1e-9
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
        lambda: Bucket(headers=True, retry_after=True, burst_seconds=SMALL_BURST_SECONDS),
        lambda: Bucket(headers=False, retry_after=True),
        lambda: Bucket(headers=False, retry_after=False),
        lambda: Bucket(headers=True, retry_after=True, burst_seconds=NO_BURST_SECONDS),
        lambda: Bucket(headers=False, retry_after=True, burst_seconds=NO_BURST_SECONDS),
        lambda: Bucket(headers=False, retry_after=False, burst_seconds=NO_BURST_SECONDS),
        Window,
    ],
    ids=[
        "headers",
        "headers, small burst",
        "retry-after",
        "bare",
        "headers, no burst",
        "retry-after, no burst",
        "bare, no burst",
        "window",
    ],
)
def test_a_run_under_a_steady_limit_uses_nine_tenths_of_it(
    make_server: Callable[[], Bucket | Window], latency: float
) -> None:
    """Whatever the server reports, also with far more workers than the limit needs."""
    for concurrency in (32, 200):
        num_requests = 6 * PER_MINUTE
        seconds, limiter = simulate(make_server(), num_requests, concurrency, latency)
        assert num_requests / seconds >= 0.9 * PER_MINUTE / 60
        assert limiter.in_flight == 0


def test_a_server_that_reports_its_limit_rarely_has_to_refuse() -> None:
    """The first burst aside: until the first response the limit is unknown."""
    _, limiter = simulate(Bucket(headers=True, retry_after=True), 3000, 32, LATENCY_SECONDS)
    assert limiter.num_limited <= 32


def test_tokens_are_limited_too() -> None:
    """Of 1,000 tokens a minute, 400 are left; a request of 600 waits for the rest."""
    limiter = RateLimiter(8)
    sent = limiter.send(600, 0.0)
    headers = {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "400",
        "x-ratelimit-reset-tokens": "36s",
    }
    limiter.succeed(sent, headers, 600, 1.0)
    assert limiter.wait_seconds(400, 1.0) == 0
    assert limiter.wait_seconds(600, 1.0) == pytest.approx(200 / (600 / 36) - 1)
    assert "600 of 1,000 tokens/min" in limiter.describe(1.0)


def test_headers_that_make_no_sense_do_not_stop_a_run() -> None:
    """Nothing is left, for ever: a request is tried all the same after a while."""
    limiter = RateLimiter(8)
    for limit, reset in (("1", "1000d"), ("0", "0s"), ("-1", "x"), ("nan", "1s")):
        headers = {
            "x-ratelimit-limit-requests": limit,
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": reset,
        }
        limiter.succeed(limiter.send(1, 0.0), headers, 1, 0.0)
        assert limiter.wait_seconds(1, 0.0) <= 15


def test_concurrency_falls_once_for_each_round_and_grows_again() -> None:
    """Eight requests of one round fail together: one decrease. Then each round of responses adds
    one."""
    limiter = RateLimiter(8)
    for sent in [limiter.send(1, 0.0) for _ in range(8)]:
        limiter.fail(sent, 0.5, overloaded=True)
    assert limiter.concurrency == pytest.approx(7.2)
    for sent in [limiter.send(1, 2.0) for _ in range(7)]:
        limiter.succeed(sent, {}, 1, 3.0)
    assert limiter.concurrency == pytest.approx(8, abs=0.2)


def test_the_pace_is_close_to_the_rate_that_was_refused() -> None:
    """It starts at what was accepted, doubles until a request is refused, falls by a twentieth, is
    back at the limit after ten seconds, and far above it when nothing is refused for a minute."""
    pace = Pace()
    assert pace.rate(0.0) == math.inf
    pace.start(10, 2.0, 0.0)
    assert [pace.rate(t) for t in (0.0, 1.0, 2.0)] == [5.0, 10.0, 20.0]
    pace.slow_down(2.0)
    assert [pace.rate(2.0 + t) for t in (0.0, 10.0, 20.0)] == pytest.approx([19.0, 20.0, 21.0])
    assert pace.rate(62.0) > 100
    pace.slow_down(12.0)
    pace.slow_down(13.0)  # so soon: the rate is far too high
    assert pace.rate(13.0) == pytest.approx(0.7 * 20, rel=0.05)


def test_a_closed_server_is_asked_rarely_and_the_pace_is_kept() -> None:
    """While nothing is accepted, the pause doubles up to half a minute. When the server is open
    again, requests are sent as fast as before."""
    limiter, now = RateLimiter(1), 0.0
    for _ in range(100):
        limiter.succeed(limiter.send(1, now), {}, 1, now)
        now += 0.1
    waits: list[float] = []
    for _ in range(9):
        limiter.limit(limiter.send(1, now), {}, None, now)
        waits.append(limiter.wait_seconds(1, now))
        now += waits[-1]
    assert waits[0] == pytest.approx(0.1)
    assert waits[1:] == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30], rel=0.1)
    limiter.succeed(limiter.send(1, now), {}, 1, now)
    assert limiter.wait_seconds(1, now) <= 0.11


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360.0), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("7", 7.0), ("soon", None)],
)
def test_durations_of_headers(text: str, seconds: float | None) -> None:
    """As OpenAI writes them, and plain seconds."""
    assert parse_duration(text) == seconds

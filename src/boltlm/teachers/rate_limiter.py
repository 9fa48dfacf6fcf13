"""How many requests may be sent to a server that limits their rate.

Written by hand: limiters such as aiolimiter and pyrate-limiter keep to a rate that is known
beforehand, tenacity and the client's own retries know one request only. Here the rate is what the
server says (`x-ratelimit-*`, `Retry-After`) or, where it says nothing, what it turns out to accept,
and one request's 429 slows down all others. Time is an argument, so tests simulate servers.

Shared by all requests of a run: the server's limits on requests and tokens, each followed as a
token bucket; the pace, a rate that falls with each 429 and grows again (`Pace`), because headers
may be missing and a server may accept no two requests at once; a pause after a 429; and the
concurrency by additive increase and multiplicative decrease, as TCP has it: one more for each round
of responses, a factor less for each round with an error that is no 429.
"""

import math
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

DECREASE_FACTOR = 0.9
MIN_INCREASE_PER_ROUND = (
    0.05  # a fraction; so that hundreds of requests at a time are reached again
)
# The pause after a 429 that names none is that between two requests; after each further one while
# nothing is accepted it is doubled, from the minimum up to the maximum.
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
# The longest wait for a limit without a 429: a header that is wrong must not stop the run.
MAX_WAIT_SECONDS = 15.0
MIN_WAIT_SECONDS = 1e-3  # less is none
# See `Pace`. A refusal soon after the last one says that the rate is far too high.
START_DOUBLING_SECONDS, MAX_DOUBLINGS = 1.0, 30.0
PACE_DECREASE, QUICK_PACE_DECREASE, QUICK_REFUSAL_SECONDS = 0.05, 0.3, 2.0
CUBIC = 5e-5
RATE_WINDOW_SECONDS = 60.0  # over which requests and tokens per minute are counted
_SECONDS_BY_UNIT = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)")


def parse_duration(text: str) -> float | None:
    """Seconds of a duration such as `6m0s`, `120ms` or `1.5`; None where it is none."""
    parts: list[tuple[str, str]] = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _SECONDS_BY_UNIT[unit] for number, unit in parts)


@dataclass(slots=True)
class Allowance:
    """A limit of the server on requests or tokens, followed as a token bucket: `level` may be used
    at the time `at`, and it grows by `rate` a second up to `limit`. Infinite until the server
    reports it."""

    limit: float = math.inf
    level: float = math.inf
    rate: float = math.inf
    at: float = 0.0
    observed_at: float = -math.inf

    def observe(
        self, limit: float, remaining: float, reset: float, *, at: float, used_since: float
    ) -> None:
        """Take over what a response reports. `at`: when its request was sent; `reset`: seconds from
        then until the bucket is full. `used_since`: what was sent after it, and so is not part of
        `remaining`."""
        if limit <= 0 or at < self.observed_at:
            return
        if remaining < limit and reset > 0:
            self.rate = (limit - remaining) / reset
        elif math.isinf(self.rate):
            self.rate = limit / RATE_WINDOW_SECONDS
        self.limit, self.level, self.at = limit, remaining - used_since, at
        self.observed_at = at

    def wait_seconds(self, amount: float, now: float) -> float:
        """How long to wait until `amount` is available."""
        if math.isinf(self.limit):
            return 0.0
        missing = min(amount, self.limit) - self._level_at(now)
        return max(0.0, missing / self.rate)

    def use(self, amount: float, now: float) -> None:
        """Subtract what a request uses."""
        if not math.isinf(self.limit):
            self.level, self.at = self._level_at(now) - amount, max(self.at, now)

    def _level_at(self, now: float) -> float:
        return min(self.limit, self.level + self.rate * max(0.0, now - self.at))

    @property
    def per_minute(self) -> float:
        """The limit per minute."""
        return self.rate * 60


@dataclass(slots=True)
class Pace:
    """The rate at which requests are sent to a server that refuses some of them and does not say
    how many it accepts, in requests a second; infinite until it refuses the first one.

    It begins at `start_rate`, what was accepted so far, and doubles every START_DOUBLING_SECONDS
    until a request is refused. From then on it is the function of TCP CUBIC (RFC 9438, eq. 1) of
    the time t since the last refusal: rate = limit (1 + CUBIC (t - K)^3), where `limit` is the rate
    that was refused and K = (decrease / CUBIC)^(1/3) the time after which it is reached again. So
    it is close to the limit most of the time, and soon far above where nothing is refused.
    """

    limit: float = math.inf
    start_rate: float = math.inf
    since: float = -math.inf
    decrease: float = PACE_DECREASE

    def rate(self, now: float) -> float:
        """The rate at the time `now`."""
        seconds = now - self.since
        if math.isinf(self.start_rate):
            return math.inf
        if math.isinf(self.limit):
            doublings = min(seconds / START_DOUBLING_SECONDS, MAX_DOUBLINGS)
            return self.start_rate * 2**doublings
        recovery_seconds = (self.decrease / CUBIC) ** (1 / 3)
        return self.limit * (1 + CUBIC * (seconds - recovery_seconds) ** 3)

    def start(self, num_accepted: int, seconds: float, now: float) -> None:
        """The first requests are refused; `num_accepted` others in so many seconds were not."""
        self.start_rate, self.since = max(1, num_accepted) / max(1.0, seconds), now

    def slow_down(self, now: float) -> None:
        """A request was refused at the current rate."""
        self.limit = self.rate(now)
        soon = now - self.since < QUICK_REFUSAL_SECONDS
        self.decrease = QUICK_PACE_DECREASE if soon else PACE_DECREASE
        self.since = now


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request in flight: when it was sent, the tokens that it may use, and how many requests and
    tokens had been sent up to it."""

    at: float
    tokens: float
    requests_sent: int
    tokens_sent: float


@dataclass(slots=True)
class RateLimiter:
    """Decides when the next request may be sent. Times are in seconds of any one clock."""

    max_concurrency: int
    concurrency: float = field(init=False)
    requests: Allowance = field(default_factory=Allowance)
    tokens: Allowance = field(default_factory=Allowance)
    in_flight: int = 0
    num_limited: int = 0  # 429s of this run
    _requests_sent: int = 0
    _tokens_sent: float = 0.0
    _pace: Pace = field(default_factory=Pace)
    _first_sent: float = math.inf
    _last_sent: float = -math.inf
    _last_success: float = -math.inf
    _paused_until: float = -math.inf
    _decreased_at: float = -math.inf
    _paused_at: float = -math.inf
    _pause: float = 0.0
    _recent: deque[tuple[float, float]] = field(default_factory=deque[tuple[float, float]])

    def __post_init__(self) -> None:
        self.concurrency = float(self.max_concurrency)

    def wait_seconds(self, tokens: float, now: float) -> float:
        """How long to wait before a request is sent: 0 where it may be sent now, infinity where
        another one must return first."""
        if self.in_flight >= int(self.concurrency):
            return math.inf
        wait = max(self.requests.wait_seconds(1, now), self.tokens.wait_seconds(tokens, now))
        wait = max(wait, self._last_sent + 1 / self._pace.rate(now) - now)
        wait = min(wait, self._last_sent + MAX_WAIT_SECONDS - now)
        wait = max(wait, self._paused_until - now)
        return wait if wait > MIN_WAIT_SECONDS else 0.0

    def send(self, tokens: float, now: float) -> SentRequest:
        """Enter a request that is sent now and may use `tokens`."""
        self.in_flight += 1
        self._last_sent, self._first_sent = now, min(now, self._first_sent)
        self._requests_sent += 1
        self._tokens_sent += tokens
        self.requests.use(1, now)
        self.tokens.use(tokens, now)
        return SentRequest(now, tokens, self._requests_sent, self._tokens_sent)

    def succeed(
        self, sent: SentRequest, headers: Mapping[str, str], tokens: float, now: float
    ) -> None:
        """A response arrived, with these headers; it used `tokens`."""
        self.in_flight -= 1
        increase = max(1 / self.concurrency, MIN_INCREASE_PER_ROUND)
        self.concurrency = min(self.max_concurrency, self.concurrency + increase)
        self._pause, self._last_success = 0.0, now
        self._observe(sent, headers)
        self._recent.append((now, tokens))
        self._forget(now)

    def limit(
        self,
        sent: SentRequest,
        headers: Mapping[str, str],
        retry_after: float | None,
        now: float,
    ) -> None:
        """The server answered 429. Send nothing for as long as it says, and then more slowly."""
        self.in_flight -= 1
        self.num_limited += 1
        self._observe(sent, headers)
        self._slow_down(sent, now)
        if retry_after is not None:
            self._paused_until = max(self._paused_until, now + retry_after)
        elif sent.at >= self._paused_at:  # else it was sent before the others had returned
            pause = max(self._pause, 1 / self._pace.rate(now))
            self._paused_at, self._paused_until = now, max(self._paused_until, now + pause)
            self._pause = min(max(2 * self._pause, MIN_PAUSE_SECONDS), MAX_PAUSE_SECONDS)

    def _slow_down(self, sent: SentRequest, now: float) -> None:
        """A request was refused: lower the pace, once for all requests on their way together."""
        pace = self._pace
        has_begun = math.isfinite(pace.limit) or now - pace.since >= QUICK_REFUSAL_SECONDS
        if math.isinf(pace.start_rate) or not has_begun:
            pace.start(self._requests_sent - self.num_limited, now - self._first_sent, now)
        elif sent.at >= pace.since and self._last_success >= pace.since:
            # Where nothing has been accepted since then the server is closed, whatever the pace.
            pace.slow_down(now)

    def fail(self, sent: SentRequest, now: float, *, overloaded: bool) -> None:
        """There was no response. `overloaded`: because the server or the network is in trouble."""
        self.in_flight -= 1
        if overloaded:
            self._decrease(sent, now)

    def _decrease(self, sent: SentRequest, now: float) -> None:
        # Requests that were sent before the last decrease do not say that it was too small.
        if sent.at >= self._decreased_at:
            self.concurrency = max(1.0, self.concurrency * DECREASE_FACTOR)
            self._decreased_at = now

    def _observe(self, sent: SentRequest, headers: Mapping[str, str]) -> None:
        since = {
            "requests": self._requests_sent - sent.requests_sent,
            "tokens": self._tokens_sent - sent.tokens_sent,
        }
        for name, allowance in (("requests", self.requests), ("tokens", self.tokens)):
            try:
                limit = float(headers[f"x-ratelimit-limit-{name}"])
                remaining = float(headers[f"x-ratelimit-remaining-{name}"])
            except (KeyError, ValueError):
                continue
            reset = parse_duration(headers.get(f"x-ratelimit-reset-{name}", ""))
            if math.isfinite(limit) and math.isfinite(remaining):
                allowance.observe(
                    limit, remaining, reset or 0.0, at=sent.at, used_since=since[name]
                )

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_SECONDS:
            self._recent.popleft()

    def describe(self, now: float) -> str:
        """Requests and tokens of the last minute, and the server's limits where they are known."""
        self._forget(now)
        counts = (("requests", len(self._recent), self.requests),)
        counts += (("tokens", sum(tokens for _, tokens in self._recent), self.tokens),)
        parts: list[str] = []
        for name, count, allowance in counts:
            known = math.isfinite(allowance.limit) and math.isfinite(allowance.rate)
            limit = f" of {allowance.per_minute:,.0f}" if known else ""
            parts.append(f"{count:,.0f}{limit} {name}/min")
        if self.num_limited:
            parts.append(f"{self.num_limited:,} times 429")
        return ", ".join(parts)

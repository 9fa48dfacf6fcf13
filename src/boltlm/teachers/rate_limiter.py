"""How many requests may be sent to a server that limits their rate.

Written by hand: limiters such as aiolimiter and pyrate-limiter keep to a rate that is known
beforehand, tenacity and the client's own retries know one request only. Here the rate is what the
server says (`x-ratelimit-*`, `Retry-After`) or, where it says nothing, what it turns out to accept,
and one request's 429 slows down all others. Time is an argument, so tests simulate servers.

Shared by all requests of a run: the server's limits on requests and tokens, each followed as a
token bucket; a pause after a 429; and the concurrency by additive increase and multiplicative
decrease, as TCP has it: one more for each round of responses, a factor less for each round with a
429 of a server that does not report its limits, or with another error.
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
# The pause after a 429 that names none, and after each further one: doubled up to the maximum.
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
# The longest wait for a limit without a 429: a header that is wrong must not stop the run.
MAX_WAIT_SECONDS = 15.0
MIN_WAIT_SECONDS = 1e-3  # less is none
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
    _last_sent: float = -math.inf
    _paused_until: float = -math.inf
    _decreased_at: float = -math.inf
    _pause: float = MIN_PAUSE_SECONDS
    _recent: deque[tuple[float, float]] = field(default_factory=deque[tuple[float, float]])

    def __post_init__(self) -> None:
        self.concurrency = float(self.max_concurrency)

    def wait_seconds(self, tokens: float, now: float) -> float:
        """How long to wait before a request is sent: 0 where it may be sent now, infinity where
        another one must return first."""
        if self.in_flight >= int(self.concurrency):
            return math.inf
        wait = max(self.requests.wait_seconds(1, now), self.tokens.wait_seconds(tokens, now))
        wait = min(wait, self._last_sent + MAX_WAIT_SECONDS - now)
        wait = max(wait, self._paused_until - now)
        return wait if wait > MIN_WAIT_SECONDS else 0.0

    def send(self, tokens: float, now: float) -> SentRequest:
        """Enter a request that is sent now and may use `tokens`."""
        self.in_flight += 1
        self._last_sent = now
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
        self._pause = MIN_PAUSE_SECONDS
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
        """The server answered 429. Send nothing for as long as it says, and fewer at a time unless
        its limits are known."""
        self.in_flight -= 1
        self.num_limited += 1
        self._observe(sent, headers)
        is_first = sent.at >= self._decreased_at
        # Where the limits are known and so is the pause, too many at a time are not the cause.
        known = math.isfinite(min(self.requests.limit, self.tokens.limit))
        if not known or retry_after is None:
            self._decrease(sent, now)
        if retry_after is not None:
            self._paused_until = max(self._paused_until, now + retry_after)
        elif is_first:
            self._paused_until = max(self._paused_until, now + self._pause)
            self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)

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

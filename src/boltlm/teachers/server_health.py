"""Whether the server of a teacher works: when it last did, and a request that tries it."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import openai

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.teachers.api_errors import ErrorKind, error_kind
from boltlm.teachers.cache_writer import CacheWriter
from boltlm.teachers.charges import PROBE, Charge, add_charges
from boltlm.teachers.completions import MalformedResponseError, parse_completion
from boltlm.teachers.model_config import OpenAIChatConfig
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.requests import RequestLedger

PROBE_INTERVAL_SECONDS = 10.0
_PROBE = TeacherRequest("probe", "", 0, "", "", ({"role": "user", "content": "Reply with OK."},))

# Sends a request with the number of its attempt and an idempotency key.
Send = Callable[[TeacherRequest, int, str], Awaitable[Any]]


class ServerHealth:
    """`last_success`: when a chat completion last arrived. `last_reply`: when the server last
    accepted or rejected a request, at first the start. `last_error`: what went wrong last."""

    def __init__(
        self, config: OpenAIChatConfig, send: Send, ledger: RequestLedger, writer: CacheWriter
    ) -> None:
        self.config, self.send, self.ledger, self.writer = config, send, ledger, writer
        self.clock = asyncio.get_running_loop().time
        self.last_success, self.last_reply = -math.inf, self.clock()
        self.last_error = "no response at all"
        self.lock, self.last_probe = asyncio.Lock(), -math.inf

    @property
    def has_succeeded(self) -> bool:
        """Whether a chat completion has arrived in this session."""
        return math.isfinite(self.last_success)

    def succeed(self) -> None:
        """A chat completion has arrived."""
        self.last_success = self.last_reply = self.clock()

    async def has_outage(self) -> bool:
        """Whether the server has been of no use for too long, and still is."""
        silent = self.clock() - self.last_reply > self.config.max_outage_seconds
        return silent and not await self.probe()

    def outage_error(self) -> UserError:
        """The error to report after an outage."""
        return UserError(
            f"{self.ledger.teacher}: nothing has succeeded for max_outage_seconds"
            f" {self.config.max_outage_seconds:g} ({self.last_error}); all responses so far are"
            " saved in the response cache, run the stage again to continue"
        )

    async def probe(self) -> bool:
        """Whether the server completes a chat of a few tokens, which costs next to nothing. It is
        tried at most every PROBE_INTERVAL_SECONDS; in between it counts as out of order."""
        asked = self.clock()
        async with self.lock:
            if self.last_success >= asked or self.last_probe > asked - PROBE_INTERVAL_SECONDS:
                return self.last_success >= asked
            self.last_probe = self.clock()
            budget, max_usd = self.ledger.budget, self.config.max_usd(_PROBE)
            if not budget.reserve(max_usd):
                return False
            cost_usd, estimated = 0.0, False
            try:
                cost_usd, estimated = await self._try(max_usd)
            finally:
                budget.settle(max_usd, cost_usd, estimated=estimated)
            if cost_usd:
                teacher = fingerprint(self.config.sampling_facts)
                charge = Charge(teacher, PROBE, cost_usd, estimated)
                await self.writer.call(add_charges, [charge])
            return self.last_success >= asked

    async def _try(self, max_usd: float) -> tuple[float, bool]:
        """Send the probe. Returns its cost, and whether that is an estimate."""
        try:
            raw = await self.send(_PROBE, 0, f"probe-{self.last_probe}")
            body = json.loads(raw.text)
            response = parse_completion(body, self.config, _PROBE.key, 0, max_usd=max_usd)
        except openai.OpenAIError as error:
            lost = error_kind(error) is ErrorKind.LOST
            return (max_usd if lost else 0.0), lost
        except (MalformedResponseError, ValueError):
            return max_usd, True
        self.succeed()
        return response.cost_usd, response.is_estimated

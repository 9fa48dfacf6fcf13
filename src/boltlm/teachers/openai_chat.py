"""Chat completions of OpenAI or a compatible server: the client for `kind: openai`."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import openai

from boltlm import interruption
from boltlm.teachers.api_key import read_api_key
from boltlm.teachers.cache_writer import CacheWriter
from boltlm.teachers.chat_session import ChatSession
from boltlm.teachers.model_config import OpenAIChatConfig
from boltlm.teachers.rate_limiter import RateLimiter
from boltlm.teachers.requests import PendingRequest, RequestLedger


class OpenAIChatClient:
    """The client for `kind: openai`."""

    def __init__(self, config: OpenAIChatConfig) -> None:
        self.config, self.api_key = config, read_api_key(config)
        self.limiter = RateLimiter(config.concurrency)

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """See `TeacherClient.run`. The first Ctrl-C waits for the requests in flight, the second
        one drops them."""
        return asyncio.run(self._run(requests, ledger))

    async def _run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        writer = CacheWriter(ledger.cache.path)
        # Retries are those of the session: the client's own know nothing of other requests, and
        # would hide answers that were paid for and lost. The address is always given, or the
        # client would take one from the environment.
        client = openai.AsyncOpenAI(
            api_key=self.api_key,
            base_url=self.config.url,
            max_retries=0,
            timeout=self.config.timeout_seconds,
        )
        try:
            with _interruptible(ledger):
                async with client:
                    session = ChatSession(
                        self.config, client, self.limiter, requests, ledger, writer
                    )
                    return await session.run()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            writer.close()


@contextmanager
def _interruptible(ledger: RequestLedger) -> Iterator[None]:
    """Handle SIGINT and SIGTERM inside this context: the first one stops the ledger, so that no
    further request is sent, the second one cancels the current task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        if ledger.stop_error is None:
            print(
                "waiting for the requests in flight; interrupt again to drop them", file=sys.stderr
            )
            ledger.stop(KeyboardInterrupt())
        else:
            task.cancel()

    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        interruption.restore_handlers()  # as outside of this context

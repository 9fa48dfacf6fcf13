"""Writes to the response cache from an event loop, without holding it up."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from boltlm.teachers.response_cache import ResponseCache, TeacherResponse


class CacheWriter:
    """Saves responses in a thread with its own connection to the cache. Responses that arrive while
    a transaction is written go into the next one."""

    def __init__(self, path: Path) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.cache = self.thread.submit(ResponseCache, path).result()
        self.waiting: list[tuple[TeacherResponse, asyncio.Future[None]]] = []
        self.flush: asyncio.Task[None] | None = None

    async def add(self, response: TeacherResponse) -> None:
        """Returns when the response is on disk. Raises UserError where it cannot be written."""
        saved: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((response, saved))
        if self.flush is None:
            self.flush = asyncio.create_task(self._flush())
        await saved

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting, []
            responses = [response for response, _ in batch]
            write = loop.run_in_executor(self.thread, self.cache.add, responses)
            await asyncio.wait([write])
            error = write.exception()
            for _, saved in batch:
                if saved.done():  # its request was cancelled by an interrupt
                    continue
                if error is None:
                    saved.set_result(None)
                else:
                    saved.set_exception(error)
        self.flush = None

    async def call(self, write: Callable[..., None], *arguments: object) -> None:
        """Call `write` with the cache and these arguments in the thread. Returns when it is done;
        raises UserError where the cache cannot be written."""
        await asyncio.get_running_loop().run_in_executor(self.thread, write, self.cache, *arguments)

    def close(self) -> None:
        """Wait for the current transaction and close the connection."""
        self.thread.submit(self.cache.close).result()
        self.thread.shutdown()

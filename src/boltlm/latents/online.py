"""Chat completions, one request each, many at a time, through the official client."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import openai
from dotenv import dotenv_values

from boltlm.engine import work_root
from boltlm.errors import UserError
from boltlm.latents.asking import Ask, Book, Paid
from boltlm.latents.journal import Answer, Journal

KEY = "OPENAI_API_KEY"
IDEMPOTENCY = "Idempotency-Key"
NOT_TAKEN = (400, 413, 422)  # what servers say to one request that they will not take
_SECRET = re.compile(r"\bsk-[\w*.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineTeacher(Paid):
    """Params entry of `kind: openai`: `concurrency` requests under way at once."""

    kind: Literal["openai"]
    concurrency: int

    def __post_init__(self) -> None:
        super(OnlineTeacher, self).__post_init__()
        if self.concurrency < 1:
            raise UserError(f"concurrency must be 1 or more, found {self.concurrency}")


def secret(config: Paid) -> str:
    """The API key, from the environment or from `.env` at the repository's root. A server of
    one's own may need none."""
    found = os.environ.get(KEY) or dotenv_values(work_root(Path(".env"))).get(KEY)
    if not found and config.base_url is None:
        raise UserError(
            f"no API key: set {KEY} in the environment or in a file .env at the repository's root,"
            " or name a server of your own in base_url, or take a teacher of kind dataset or vllm"
        )
    return found or "none"


class MalformedError(Exception):
    """The server said that all is well and sent something else than a completion."""


def answer_of(
    completion: Any,
    config: Paid,
    key: str,
    attempt: int,
    *,
    expected_input: float = 0.0,
    batch: str = "",
) -> Answer:
    """Reads no more of a completion than it needs, since compatible servers differ in the rest.
    `expected_input`: tokens to count where the server tells none. Raises MalformedError where
    there is no message."""
    try:
        body = completion if isinstance(completion, dict) else completion.model_dump()
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        text, refusal = message.get("content") or "", message.get("refusal")
        tokens_in = int(usage.get("prompt_tokens") or round(expected_input))
        tokens_out = int(usage.get("completion_tokens") or config.expected_output_tokens)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedError from error
    return Answer(
        key=key,
        attempt=attempt,
        text=_unicode(str(text)),
        finish="refused" if refusal else _unicode(str(choice.get("finish_reason") or "stop")),
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        cost_usd=config.prices.cost(tokens_in, tokens_out, batch=bool(batch)),
        model=_unicode(str(body.get("model"))),
        batch=batch,
    )


def _unicode(text: str) -> str:
    """JSON can hold half a surrogate pair, a database cannot."""
    return text.encode("utf-8", "replace").decode()


def told(error: openai.OpenAIError, config: Paid) -> UserError:
    """What an error of the API means for who started the run, without the key in it."""
    server = config.base_url or "api.openai.com"
    code = getattr(error, "code", None)
    again = "; every answer so far is in the journal, run again to go on"
    if isinstance(error, openai.AuthenticationError):
        return UserError(f"{server} does not take the API key in {KEY}{again}")
    if isinstance(error, openai.PermissionDeniedError | openai.NotFoundError):
        return UserError(f"{server} has no model '{config.model}' for this key{again}")
    if isinstance(error, openai.RateLimitError) and code == "insufficient_quota":
        return UserError(f"{server}: the account's quota is used up; add credit{again}")
    if isinstance(error, openai.RateLimitError):
        return UserError(f"{server} keeps saying that there are too many requests{again}")
    if isinstance(error, openai.APITimeoutError):
        return UserError(f"{server} did not answer within {config.timeout_seconds} s{again}")
    if isinstance(error, openai.APIConnectionError):
        return UserError(f"{server} cannot be reached ({error.__cause__ or error}){again}")
    said = _SECRET.sub("…", str(error)).splitlines()[0][:200]
    return UserError(f"{server}: {said}{again}")


class Online:
    """Asks over `kind: openai`."""

    def __init__(self, config: OnlineTeacher) -> None:
        self.config, self.key = config, secret(config)

    def ask(self, asks: Iterator[Ask], book: Book) -> int:
        return asyncio.run(self._ask(asks, book))

    async def _ask(self, asks: Iterator[Ask], book: Book) -> int:
        config = self.config
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            """At first what is under way still comes in; when told again, at once."""
            if book.halted is None:
                print("finishing what is under way; once more to drop it", file=sys.stderr)
                book.halt(KeyboardInterrupt())
            else:
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        writer = _Writer(book.journal.path)
        client = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=config.base_url,
            max_retries=config.retries,
            timeout=config.timeout_seconds,
        )
        try:
            async with client:
                workers = (
                    self._work(client, asks, book, writer) for _ in range(config.concurrency)
                )
                return sum(await asyncio.gather(*workers))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            writer.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _work(
        self, client: openai.AsyncOpenAI, asks: Iterator[Ask], book: Book, writer: "_Writer"
    ) -> int:
        """Ask until there is nothing left or the book is halted; an answer counts when it is on
        the disk."""
        count = 0
        for ask in asks:
            expected = self.config.expected_usd(ask.request)
            if book.halted is None and not book.purse.take(expected):
                book.halt(book.purse.refuse(book.where))
            if book.halted is not None:
                break
            count += 1
            cost = 0.0
            try:
                answer = await self._one(client, ask)
                cost = answer.cost_usd
                await writer.add(answer)
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) in NOT_TAKEN:
                    book.reject(ask.request.key, _SECRET.sub("…", str(error))[:200])
                    continue
                book.halt(told(error, self.config))
                break
            except UserError as error:
                book.halt(error)
                break
            finally:
                book.purse.settle(expected, cost)
            book.note(answer)
        return count

    async def _one(self, client: openai.AsyncOpenAI, ask: Ask) -> Answer:
        """One name a request, the same after a crash too: servers that know Idempotency-Key send
        an answer that was on its way once more instead of making, and charging, another."""
        config, malformed = self.config, 0
        pause = config.timeout_seconds / (config.retries + 1)
        for number in range(config.retries + 1):
            name = f"{ask.request.key}-{ask.attempt}-{malformed}"
            try:
                found = await client.chat.completions.create(
                    **config.body(ask.request), extra_headers={IDEMPOTENCY: name}
                )
                return answer_of(
                    found,
                    config,
                    ask.request.key,
                    ask.attempt,
                    expected_input=config.expected(ask.request)[0],
                )
            except openai.ConflictError:  # a run that was killed asked it; it is being answered
                if number == config.retries:
                    raise
                await asyncio.sleep(pause)
            except (MalformedError, ValueError):
                malformed += 1
                await asyncio.sleep(1.0)
        server = config.base_url or "api.openai.com"
        raise UserError(f"{server} sends answers that are no chat completions; see base_url")


class _Writer:
    """Puts answers into the journal from a thread of its own; those that come in while one
    transaction is written make up the next."""

    def __init__(self, path: Path) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.journal = self.thread.submit(Journal, path).result()
        self.waiting: list[tuple[Answer, asyncio.Future[None]]] = []
        self.flush: asyncio.Task[None] | None = None

    async def add(self, answer: Answer) -> None:
        """Returns when the answer is on the disk. Raises UserError where it cannot be."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((answer, future))
        if self.flush is None:
            self.flush = asyncio.create_task(self._flush())
        await future

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting, []
            answers = [answer for answer, _ in batch]
            failure: BaseException | None = None
            try:
                await loop.run_in_executor(self.thread, self.journal.add, answers)
            except Exception as error:  # whatever it is, those who wait must hear of it
                failure = error
            for _, future in batch:
                if failure is None:
                    future.set_result(None)
                elif not future.done():
                    future.set_exception(failure)
        self.flush = None

    def close(self) -> None:
        self.thread.submit(self.journal.close).result()
        self.thread.shutdown()

"""Chat completions of OpenAI or a compatible server: many concurrent requests of one prompt each.

The functions that read completions and translate errors also serve the Batches API.
"""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from dotenv import dotenv_values

from boltlm.errors import UserError
from boltlm.shard_store import repository_path
from boltlm.teachers.config import APITeacherConfig, OpenAIChatConfig
from boltlm.teachers.requests import PendingRequest, RequestLedger
from boltlm.teachers.response_cache import ResponseCache, TeacherResponse
from boltlm.teachers.response_checks import read_message

API_KEY_VARIABLE = "OPENAI_API_KEY"
IDEMPOTENCY_HEADER = "Idempotency-Key"
# Status codes by which servers reject a single request, rather than all requests of this run.
REJECTED_STATUS_CODES = (400, 413, 422)
ENV_FILE = ".env"

_API_KEY_PATTERN = re.compile(r"\bsk-[\w*.-]+")
_MAX_MESSAGE_CHARACTERS = 200
_MALFORMED_PAUSE_SECONDS = 1.0


def read_api_key(config: APITeacherConfig) -> str:
    """The API key, from the environment or from `.env` at the repository's root. Servers other than
    OpenAI's may need none. Raises UserError where the key for OpenAI is missing."""
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        key = dotenv_values(repository_path(Path(ENV_FILE))).get(API_KEY_VARIABLE)
    if not key and config.base_url is None:
        raise UserError(
            f"no API key: set {API_KEY_VARIABLE} in the environment or in a file {ENV_FILE} at the"
            " repository's root, or set base_url to the address of your own server, or use a"
            " teacher of kind dataset or vllm"
        )
    return key or "none"


class MalformedResponseError(Exception):
    """The server reported success, but what it sent is not a chat completion."""


def parse_completion(
    completion: Any,
    config: APITeacherConfig,
    key: str,
    attempt: int,
    *,
    expected_input_tokens: float = 0.0,
    batch: str = "",
) -> TeacherResponse:
    """The response in a chat completion. Only the necessary fields are read, because compatible
    servers differ in the others.

    `expected_input_tokens`: used where the server does not report the number of input tokens.
    `batch`: the id of the batch that the completion belongs to. Raises MalformedResponseError where
    there is no message.
    """
    try:
        body = completion if isinstance(completion, dict) else completion.model_dump(warnings=False)
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage") or {}
        text, refusal = read_message(message)
        input_tokens = int(usage.get("prompt_tokens") or round(expected_input_tokens))
        output_tokens = int(usage.get("completion_tokens") or config.expected_output_tokens)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedResponseError from error
    return TeacherResponse(
        key=key,
        attempt=attempt,
        text=_valid_unicode(text),
        finish="refused" if refusal else _valid_unicode(str(choice.get("finish_reason") or "stop")),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=config.prices.cost(input_tokens, output_tokens, batch=bool(batch)),
        model=_valid_unicode(str(body.get("model"))),
        batch=batch,
    )


def _valid_unicode(text: str) -> str:
    """JSON can hold an unpaired surrogate, which a database cannot store; it becomes `?`."""
    return text.encode("utf-8", "replace").decode()


def to_user_error(error: openai.OpenAIError, config: APITeacherConfig) -> UserError:
    """An error of the API as a message for the user, without the API key."""
    return UserError(
        f"{_describe_error(error, config)}; all responses so far are saved in the response cache,"
        " run the stage again to continue"
    )


def _describe_error(error: openai.OpenAIError, config: APITeacherConfig) -> str:
    server = config.server
    if isinstance(error, openai.AuthenticationError):
        return f"{server} does not accept the API key in {API_KEY_VARIABLE}"
    if isinstance(error, openai.PermissionDeniedError | openai.NotFoundError):
        return f"{server} has no model '{config.model}' for this API key"
    if isinstance(error, openai.RateLimitError):
        if error.code == "insufficient_quota":
            return f"{server}: the account's quota is exhausted; add credit"
        return f"{server} still reports too many requests after {config.max_retries} retries"
    if isinstance(error, openai.APITimeoutError):
        return f"{server} did not respond within {config.timeout_seconds} s"
    if isinstance(error, openai.APIConnectionError):
        return f"{server} cannot be reached ({error.__cause__ or error})"
    return f"{server}: {_error_message(error).splitlines()[0]}"


def _error_message(error: openai.OpenAIError) -> str:
    """The beginning of an error's own message, with API keys removed."""
    return _API_KEY_PATTERN.sub("…", str(error))[:_MAX_MESSAGE_CHARACTERS]


class OpenAIChatClient:
    """The client for `kind: openai`."""

    def __init__(self, config: OpenAIChatConfig) -> None:
        self.config, self.api_key = config, read_api_key(config)

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """See `TeacherClient.run`. The first Ctrl-C waits for the requests in flight, the second
        one drops them."""
        return asyncio.run(self._run(requests, ledger))

    async def _run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        config = self.config
        writer = _CacheWriter(ledger.cache.path)
        client = openai.AsyncOpenAI(
            api_key=self.api_key,
            base_url=config.base_url,
            max_retries=config.max_retries,
            timeout=config.timeout_seconds,
        )
        try:
            with _interruptible(ledger):
                async with client:
                    workers = (
                        self._work(client, requests, ledger, writer)
                        for _ in range(config.concurrency)
                    )
                    return sum(await asyncio.gather(*workers))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            writer.close()

    async def _work(
        self,
        client: openai.AsyncOpenAI,
        requests: Iterator[PendingRequest],
        ledger: RequestLedger,
        writer: "_CacheWriter",
    ) -> int:
        """Send one request after another until there are none left or the ledger has stopped.
        Returns their number. A response counts when it is saved."""
        count = 0
        for pending in requests:
            expected_usd = self.config.expected_usd(pending.request)
            if ledger.stop_error is None and not ledger.budget.reserve(expected_usd):
                ledger.stop(ledger.budget.exceeded_error(ledger.teacher))
            if ledger.stop_error is not None:
                break
            count += 1
            cost_usd = 0.0
            try:
                response = await self._send(client, pending)
                cost_usd = response.cost_usd
                await writer.add(response)
            except openai.OpenAIError as error:
                if getattr(error, "status_code", None) in REJECTED_STATUS_CODES:
                    ledger.reject(pending.request.key, _error_message(error))
                    continue
                ledger.stop(to_user_error(error, self.config))
                break
            except UserError as error:
                ledger.stop(error)
                break
            finally:
                ledger.budget.settle(expected_usd, cost_usd)
            ledger.record(response, pending.request)
        return count

    async def _send(self, client: openai.AsyncOpenAI, pending: PendingRequest) -> TeacherResponse:
        """Send a request with an idempotency key that is the same in every run: servers that honour
        it repeat a response that was lost when a process died, without charging for it again."""
        config, num_malformed = self.config, 0
        conflict_pause = config.timeout_seconds / (config.max_retries + 1)
        key, attempt = pending.request.key, pending.attempt
        for retry in range(config.max_retries + 1):
            idempotency_key = f"{key}-{attempt}-{num_malformed}"
            try:
                completion = await client.chat.completions.create(
                    **config.request_body(pending.request),
                    extra_headers={IDEMPOTENCY_HEADER: idempotency_key},
                )
                input_tokens, _ = config.expected_tokens(pending.request)
                return parse_completion(
                    completion, config, key, attempt, expected_input_tokens=input_tokens
                )
            except openai.ConflictError:  # still being processed for a run that was killed
                if retry == config.max_retries:
                    raise
                await asyncio.sleep(conflict_pause)
            except (MalformedResponseError, ValueError):
                num_malformed += 1
                await asyncio.sleep(_MALFORMED_PAUSE_SECONDS)
        raise UserError(
            f"{config.server} sends responses that are not chat completions; check base_url"
        )


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


class _CacheWriter:
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

    def close(self) -> None:
        """Wait for the current transaction and close the connection."""
        self.thread.submit(self.cache.close).result()
        self.thread.shutdown()

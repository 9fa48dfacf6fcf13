"""The calls of OpenAI's Files and Batches API that batches need, each repeated while the server or
the network fails.

The client's own retries last for seconds. A batch takes hours, and its results are paid for, so a
call is given up only after `max_outage_seconds` without success. The errors of a request that will
never succeed, such as a wrong API key, are raised at once.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, TypeVar

import openai

from boltlm.errors import UserError
from boltlm.teachers.api_errors import ErrorKind, error_kind, to_user_error
from boltlm.teachers.completions import MalformedResponseError
from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.server_address import IDEMPOTENCY_HEADER

ENDPOINT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
METADATA_KEY = "boltlm"  # the key of our token in a batch's metadata
TERMINAL_STATUSES = ("completed", "failed", "expired", "cancelled")

# How often batches are listed before one counts as not created: a list may lag behind.
_NUM_LISTINGS = 10
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteBatchState:
    """What the server says about a batch. `completed`, `total`: numbers of requests, `errors`:
    codes and messages, `expires_at`: seconds since 1970; None where the server does not say."""

    id: str
    token: str | None
    status: str
    completed: int | None = None
    total: int | None = None
    output_file: str | None = None
    error_file: str | None = None
    errors: tuple[tuple[str, str], ...] = ()
    expires_at: float | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL_STATUSES


class Outage:
    """For how long something has failed without success."""

    def __init__(self, config: OpenAIBatchConfig) -> None:
        self.config = config
        self.since: float | None = None

    def failed(self, message: str) -> None:
        """Raises UserError where it has failed for too long."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        if now - self.since > self.config.max_outage_seconds:
            raise UserError(
                f"{message}, for max_outage_seconds {self.config.max_outage_seconds:g} by now."
                " Nothing is lost: batches are saved in the response cache, and running the stage"
                " again continues with them"
            )


class BatchServer:
    """The server's side of batches. `on_failure` is told of every failure that will be retried."""

    def __init__(
        self,
        client: openai.OpenAI,
        config: OpenAIBatchConfig,
        on_failure: Callable[[str], None],
    ) -> None:
        self.client, self.config, self.on_failure = client, config, on_failure
        self.is_known = False  # whether the server has responded in this run

    def upload(self, token: str, file: BinaryIO) -> str:
        """Upload the input file of a batch and return its id. After an error it may be there all
        the same, so it is searched for before it is uploaded again."""
        failures: list[str] = []

        def call() -> str:
            if failures and (found := self._find_upload(token)) is not None:
                return found
            failures.append("until it returns")
            file.seek(0)
            name = _file_name(token)
            return _text(_facts(self.client.files.create(file=(name, file), purpose="batch")), "id")

        return self._patiently(call)

    def find_upload(self, token: str) -> str | None:
        """The id of the input file of a batch, or None where the server has none."""
        with suppress(openai.NotFoundError):  # a server that cannot list files
            return self._patiently(lambda: self._find_upload(token))
        return None

    def _find_upload(self, token: str) -> str | None:
        for facts in self._list(self.client.files.with_raw_response.list, purpose="batch"):
            if facts.get("filename") == _file_name(token):
                return _text(facts, "id")
        return None

    def create(self, token: str, input_file: str) -> str:
        """Create a batch exactly once and return its id. After an error it may exist all the same,
        so it is searched for before it is created again."""
        client, outage = self.client.with_options(max_retries=0), Outage(self.config)
        while True:
            try:
                batch = client.batches.create(
                    completion_window="24h",
                    endpoint=ENDPOINT,
                    input_file_id=input_file,
                    metadata={METADATA_KEY: token},
                    extra_headers={IDEMPOTENCY_HEADER: token},
                )
                return _batch_state(_facts(batch)).id
            except (openai.OpenAIError, MalformedResponseError, ValueError) as error:
                self._failed(error, outage)
                is_refused = isinstance(error, openai.RateLimitError)
            time.sleep(self.config.poll_interval_seconds)
            if not is_refused and (found := self.find(token)) is not None:
                return found

    def find(self, token: str) -> str | None:
        """The id of the batch whose metadata hold our token, or None. Batches are listed several
        times, because a new batch may be missing in the list for a while."""
        for listing in range(_NUM_LISTINGS):
            if listing:
                time.sleep(self.config.poll_interval_seconds)
            found = self._patiently(lambda: self._find_in_list(token))
            if found is not None:
                return found
        return None

    def _find_in_list(self, token: str) -> str | None:
        for facts in self._list(self.client.batches.with_raw_response.list):
            state = _batch_state(facts)
            if state.token == token:
                return state.id
        return None

    def _list(self, list_page: Callable[..., Any], **options: str) -> Iterator[dict[str, Any]]:
        """The objects that the server lists, page by page."""
        after: str | openai.Omit = openai.omit
        while True:
            # The client itself fails where a page is not one of the API's.
            response = list_page(limit=100, after=after, **options)
            page = _mapping(response.http_response.json())
            if not isinstance(page.get("data"), list):
                raise MalformedResponseError
            objects = [_mapping(facts) for facts in page["data"]]
            yield from objects
            if not objects or not page.get("has_more"):
                return
            after = _text(objects[-1], "id")

    def retrieve(self, batch_id: str) -> RemoteBatchState:
        """The state of a batch. Raises openai.NotFoundError where the server does not know it."""
        return self._patiently(lambda: _batch_state(_facts(self.client.batches.retrieve(batch_id))))

    def cancel(self, batch_id: str) -> None:
        """Have the server process no further request of a batch. One that has ended stays so."""

        def call() -> None:
            # 409: it has ended meanwhile, as its next state will show.
            with suppress(openai.ConflictError):
                self.client.batches.cancel(batch_id)

        self._patiently(call)

    def file_bytes(self, file_id: str) -> int | None:
        """The size of a remote file, or None where the server does not say."""
        try:
            return _count(_facts(self.client.files.retrieve(file_id)).get("bytes"))
        except (openai.OpenAIError, MalformedResponseError, ValueError):
            return None

    def delete_file(self, file_id: str) -> bool:
        """Delete a remote file. Returns False where this failed."""
        try:
            self.client.files.delete(file_id)
        except openai.NotFoundError:
            return True
        except (openai.OpenAIError, ValueError):
            return False
        return True

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """The result of a call that has no effect when it is repeated."""
        outage = Outage(self.config)
        while True:
            try:
                result = call()
            except (openai.OpenAIError, MalformedResponseError, ValueError) as error:
                self._failed(error, outage)
            else:
                self.is_known = True
                return result
            time.sleep(self.config.poll_interval_seconds)

    def _failed(self, error: Exception, outage: Outage) -> None:
        """Returns where the call is to be repeated; raises the error where that is hopeless."""
        if isinstance(error, openai.APIConnectionError) and not self.is_known:
            raise error  # rather a wrong base_url than an outage
        if isinstance(error, openai.OpenAIError) and not is_temporary(error):
            raise error
        message = describe_failure(error, self.config)
        self.on_failure(message)
        outage.failed(message)


def is_temporary(error: openai.OpenAIError) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, openai.APIStatusError):
        # Errors of the API are JSON objects; those of a proxy before it may be anything.
        is_final = error_kind(error) in (ErrorKind.FATAL, ErrorKind.REJECTED)
        return not (is_final and isinstance(error.body, dict))
    return isinstance(error, openai.APIError)


def describe_failure(error: Exception, config: OpenAIBatchConfig) -> str:
    """The failure of a call in a few words."""
    if isinstance(error, openai.APIStatusError):
        return f"{config.server} responds with the status {error.status_code}"
    if isinstance(error, openai.APIConnectionError):
        return str(to_user_error(error, config)).split(";")[0]
    return f"{config.server} sends responses that are not those of the Batches API"


def _file_name(token: str) -> str:
    """The name of the input file of a batch at the server."""
    return f"boltlm-{token}.jsonl"


def _facts(response: Any) -> dict[str, Any]:
    """The fields of a response. The client does not check them, and passes other content on as
    text."""
    if not isinstance(response, openai.BaseModel):
        raise MalformedResponseError
    return response.model_dump(warnings=False)


def _batch_state(facts: dict[str, Any]) -> RemoteBatchState:
    counts, errors = _mapping(facts.get("request_counts")), _mapping(facts.get("errors"))
    error_list = errors.get("data")
    expires_at = facts.get("expires_at")
    token = _mapping(facts.get("metadata")).get(METADATA_KEY)
    return RemoteBatchState(
        id=_text(facts, "id"),
        token=token if isinstance(token, str) else None,
        status=_text(facts, "status"),
        completed=_count(counts.get("completed")),
        total=_count(counts.get("total")),
        output_file=_optional_text(facts.get("output_file_id")),
        error_file=_optional_text(facts.get("error_file_id")),
        errors=tuple(
            (str(error.get("code")), str(error.get("message")))
            for error in map(_mapping, error_list if isinstance(error_list, list) else [])
        ),
        expires_at=expires_at if isinstance(expires_at, int | float) else None,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _optional_text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _text(facts: dict[str, Any], name: str) -> str:
    value = _optional_text(facts.get(name))
    if value is None:
        raise MalformedResponseError
    return value

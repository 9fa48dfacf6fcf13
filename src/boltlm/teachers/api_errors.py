"""Errors of an OpenAI-compatible API: what each means for a request and for the run, and the
message for the user. No message holds an API key."""

import email.utils
import time
from collections.abc import Mapping
from enum import Enum

import httpx2
import openai

from boltlm.errors import UserError, redact
from boltlm.teachers.api_key import key_variable
from boltlm.teachers.charges import CONNECTION, TIMEOUT
from boltlm.teachers.model_config import APITeacherConfig

# Status codes by which servers reject a single request, rather than all requests of this run.
REJECTED_STATUS_CODES = (400, 413, 422)
CONFLICT_STATUS_CODE = 409  # the same request of a process that was killed is still being processed
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached")

_MAX_MESSAGE_CHARACTERS = 200
_TOO_LARGE = "Request too large"  # how the message begins where a request alone exceeds a limit


class ErrorKind(Enum):
    """What an error means."""

    REJECTED = "the server does not accept this request"
    FATAL = "no request of this run can succeed: wrong key or model, no credit left"
    RATE_LIMITED = "too many requests or tokens; later it may succeed"
    UNREACHABLE = "nothing was sent"
    LOST = "it was sent, and no answer was received; it may have to be paid for"
    SERVER = "the server failed, and does not charge for it"


def error_kind(error: openai.OpenAIError) -> ErrorKind:
    """What an error of the client means. Errors of an unknown kind count as lost."""
    if isinstance(error, openai.APIConnectionError):  # APITimeoutError is a subclass
        unsent = httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout
        return ErrorKind.UNREACHABLE if isinstance(error.__cause__, unsent) else ErrorKind.LOST
    if not isinstance(error, openai.APIStatusError):
        return ErrorKind.LOST
    status = error.status_code
    if status == 429:
        if error.code in QUOTA_CODES or error.type in QUOTA_CODES:
            return ErrorKind.FATAL
        too_large = _own_message(error).startswith(_TOO_LARGE)
        return ErrorKind.REJECTED if too_large else ErrorKind.RATE_LIMITED
    if status in REJECTED_STATUS_CODES:
        return ErrorKind.REJECTED
    return ErrorKind.SERVER if status >= 500 or status in (408, 409) else ErrorKind.FATAL


def lost_reason(error: openai.OpenAIError) -> str:
    """Why an answer was lost, for its charge."""
    return TIMEOUT if isinstance(error, openai.APITimeoutError) else CONNECTION


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date.
    None where it does not say so."""
    for name, seconds_per_unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * seconds_per_unit)
        except (KeyError, ValueError):
            continue
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):
        return None


def error_message(error: openai.OpenAIError) -> str:
    """The beginning of an error's own message."""
    return redact(str(error))[:_MAX_MESSAGE_CHARACTERS]


def to_user_error(error: openai.OpenAIError, config: APITeacherConfig) -> UserError:
    """An error of the API as a message for the user."""
    return UserError(
        f"{describe_error(error, config)}; all responses so far are saved in the response cache,"
        " run the stage again to continue"
    )


def describe_error(error: openai.OpenAIError, config: APITeacherConfig) -> str:
    """What went wrong, in one line."""
    server, variable = config.server, key_variable(config)
    if isinstance(error, openai.AuthenticationError):
        if variable is None:
            return f"{server} wants an API key; name the variable that holds it in api_key_env"
        return f"{server} does not accept the API key in {variable}"
    if isinstance(error, openai.PermissionDeniedError | openai.NotFoundError):
        return f"{server} has no model '{config.model}' for this API key"
    if isinstance(error, openai.RateLimitError):
        if error_kind(error) is ErrorKind.FATAL:
            return f"{server}: the account's quota is exhausted; add credit"
        return f"{server} reports too many requests"
    if isinstance(error, openai.APITimeoutError):
        return f"{server} did not respond within {config.timeout_seconds} s"
    if isinstance(error, openai.APIConnectionError):
        return f"{server} cannot be reached ({redact(str(error.__cause__ or error))})"
    return f"{server}: {(error_message(error).splitlines() or ['error'])[0]}"


def _own_message(error: openai.APIStatusError) -> str:
    body = error.body
    return str(body.get("message")) if isinstance(body, Mapping) else ""

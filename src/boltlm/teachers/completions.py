"""Reads chat completions, as servers send them or as they stand in the output file of a batch."""

from typing import Any

from boltlm.errors import redact_secrets
from boltlm.teachers.model_config import APITeacherConfig
from boltlm.teachers.response_cache import TeacherResponse
from boltlm.teachers.response_checks import read_message

_MAX_TOKENS = 10**9  # more is no number of tokens


class MalformedResponseError(Exception):
    """The server reported success, but what it sent is not a chat completion."""


def parse_completion(
    completion: Any,
    config: APITeacherConfig,
    key: str,
    attempt: int,
    *,
    max_usd: float,
    batch: str = "",
) -> TeacherResponse:
    """The response in a chat completion. Only the necessary fields are read, because compatible
    servers differ in the others.

    `max_usd`: the cost where the server does not report the usage. `batch`: the id of the batch
    that the completion belongs to. Raises MalformedResponseError where there is no message.
    """
    try:
        body = completion if isinstance(completion, dict) else completion.model_dump(warnings=False)
        choice = body["choices"][0]
        text, refusal = read_message(choice["message"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise MalformedResponseError from error
    usage = reported_tokens(body)
    input_tokens, output_tokens = usage or (0, config.max_output_tokens)
    return TeacherResponse(
        key=key,
        attempt=attempt,
        text=_valid_unicode(text),
        finish="refused" if refusal else _valid_unicode(str(choice.get("finish_reason") or "stop")),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cost_usd=config.prices.cost(*usage, batch=bool(batch)) if usage else max_usd,
        model=_valid_unicode(str(body.get("model"))),
        batch=batch,
    )


def reported_tokens(body: Any) -> tuple[int, int] | None:
    """The numbers of input and output tokens in a completion; None where it has none, or what is
    there is no number of tokens."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    tokens: list[int] = []
    for name in ("prompt_tokens", "completion_tokens"):
        number = usage.get(name)
        if not isinstance(number, int | float) or not 0 <= number <= _MAX_TOKENS:
            return None
        tokens.append(int(number))
    return (tokens[0], tokens[1]) if tokens[0] else None


def _valid_unicode(text: str) -> str:
    """JSON can hold an unpaired surrogate, which a database cannot store; it becomes `?`. A server
    may send the API key back, which is stored nowhere."""
    return redact_secrets(text).encode("utf-8", "replace").decode()

"""Settings of the teachers that are language models: one dataclass for each `kind`.

This module imports neither the OpenAI client nor vLLM.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from boltlm.corpus.readers import split_revision
from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint, hash_path
from boltlm.param_types import (
    Above,
    AtLeast,
    AtMost,
    Below,
    EntryName,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Text,
)
from boltlm.teachers.cost import Prices
from boltlm.teachers.prompts import TeacherRequest, TeacherTask
from boltlm.teachers.response_checks import ResponseChecksConfig
from boltlm.teachers.server_address import OPENAI_URL, check_base_url

# The limits that the API's documentation gives for one batch.
MAX_BATCH_REQUESTS, MAX_BATCH_BYTES = 50_000, 200_000_000
# The most tokens that a chat template adds to a message: its role and the marks around it.
MAX_TOKENS_AROUND_MESSAGE = 16
# What `extra_body` may not set: keys of their own, and what would change the form of a response.
RESERVED_BODY_FIELDS = frozenset(
    {"model", "messages", "temperature", "top_p", "seed", "n", "stream"}
)
RESERVED_BODY_FIELDS |= {"reasoning_effort", "max_completion_tokens"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The keys that all teachers have in common which are language models.

    corpus: the corpus whose chunks or documents are sent.
    task: what the teacher writes; see `TeacherTask`.
    paraphrases: texts for each document, 1 or more for all tasks but `latent`.
    seed: selects the styles of paraphrases.
    model: its name, or for `kind: vllm` also a path.
    temperature, max_output_tokens: of the sampling; a response that reaches the limit is unusable.
      Where temperature is None the API's own default applies.
    max_attempts: how often a request is sent while its responses are unusable.
    max_failed_fraction: fraction of the requests that may remain without a usable response.
    checks: further conditions for a usable response.
    """

    kind: Literal["openai", "openai_batch", "vllm"]
    corpus: Annotated[str, EntryName("corpora")]
    task: TeacherTask
    paraphrases: NonNegativeInt
    seed: int
    model: Text
    temperature: NonNegativeFloat | None
    max_output_tokens: PositiveInt
    max_attempts: PositiveInt
    max_failed_fraction: Fraction
    checks: ResponseChecksConfig

    def __post_init__(self) -> None:
        if self.task != "latent" and self.paraphrases < 1:
            raise UserError(
                f"paraphrases must be 1 or more, found {self.paraphrases} (task {self.task})"
            )

    @property
    def sampling_facts(self) -> dict[str, Any]:
        """What a response depends on besides its prompt, JSON-ready."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_output_tokens": self.max_output_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class APITeacherConfig(TeacherConfig):
    """The keys that the teachers behind an OpenAI-compatible API have in common.

    base_url: the server's address; None for OpenAI.
    api_key_env: the variable, of the environment or of `.env`, with the API key. None means
      OPENAI_API_KEY for OpenAI, and that other servers get no key.
    top_p, reasoning_effort, extra_body: further fields of the request, not sent where they are None
      or empty.
    sampling_seed: with the request's key and the number of the attempt it makes the `seed` that is
      sent, so that equal requests for several texts have different ones.
    max_retries: of a request, after errors of the server or the network.
    retry_failed: whether requests that the server never answered in earlier runs are sent again.
    timeout_seconds: of a request.
    characters_per_token, expected_output_tokens: estimate a request's tokens before it is sent.
    max_cost_usd: no request is sent that could exceed this total, over all runs of this teacher.
    """

    base_url: str | None
    api_key_env: str | None
    top_p: PositiveFraction | None
    sampling_seed: int | None
    reasoning_effort: str | None
    extra_body: Mapping[str, object]
    max_retries: NonNegativeInt
    retry_failed: bool
    timeout_seconds: PositiveFloat
    expected_output_tokens: PositiveInt
    characters_per_token: PositiveFloat
    max_cost_usd: NonNegativeFloat
    prices: Prices

    def __post_init__(self) -> None:
        # `slots=True` replaces the class, so that super() without arguments fails.
        super(APITeacherConfig, self).__post_init__()
        if reserved := sorted(RESERVED_BODY_FIELDS & self.extra_body.keys()):
            raise UserError(f"extra_body must not set {', '.join(reserved)}")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"extra_body must be JSON: {error}") from error
        if self.base_url is not None:
            check_base_url(self.base_url)

    @property
    def url(self) -> str:
        """The address to which requests are sent."""
        return (self.base_url or OPENAI_URL).rstrip("/")

    @property
    def sampling_facts(self) -> dict[str, Any]:
        """What a response depends on besides its prompt, JSON-ready. Keys that are None or empty
        are left out, so that responses of versions without these keys are still found."""
        facts = super(APITeacherConfig, self).sampling_facts
        names = ("top_p", "sampling_seed", "reasoning_effort", "extra_body")
        facts |= {
            name: getattr(self, name) for name in names if getattr(self, name) not in (None, {})
        }
        return facts if self.url == OPENAI_URL else {**facts, "base_url": self.url}

    @property
    def server(self) -> str:
        """The server's address for messages."""
        return "api.openai.com" if self.url == OPENAI_URL else self.url

    def expected_tokens(self, request: TeacherRequest) -> tuple[float, float]:
        """The expected numbers of input and output tokens of a request."""
        return request.num_characters / self.characters_per_token, self.expected_output_tokens

    def max_tokens(self, request: TeacherRequest) -> tuple[int, int]:
        """The most input and output tokens of a request. No tokenizer in use makes more than one
        token of a byte of UTF-8; this is several times the number to be expected, but only what is
        in flight is reserved at it."""
        contents = [message["content"].encode("utf-8", "replace") for message in request.messages]
        around = MAX_TOKENS_AROUND_MESSAGE * (len(contents) + 1)
        return sum(map(len, contents)) + around, self.max_output_tokens

    def expected_usd(self, request: TeacherRequest) -> float:
        """The expected cost of a request in US dollars."""
        return self.prices.cost(*self.expected_tokens(request), batch=self.kind == "openai_batch")

    def max_usd(self, request: TeacherRequest) -> float:
        """The most that a request can cost in US dollars."""
        return self.prices.cost(*self.max_tokens(request), batch=self.kind == "openai_batch")

    def request_body(self, request: TeacherRequest, attempt: int = 0) -> dict[str, Any]:
        """The request as the chat completions API accepts it."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": self.temperature,
            "max_completion_tokens": self.max_output_tokens,
            "top_p": self.top_p,
            "reasoning_effort": self.reasoning_effort,
        }
        if self.sampling_seed is not None:
            seed = int(fingerprint({"seed": self.sampling_seed, "key": request.key})[:8], 16)
            fields["seed"] = (seed + attempt) % 2**31
        sent = {name: value for name, value in fields.items() if value is not None}
        return {**sent, **self.extra_body}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIChatConfig(APITeacherConfig):
    """`kind: openai`: chat completions.

    concurrency: the most requests at a time; fewer where the server limits the rate.
    max_outage_seconds: the run ends when nothing has succeeded for so long.
    """

    kind: Literal["openai"]
    concurrency: PositiveInt
    max_outage_seconds: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIBatchConfig(APITeacherConfig):
    """`kind: openai_batch`: the Batches API.

    A batch holds at most `max_requests_per_batch` requests and `max_bytes_per_batch` bytes. At most
    `max_concurrent_batches` are in progress; their state is polled every `poll_interval_seconds`.

    max_outage_seconds: for how long the server, or the download of results, may fail without a
      success until the run stops.
    pilot_requests: a run first sends a batch of at most this many requests and judges the responses
      before it sends more; 0: it sends everything at once.
    min_pilot_usable: the least fraction of usable responses in the pilot batch.
    max_pilot_cost_ratio: the greatest cost of its responses, relative to the expected cost.
    keep_files: keep the files of a batch at the server when its responses are saved.
    """

    kind: Literal["openai_batch"]
    max_requests_per_batch: Annotated[int, AtLeast(1), AtMost(MAX_BATCH_REQUESTS)]
    max_bytes_per_batch: Annotated[int, AtLeast(1), AtMost(MAX_BATCH_BYTES)]
    max_concurrent_batches: PositiveInt
    poll_interval_seconds: PositiveFloat
    max_outage_seconds: PositiveFloat
    pilot_requests: NonNegativeInt
    min_pilot_usable: Fraction
    max_pilot_cost_ratio: PositiveFloat
    keep_files: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class VLLMTeacherConfig(TeacherConfig):
    """`kind: vllm`: an open-weights model with a chat template, run by vLLM inside the stage.

    model: a hub name, which may end in `@<revision>`, or a path.
    context_length: tokens of prompt and response together.
    gpu_memory_utilization: fraction of the GPU's memory for vLLM.
    request_batch_size: requests that vLLM processes together; if the process is killed, the
      responses of one such batch are lost.
    """

    kind: Literal["vllm"]
    context_length: PositiveInt
    gpu_memory_utilization: Annotated[float, Above(0), Below(1)]
    request_batch_size: PositiveInt

    def __post_init__(self) -> None:
        super(VLLMTeacherConfig, self).__post_init__()
        if self.temperature is None:
            raise UserError("temperature must be a number, found None")

    @property
    def repository(self) -> tuple[str, str | None]:
        """The model's path or hub name, and its revision."""
        return (self.model, None) if Path(self.model).exists() else split_revision(self.model)

    @property
    def sampling_facts(self) -> dict[str, Any]:
        """What a response depends on besides its prompt, JSON-ready. A model given by a path is
        identified by the contents of its files."""
        folder = Path(self.model)
        model = hash_path(folder) if folder.is_dir() else self.model
        facts = super(VLLMTeacherConfig, self).sampling_facts
        return {**facts, "model": model, "engine": "vllm"}

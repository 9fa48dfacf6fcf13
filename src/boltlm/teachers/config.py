"""Settings of the stage `teacher`: one dataclass for each `kind` of an entry of `teachers`.

This module imports neither the OpenAI client nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from boltlm.corpus.inputs import require_input
from boltlm.corpus.readers import split_revision
from boltlm.errors import UserError
from boltlm.fingerprint import hash_path
from boltlm.params import EntryName, NonNegativeInt, PositiveInt, from_key, require_positive
from boltlm.teachers.cost import Prices
from boltlm.teachers.prompts import TeacherRequest, TeacherTask

# The limits that the API's documentation gives for one batch.
MAX_BATCH_REQUESTS, MAX_BATCH_BYTES = 50_000, 200_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetTeacherConfig:
    """`kind: dataset`: the latents that the data set itself carries (its reference latents)."""

    kind: Literal["dataset"]
    corpus: Annotated[str, EntryName("corpora")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The keys that all teachers have in common which are language models.

    corpus: the corpus whose chunks or documents are sent.
    task: what the teacher writes; see `TeacherTask`.
    paraphrases: texts for each document, 1 or more for all tasks but `latent`.
    seed: selects the styles of paraphrases.
    model: its name, or for `kind: vllm` also a path.
    temperature, max_output_tokens: of the sampling; a response that reaches the limit is unusable.
    max_attempts: how often a request is sent while its responses are unusable.
    max_failed_fraction: fraction of the requests that may remain without a usable response.
    """

    kind: Literal["openai", "openai_batch", "vllm"]
    corpus: Annotated[str, EntryName("corpora")]
    task: TeacherTask
    paraphrases: NonNegativeInt
    seed: int
    model: str
    temperature: float
    max_output_tokens: PositiveInt
    max_attempts: PositiveInt
    max_failed_fraction: float

    def __post_init__(self) -> None:
        if self.task != "latent" and self.paraphrases < 1:
            raise UserError(
                f"paraphrases must be 1 or more, found {self.paraphrases} (task {self.task})"
            )
        if not 0 <= self.max_failed_fraction <= 1:
            raise UserError(
                f"max_failed_fraction must be between 0 and 1, found {self.max_failed_fraction}"
            )

    @property
    def sampling_facts(self) -> dict[str, str | int | float]:
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
    max_retries: of a request, after errors of the server or the network.
    timeout_seconds: of a request.
    characters_per_token, expected_output_tokens: estimate a request's tokens before it is sent.
    max_cost_usd: no request is sent that could exceed this total, over all runs of this teacher.
    """

    base_url: str | None
    max_retries: NonNegativeInt
    timeout_seconds: float
    expected_output_tokens: PositiveInt
    characters_per_token: float
    max_cost_usd: float
    prices: Prices

    def __post_init__(self) -> None:
        # `slots=True` replaces the class, so that super() without arguments fails.
        super(APITeacherConfig, self).__post_init__()
        require_positive(self, "timeout_seconds", "characters_per_token")

    @property
    def server(self) -> str:
        """The server's address for messages."""
        return self.base_url or "api.openai.com"

    def expected_tokens(self, request: TeacherRequest) -> tuple[float, float]:
        """The expected numbers of input and output tokens of a request."""
        return request.num_characters / self.characters_per_token, self.expected_output_tokens

    def expected_usd(self, request: TeacherRequest) -> float:
        """The expected cost of a request in US dollars."""
        return self.prices.cost(*self.expected_tokens(request), batch=self.kind == "openai_batch")

    def request_body(self, request: TeacherRequest) -> dict[str, Any]:
        """The request as the chat completions API accepts it."""
        return {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": self.temperature,
            "max_completion_tokens": self.max_output_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIChatConfig(APITeacherConfig):
    """`kind: openai`: chat completions, `concurrency` requests at a time."""

    kind: Literal["openai"]
    concurrency: PositiveInt


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
    max_requests_per_batch: PositiveInt
    max_bytes_per_batch: PositiveInt
    max_concurrent_batches: PositiveInt
    poll_interval_seconds: float
    max_outage_seconds: float
    pilot_requests: NonNegativeInt
    min_pilot_usable: float
    max_pilot_cost_ratio: float
    keep_files: bool

    def __post_init__(self) -> None:
        super(OpenAIBatchConfig, self).__post_init__()
        require_positive(
            self, "poll_interval_seconds", "max_outage_seconds", "max_pilot_cost_ratio"
        )
        if not 0 <= self.min_pilot_usable <= 1:
            raise UserError(
                f"min_pilot_usable must be between 0 and 1, found {self.min_pilot_usable}"
            )
        limits = {
            "max_requests_per_batch": MAX_BATCH_REQUESTS,
            "max_bytes_per_batch": MAX_BATCH_BYTES,
        }
        for name, limit in limits.items():
            if getattr(self, name) > limit:
                raise UserError(f"{name} must be at most {limit}, found {getattr(self, name)}")


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
    gpu_memory_utilization: float
    request_batch_size: PositiveInt

    @property
    def repository(self) -> tuple[str, str | None]:
        """The model's path or hub name, and its revision."""
        return (self.model, None) if Path(self.model).exists() else split_revision(self.model)

    @property
    def sampling_facts(self) -> dict[str, str | int | float]:
        """What a response depends on besides its prompt, JSON-ready. A model given by a path is
        identified by the contents of its files."""
        folder = Path(self.model)
        model = hash_path(folder) if folder.is_dir() else self.model
        facts = super(VLLMTeacherConfig, self).sampling_facts
        return {**facts, "model": model, "engine": "vllm"}


AnyTeacher = DatasetTeacherConfig | OpenAIChatConfig | OpenAIBatchConfig | VLLMTeacherConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSettings:
    """Settings of the stage `teacher` for the entry `name`.

    context_chunks: chunks before a chunk that the prompt of the task `latent` shows as context.
    max_latent_tokens: maximum length of a latent in tokens; longer ones are dropped.
    """

    name: str
    inputs: Mapping[str, str]
    teacher: AnyTeacher = from_key("teachers.{name}")
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt

    def __post_init__(self) -> None:
        if isinstance(self.teacher, VLLMTeacherConfig) and Path(self.teacher.model).exists():
            require_input(f"teachers.{self.name}.model", self.teacher.model, self.inputs)

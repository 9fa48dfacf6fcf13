"""The command `boltlm teacher preview`: what a teacher is asked, what it answers, and the cost."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq

from boltlm.errors import UserError
from boltlm.records import shard_paths
from boltlm.teachers.config import (
    DatasetTeacherConfig,
    ExtractTeacherConfig,
    ImportTeacherConfig,
    TeacherSettings,
)
from boltlm.teachers.job import ModelTeacher, TeacherJob
from boltlm.teachers.model_config import APITeacherConfig, OpenAIBatchConfig, OpenAIChatConfig
from boltlm.teachers.prompts import LATENT_RATIO, TeacherRequest
from boltlm.teachers.requests import RequestFailure
from boltlm.teachers.response_cache import ResponseCache, TeacherResponse
from boltlm.teachers.response_checks import ResponseChecks, SupportsEncode
from boltlm.teachers.run import make_job

# For a teacher of the Batches API, whose answers a preview cannot wait for: requests at a time, and
# how long it waits for a server that does not answer.
_CONCURRENCY, _MAX_OUTAGE_SECONDS = 8, 300.0
_RULE = "─" * 80


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewPaths:
    """The folders of the corpus's documents and chunks, the response cache, and the templates."""

    split: Path
    chunks: Path
    cache: Path
    prompts: Path


def preview(
    settings: TeacherSettings,
    encoder: SupportsEncode | None,
    paths: PreviewPaths,
    *,
    num_requests: int,
    num_sent: int,
) -> Iterator[str]:
    """Yield paragraphs to print: the filled prompts of `num_requests` requests, spread over the
    first shard of the corpus; the responses to `num_sent` of them; and the expected cost of all.

    Responses go to the response cache. `encoder`: our tokenizer; without one, lengths are
    characters. Raises UserError where the corpus is missing, and as the stage `teacher` does.
    """
    teacher = settings.teacher
    if isinstance(teacher, DatasetTeacherConfig | ImportTeacherConfig | ExtractTeacherConfig):
        raise UserError(
            f"teachers.{settings.name}: a teacher of kind {teacher.kind} asks no model, so there is"
            " nothing to preview"
        )
    for folder in (paths.split, paths.chunks):
        if not any(folder.glob("*.parquet")):
            raise UserError(f"{folder}: no *.parquet in it; make it with: dvc repro split")
    job = make_job(
        settings,
        answering_at_once(teacher),
        encoder,
        split=paths.split,
        chunks=paths.chunks,
        prompts=paths.prompts,
    )
    sample = sample_requests(job, max(num_requests, num_sent, 1))
    if not sample:
        raise UserError(f"{paths.chunks}: its first shard holds no text to ask about")
    for request in sample[:num_requests]:
        yield format_prompt(request)
    total = count_requests(teacher, paths)
    if num_sent == 0:
        yield _expected_cost(teacher, sample, total)
        return
    if isinstance(teacher, OpenAIBatchConfig):
        yield "These requests are sent as single requests at full price; a batch takes hours."
    with closing(ResponseCache(paths.cache)) as cache:
        failed = job.send_sample(cache, sample[:num_sent])
        results = [
            SampledResponses(request, cache.responses(request.key), failed.get(request.key))
            for request in sample[:num_sent]
        ]
    yield from (format_responses(result, job.checks) for result in results)
    yield from summarise(teacher, results, job.checks, total)


def answering_at_once(teacher: ModelTeacher) -> ModelTeacher:
    """A teacher with the same requests that does not use the Batches API."""
    if not isinstance(teacher, OpenAIBatchConfig):
        return teacher
    common = {f.name: getattr(teacher, f.name) for f in fields(APITeacherConfig)}
    limits = {"concurrency": _CONCURRENCY, "max_outage_seconds": _MAX_OUTAGE_SECONDS}
    return OpenAIChatConfig(**{**common, **limits, "kind": "openai"})


def sample_requests(job: TeacherJob, count: int) -> list[TeacherRequest]:
    """`count` different requests of the first shard at equal distances, or all where it has
    fewer."""
    by_key = {request.key: request for request in job.shard_requests(job.chunk_paths[0])}
    requests = list(by_key.values())
    count = min(count, len(requests))
    return [requests[index * len(requests) // count] for index in range(count)]


def count_requests(teacher: ModelTeacher, paths: PreviewPaths) -> int:
    """The number of requests for the whole corpus, equal ones included."""
    if teacher.task == "latent":
        return _count_rows(paths.chunks)
    return teacher.paraphrases * _count_rows(paths.split)


def _count_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in shard_paths(folder))


@dataclass(frozen=True, slots=True)
class SampledResponses:
    """A request, the responses to all attempts at it, and why there is none where it failed."""

    request: TeacherRequest
    responses: list[TeacherResponse]
    failure: RequestFailure | None


def format_prompt(request: TeacherRequest) -> str:
    """A filled prompt, for reading."""
    style = f", style {request.style}" if request.style else ""
    title = f"document {request.doc_id}, request {request.index}{style}"
    messages = (f"[{message['role']}]\n{message['content']}" for message in request.messages)
    return "\n".join([_RULE, title, _RULE, *messages])


def format_responses(result: SampledResponses, checks: ResponseChecks) -> str:
    """The responses to a request, each with what the stage makes of it."""
    lines = [_RULE, f"document {result.request.doc_id}, request {result.request.index}", _RULE]
    for response in result.responses:
        reason = checks.unusable_reason(response, result.request.source)
        verdict = "usable" if reason is None else f"unusable: {reason}"
        lines += [response.text.strip(), f"({verdict}; {response.output_tokens} output tokens)"]
    if result.failure is not None:
        lines.append(f"({result.failure.reason}: {result.failure.message})")
    elif not result.responses:
        lines.append("(no response yet: part of a pending batch)")
    return "\n".join(lines)


def summarise(
    teacher: ModelTeacher, results: Sequence[SampledResponses], checks: ResponseChecks, total: int
) -> Iterator[str]:
    """How many requests have a usable response, their length, and the cost of all requests."""
    unit = "characters" if checks.encoder is None else "tokens"
    raw = written = usable = 0
    for result in results:
        for response in result.responses:
            if checks.unusable_reason(response, result.request.source) is None:
                raw += _length(result.request.source, checks.encoder)
                written += _length(response.text.strip(), checks.encoder)
                usable += 1
                break
    text = f"{usable} of {len(results)} requests have a usable response"
    if raw:
        paper = f" (the paper: {LATENT_RATIO})" if teacher.task == "latent" else ""
        text += f"; {written / raw:.2f} {unit} for each of the text{paper}"
    yield f"{_RULE}\n{text}"
    if isinstance(teacher, APITeacherConfig):
        responses = [response for result in results for response in result.responses]
        batch = isinstance(teacher, OpenAIBatchConfig)
        cost_usd = sum(
            teacher.prices.cost(r.input_tokens, r.output_tokens, batch=batch) for r in responses
        )
        yield _describe_cost(teacher, cost_usd / len(results), total, "measured")


def _length(text: str, encoder: SupportsEncode | None) -> int:
    return len(text) if encoder is None else len(encoder.encode(text))


def _expected_cost(teacher: ModelTeacher, sample: Sequence[TeacherRequest], total: int) -> str:
    if not isinstance(teacher, APITeacherConfig):
        return f"{_RULE}\n{total:,} requests"
    usd = sum(teacher.expected_usd(request) for request in sample) / len(sample)
    text = _describe_cost(teacher, usd, total, "expected")
    return f"{_RULE}\n{text}; --send 5 asks the model and measures this"


def _describe_cost(teacher: APITeacherConfig, usd: float, total: int, how: str) -> str:
    """`usd`: the cost of one request, attempts at unusable responses included."""
    return (
        f"{how} cost: ${usd:.6f} a request, ${usd * total:,.2f} for the {total:,} requests of the"
        f" corpus at the prices of {teacher.prices.as_of}"
        f" (max_cost_usd {teacher.max_cost_usd:,.2f})"
    )

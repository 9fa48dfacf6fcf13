"""The rows that a teacher writes: a latent or a paraphrase, or the reason why there is none."""

from collections import Counter
from collections.abc import Mapping, Sequence

from boltlm.records import Paraphrase, TeacherLatent
from boltlm.teachers.prompts import TeacherRequest
from boltlm.teachers.requests import RequestStatus
from boltlm.teachers.response_checks import TOO_LONG, SupportsEncode

_DROPPED = "dropped_"


def count_rows(rows: Sequence[TeacherLatent | Paraphrase], counts: Counter[str]) -> None:
    """Add the rows of a shard to the stage's metrics: `chunks`, `latents` and `latent_tokens`, or
    `paraphrases`, and `dropped_<reason>`."""
    for row in rows:
        counts["chunks" if isinstance(row, TeacherLatent) else "paraphrases"] += 1
        if row.reason is not None:
            counts[f"{_DROPPED}{row.reason}"] += 1
        elif isinstance(row, TeacherLatent):
            counts["latents"] += 1
            counts["latent_tokens"] += len(row.tokens or ())


def count_responses(status: RequestStatus, counts: Counter[str]) -> None:
    """Add the responses to a request and their tokens to the stage's metrics."""
    counts["answers"] += len(status.responses)
    counts["input_tokens"] += sum(response.input_tokens for response in status.responses)
    counts["output_tokens"] += sum(response.output_tokens for response in status.responses)


def dropped_by_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """The number of rows without a text, by reason."""
    return {
        name.removeprefix(_DROPPED): count
        for name, count in counts.items()
        if name.startswith(_DROPPED)
    }


def describe_reasons(counts: Mapping[str, int]) -> str:
    """The number of rows without a text, by reason, for messages."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped_by_reason(counts).items())


def teacher_latent_row(
    doc_id: str,
    chunk: int,
    latent: str | None,
    reason: str | None,
    encoder: SupportsEncode,
    max_latent_tokens: int,
) -> TeacherLatent:
    """The row of a chunk: its latent with the token ids, or the reason why there is none. A latent
    of more than `max_latent_tokens` tokens is dropped."""
    assert (latent is None) == (reason is not None), "either a latent or a reason"
    tokens = tuple(encoder.encode(latent)) if latent is not None else ()
    if len(tokens) > max_latent_tokens:
        reason = TOO_LONG
    return TeacherLatent(
        doc_id=doc_id,
        chunk=chunk,
        latent=latent if reason is None else None,
        tokens=tokens if reason is None else None,
        reason=reason,
    )


def latent_row(
    request: TeacherRequest, status: RequestStatus, encoder: SupportsEncode
) -> TeacherLatent:
    """The row of a request for a latent whose status is final."""
    text = status.response.text.strip() if status.response else None
    return TeacherLatent(
        doc_id=request.doc_id,
        chunk=request.index,
        latent=text,
        tokens=tuple(encoder.encode(text)) if text is not None else None,
        reason=status.reason,
    )


def paraphrase_row(request: TeacherRequest, status: RequestStatus) -> Paraphrase:
    """The row of a request for a paraphrase whose status is final."""
    return Paraphrase(
        doc_id=request.doc_id,
        paraphrase=request.index,
        style=request.style,
        text=status.response.text.strip() if status.response else None,
        reason=status.reason,
    )

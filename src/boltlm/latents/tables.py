"""The rows that a teacher leaves: a latent or a text, or the reason why there is none."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from boltlm.latents.asking import Standing
from boltlm.latents.tasks import Request
from boltlm.records import Paraphrase, TeacherLatent

TOO_LONG = "too_long"  # for the latent that a model may write


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def count(rows: list[TeacherLatent] | list[Paraphrase], counts: Counter[str]) -> None:
    for row in rows:
        latent = isinstance(row, TeacherLatent)
        counts["chunks" if latent else "paraphrases"] += 1
        if row.reason is not None:
            counts[f"without_{row.reason}"] += 1
        elif isinstance(row, TeacherLatent):
            counts["latents"] += 1
            counts["latent_tokens"] += len(row.tokens or ())


def reasons(counts: Mapping[str, int]) -> str:
    """How many have no answer, by reason, for people."""
    named = {name.removeprefix("without_"): n for name, n in counts.items() if "without_" in name}
    return ", ".join(f"{n} {reason}" for reason, n in named.items())


def row(
    doc_id: str, chunk: int, latent: str | None, reason: str | None, encoder: Encoder, limit: int
) -> TeacherLatent:
    """A latent, or the reason for none; one longer than the model may write is left out."""
    assert (latent is None) == (reason is not None), "either a latent or a reason"
    tokens = tuple(encoder.encode(latent)) if latent is not None else ()
    if len(tokens) > limit:
        reason = TOO_LONG
    kept = reason is None
    return TeacherLatent(
        doc_id=doc_id,
        chunk=chunk,
        latent=latent if kept else None,
        tokens=tokens if kept else None,
        reason=reason,
    )


def latent_row(request: Request, standing: Standing, encoder: Encoder, limit: int) -> TeacherLatent:
    text = standing.answer.text.strip() if standing.answer else None
    return row(request.doc_id, request.number, text, standing.reason, encoder, limit)


def paraphrase_row(request: Request, standing: Standing) -> Paraphrase:
    return Paraphrase(
        doc_id=request.doc_id,
        paraphrase=request.number,
        style=request.style,
        text=standing.answer.text.strip() if standing.answer else None,
        reason=standing.reason,
    )

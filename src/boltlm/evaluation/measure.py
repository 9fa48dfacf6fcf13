"""All measures of one model: `models.<name>` becomes `metrics/eval/<name>.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from boltlm.errors import UserError
from boltlm.evaluation import answers, likelihood
from boltlm.latents.dataset import references
from boltlm.params import build, section
from boltlm.progress import track
from boltlm.records import Chunk, Question, Sample, read, shard_name, write_shard
from boltlm.sampling.estep import EStep, items
from boltlm.sampling.shards import context_room, make_estep
from boltlm.sampling.weights import Summary

BATCH_DOCUMENTS = 100
RAW, LATENT, ANSWERS = "raw", "likelihood", "answers"  # tables in a model's folder


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Params section `evaluate`. `k_samples`: the K of every bound to report; as many latents a
    chunk are drawn as the largest asks for."""

    corpus: str
    k_samples: tuple[int, ...]
    answer_tokens: int

    def __post_init__(self) -> None:
        if not self.k_samples or min(self.k_samples) < 1:
            raise UserError(f"k_samples must list numbers of 1 or more, found {self.k_samples}")


def measure(
    params: Mapping[str, Any], name: str, *, model: Path, split: Path, chunks: Path, out: Path
) -> dict[str, float]:
    """Measure a model on the held-out chunks and questions; write every sample and every answer
    to `out` and return the metrics. Raw models have no bound, only a raw likelihood."""
    config = build(EvaluateConfig, section(params, "evaluate"), "evaluate")
    latent_format = section(params, f"models.{name}.format") == "latent"
    estep = make_estep(params, model, purpose="evaluate")
    room = context_room(estep.coder, params)
    found = list(read(chunks, Chunk))
    out.mkdir(parents=True, exist_ok=True)
    scores = likelihood.raw_scores(
        estep.model,
        estep.markers,
        likelihood.documents_of(found),
        estep.coder.window,
        estep.config.batch_tokens,
    )
    write_shard(out / RAW / shard_name(0), likelihood.DocumentScore, scores)
    measured = likelihood.raw_nll(scores)
    measured["heldout_documents"] = len({chunk.doc_id for chunk in found})
    measured["heldout_tokens"] = sum(len(chunk.tokens) for chunk in found)
    if latent_format:
        groups = _draw(params, name, estep, found, room, max(config.k_samples))
        write_shard(out / LATENT / shard_name(0), Sample, [s for g in groups for s in g])
        lengths = [len(chunk.tokens) for chunk in found]
        measured |= likelihood.bounds(groups, lengths, config.k_samples)
        summary = Summary(groups, references(split / config.corpus, chunks))
        measured |= summary.diagnostics() | summary.exact_fractions()
    return measured | _questions(estep, config, split / "questions", out, latent_format, room)


def _draw(
    params: Mapping[str, Any],
    name: str,
    estep: EStep,
    found: list[Chunk],
    room: int,
    draws: int,
) -> list[list[Sample]]:
    documents = [list(group) for _, group in groupby(found, lambda chunk: chunk.doc_id)]
    starts = range(0, len(documents), BATCH_DOCUMENTS)
    groups: list[list[Sample]] = []
    for start in track(starts, what=f"evaluate {name}", total=len(starts), unit="batches"):
        batch = [c for document in documents[start : start + BATCH_DOCUMENTS] for c in document]
        groups += estep.run(items(batch, section(params, "context_chunks"), room), draws)
    return groups


def _questions(
    estep: EStep,
    config: EvaluateConfig,
    questions: Path,
    out: Path,
    latent_format: bool,
    room: int,
) -> dict[str, float]:
    asked = list(read(questions, Question))
    if not asked:
        return {}
    spaces: tuple[answers.Space, ...] = ("latent", "none") if latent_format else ("none",)
    measured: dict[str, float] = {}
    given: list[answers.Answer] = []
    for space in spaces:
        batch = answers.answer(
            estep,
            asked,
            space,
            latent_format=latent_format,
            room=room - config.answer_tokens,
            answer_tokens=config.answer_tokens,
        )
        task = f"questions/{space}"
        measured[f"{task}/accuracy"], measured[f"{task}/accuracy_se"] = answers.accuracy(batch)
        given += batch
    write_shard(out / ANSWERS / shard_name(0), answers.Answer, given)
    measured["questions"] = len(asked)
    return measured

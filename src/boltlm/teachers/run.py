"""The stage `teacher`: latents for the chunks of a corpus, or paraphrases of its documents."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from boltlm.corpus import reference_latents
from boltlm.errors import UserError
from boltlm.progress import track_progress
from boltlm.records import Chunk, Document, TeacherLatent, read_shard, shard_paths, write_shard
from boltlm.teachers.config import DatasetTeacherConfig, TeacherSettings
from boltlm.teachers.job import ModelTeacher, TeacherJob
from boltlm.teachers.prompts import RequestBuilder
from boltlm.teachers.response_cache import ResponseCache
from boltlm.teachers.response_checks import ResponseChecks, SupportsEncode
from boltlm.teachers.tables import count_rows, describe_reasons, teacher_latent_row


def run_teacher(
    settings: TeacherSettings,
    encoder: SupportsEncode,
    *,
    split: Path,
    chunks: Path,
    out: Path,
    cache: Path,
    prompts: Path,
) -> dict[str, int | float]:
    """Write a table of TeacherLatent or Paraphrase to `out`, shard by shard, and return the
    metrics: counts of rows, of dropped rows by reason, and of tokens and cost.

    `split`, `chunks`: the folders of the corpus's documents and chunks. `cache`: the file of the
    response cache, `prompts`: the folder of the templates; `kind: dataset` uses neither. Raises
    UserError when there is no latent at all, or when too many requests have no usable response.
    """
    teacher = settings.teacher
    if isinstance(teacher, DatasetTeacherConfig):
        return _write_reference_latents(settings, encoder, split=split, chunks=chunks, out=out)
    job = make_job(settings, teacher, encoder, split=split, chunks=chunks, prompts=prompts)
    with closing(ResponseCache(cache)) as response_cache:
        return job.run(response_cache, encoder, out)


def make_job(
    settings: TeacherSettings,
    teacher: ModelTeacher,
    encoder: SupportsEncode | None,
    *,
    split: Path,
    chunks: Path,
    prompts: Path,
) -> TeacherJob:
    """The work of `teacher`, with the other settings as in `settings`; paths as in
    `run_teacher`."""
    builder = RequestBuilder(
        task=teacher.task,
        templates=prompts,
        sampling_facts=teacher.sampling_facts,
        context_chunks=settings.context_chunks,
        paraphrases=teacher.paraphrases,
        seed=teacher.seed,
    )
    checks = ResponseChecks(
        encoder=encoder,
        max_latent_tokens=settings.max_latent_tokens if teacher.task == "latent" else None,
        config=teacher.checks,
    )
    return TeacherJob(
        f"teachers.{settings.name}",
        teacher,
        builder,
        checks,
        split=split,
        chunk_paths=shard_paths(chunks),
    )


def _write_reference_latents(
    settings: TeacherSettings, encoder: SupportsEncode, *, split: Path, chunks: Path, out: Path
) -> dict[str, int | float]:
    """`kind: dataset`: the latents that the data set itself carries."""
    key = f"teachers.{settings.name}"
    counts: Counter[str] = Counter()
    paths = shard_paths(chunks)
    for path in track_progress(paths, what=key, total=len(paths), unit="shards"):
        documents, shard_chunks = read_shard(split / path.name, Document), read_shard(path, Chunk)
        rows = list(_reference_rows(documents, shard_chunks, encoder, settings.max_latent_tokens))
        count_rows(rows, counts)
        write_shard(out / path.name, TeacherLatent, rows)
    if counts["latents"] == 0:
        raise UserError(
            f"{key}: none of the {counts['chunks']} chunks has a latent"
            f" ({describe_reasons(counts)}; max_latent_tokens is {settings.max_latent_tokens});"
            " use a source that carries latents, or raise max_latent_tokens"
        )
    return dict(counts)


def _reference_rows(
    documents: list[Document],
    chunks: list[Chunk],
    encoder: SupportsEncode,
    max_latent_tokens: int,
) -> Iterator[TeacherLatent]:
    """One row for each chunk of a shard."""
    by_document = {key: list(group) for key, group in groupby(chunks, lambda c: c.doc_id)}
    for document in documents:
        document_chunks = by_document[document.doc_id]
        latents = reference_latents.chunk_latents(document, document_chunks)
        for chunk, latent in zip(document_chunks, latents, strict=True):
            reason = reference_latents.NO_LATENT if latent is None else None
            yield teacher_latent_row(
                chunk.doc_id, chunk.chunk, latent, reason, encoder, max_latent_tokens
            )

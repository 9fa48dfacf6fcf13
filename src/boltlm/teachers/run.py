"""The stage `teacher`: latents for the chunks of a corpus, or paraphrases of its documents."""

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import groupby
from pathlib import Path

from boltlm.corpus import reference_latents
from boltlm.errors import UserError
from boltlm.progress import track_progress
from boltlm.records import (
    Chunk,
    Document,
    TeacherLatent,
    read_column,
    read_shard,
    shard_paths,
    write_shard,
)
from boltlm.teachers.config import (
    DatasetTeacherConfig,
    ExtractTeacherConfig,
    ImportTeacherConfig,
    TeacherSettings,
)
from boltlm.teachers.imported import UNMATCHED, ImportedLatents
from boltlm.teachers.job import ModelTeacher, TeacherJob
from boltlm.teachers.prompts import RequestBuilder
from boltlm.teachers.response_cache import ResponseCache
from boltlm.teachers.response_checks import ResponseChecks, SupportsEncode
from boltlm.teachers.tables import (
    count_rows,
    describe_reasons,
    dropped_by_reason,
    teacher_latent_row,
)

# From a document and its chunks: the latent of each, and why the document has none where it cannot
# be matched.
LatentsOfDocument = Callable[[Document, list[Chunk]], tuple[list[str | None], str | None]]


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
    response cache, `prompts`: the folder of the templates; only teachers that ask a model use them.
    Raises UserError when there is no latent at all, when too many requests have no usable response,
    or when too few documents can be matched with those of another data set.
    """
    teacher, key = settings.teacher, f"teachers.{settings.name}"
    if isinstance(teacher, DatasetTeacherConfig | ImportTeacherConfig | ExtractTeacherConfig):
        latents_of: LatentsOfDocument = _own_latents
        if isinstance(teacher, ExtractTeacherConfig):
            from boltlm.teachers.extracted import PhraseExtractor  # scikit-learn is slow to import

            limit = settings.max_latent_tokens
            latents_of = PhraseExtractor(teacher.phrases, encoder, limit).latents
        if isinstance(teacher, ImportTeacherConfig):
            latents_of = _imported_latents(key, teacher, split, chunks).latents
        counts = _write_latents_of_data(
            settings, encoder, latents_of, split=split, chunks=chunks, out=out
        )
        _check_counts(settings, counts)
        return dict(counts)
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


def _write_latents_of_data(
    settings: TeacherSettings,
    encoder: SupportsEncode,
    latents_of: LatentsOfDocument,
    *,
    split: Path,
    chunks: Path,
    out: Path,
) -> Counter[str]:
    """Write a row for each chunk of the corpus, and return the counts of rows."""
    counts: Counter[str] = Counter()
    paths = shard_paths(chunks)
    what = f"teachers.{settings.name}"
    for path in track_progress(paths, what=what, total=len(paths), unit="shards"):
        documents, shard_chunks = read_shard(split / path.name, Document), read_shard(path, Chunk)
        by_document = {key: list(group) for key, group in groupby(shard_chunks, lambda c: c.doc_id)}
        rows: list[TeacherLatent] = []
        for document in documents:
            document_chunks = by_document[document.doc_id]
            latents, unmatched = latents_of(document, document_chunks)
            for chunk, latent in zip(document_chunks, latents, strict=True):
                reason = (unmatched or reference_latents.NO_LATENT) if latent is None else None
                limit = settings.max_latent_tokens
                row = teacher_latent_row(chunk.doc_id, chunk.chunk, latent, reason, encoder, limit)
                rows.append(row)
        count_rows(rows, counts)
        write_shard(out / path.name, TeacherLatent, rows)
    return counts


def _own_latents(document: Document, chunks: list[Chunk]) -> tuple[list[str | None], None]:
    """`kind: dataset`: the latents that the corpus itself carries."""
    return reference_latents.chunk_latents(document, chunks), None


def _imported_latents(
    key: str, teacher: ImportTeacherConfig, split: Path, chunks: Path
) -> ImportedLatents:
    """`kind: import`: the latents of another data set, in the order of the corpus. Raises UserError
    where the chunks of the corpus are not pieces, before the source is read."""
    paths = [split / path.name for path in shard_paths(chunks)]
    if read_shard(paths[0], Document)[0].pieces is None:
        raise UserError(
            f"{key}: the chunks of corpora.{teacher.corpus} are not the pieces of its source, so"
            f" latents cannot be imported for them; list '{teacher.corpus}' in chunks.from_source"
        )
    ids = (doc_id for path in paths for doc_id in read_column(path, Document, "doc_id"))
    return ImportedLatents(key, teacher.source, ids)


def _check_counts(settings: TeacherSettings, counts: Counter[str]) -> None:
    """Raises UserError where the source of `kind: import` lacks too many chunks, or where there is
    no latent at all."""
    teacher, key = settings.teacher, f"teachers.{settings.name}"
    if isinstance(teacher, ImportTeacherConfig):
        dropped = dropped_by_reason(counts)
        unmatched = {reason: dropped[reason] for reason in UNMATCHED if reason in dropped}
        if sum(unmatched.values()) > teacher.max_unmatched_fraction * counts["chunks"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in unmatched.items())
            raise UserError(
                f"{key}: of {counts['chunks']} chunks {reasons}, more than max_unmatched_fraction"
                f" {teacher.max_unmatched_fraction} allows; the source must have the documents of"
                f" corpora.{teacher.corpus} with the same ids (without columns.doc_id they begin"
                " with the name of the file or data set), texts and pieces"
            )
    if counts["latents"] == 0:
        raise UserError(
            f"{key}: none of the {counts['chunks']} chunks has a latent"
            f" ({describe_reasons(counts)}; max_latent_tokens is {settings.max_latent_tokens});"
            " use a source that carries latents, or raise max_latent_tokens"
        )

"""Sources become named corpora: documents and their chunks in shards, and held-out questions.

Documents that repeat an evaluation set are counted, and left out where params ask for it.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boltlm.corpus import benchmarks, sources
from boltlm.corpus.chunks import Chunker, LossyTextError
from boltlm.corpus.contamination import Contamination
from boltlm.errors import UserError
from boltlm.params import build, section
from boltlm.progress import Progress
from boltlm.records import Chunk, Document, Question, shard_name, write_shard

BASE = "base"  # the corpus that the stage `base` reads straight from its source


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Params entry `corpora.<name>`: how many documents it takes, and what its source changes.

    Corpora of one and the same source take consecutive runs of it, in the order of the file.
    """

    documents: int
    source: dict[str, Any]

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise UserError(f"documents must be 1 or more, found {self.documents}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Params section `split`.

    `overlap_words`: so many words in a row make a document repeat an evaluation set.
    """

    shard_documents: int
    overlap_words: int
    drop_contaminated: bool

    def __post_init__(self) -> None:
        for name in ("shard_documents", "overlap_words"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Params section `questions`: how many, and what their source changes in `corpus`."""

    count: int
    source: dict[str, Any]


def documents(params: Mapping[str, Any], name: str) -> Iterator[Document]:
    """The documents of one corpus, streamed from its source.

    Raises UserError when the source is spent before the corpus is full.
    """
    for _, found in corpora(params, [name]):
        yield from found


def corpora(
    params: Mapping[str, Any], wanted: Sequence[str]
) -> Iterator[tuple[str, Iterator[Document]]]:
    """Name and documents of each wanted corpus, with one pass through each source. What is not
    read of a corpus before the next is asked for is passed over."""
    for name in wanted:
        section(params, f"corpora.{name}")  # UserError for a name that is not there
    members: dict[sources.Source, list[str]] = {}
    for name in section(params, "corpora"):
        members.setdefault(sources.source(params, name), []).append(name)
    for source, names in members.items():
        last = max((i for i, name in enumerate(names) if name in wanted), default=-1)
        stream = _told(source, section(params, "seed"))
        taken = 0
        for name in names[: last + 1]:
            where = f"corpora.{name}"
            size = build(Corpus, section(params, where), where).documents
            run = _full(stream, size, taken, where)
            if name in wanted:
                yield name, run
            for _ in run:
                pass
            taken += size


def _full(stream: Iterator[Document], size: int, taken: int, where: str) -> Iterator[Document]:
    count = 0
    for document in itertools.islice(stream, size):
        count += 1
        yield document
    if count < size:
        raise UserError(
            f"{where}: its source holds {taken + count} documents, too few for {size} after the"
            f" {taken} that earlier corpora take; lower {where}.documents"
        )


def _told(source: sources.Source, seed: int) -> Iterator[Document]:
    """The source's documents. Raises UserError where it holds none at all."""
    found = False
    for document in sources.documents(source, seed):
        found = True
        yield document
    if not found:
        raise UserError(f"corpus kind '{source.kind}': the source holds no document")


def questions(params: Mapping[str, Any]) -> list[Question]:
    """The held-out questions, none where `questions.count` is 0."""
    config = build(Questions, section(params, "questions"), "questions")
    if config.count == 0:
        return []
    source = sources.resolve(params, config.source, "questions.source")
    found = sources.questions(source, section(params, "seed"))
    return list(itertools.islice(found, config.count))


def heldout(params: Mapping[str, Any]) -> list[str]:
    """The corpora that models are measured on, those that params have."""
    wanted = [section(params, "evaluate.corpus"), *section(params, "evaluate.beside")]
    return [name for name in dict.fromkeys(wanted) if name in section(params, "corpora")]


def evaluation_sets(
    params: Mapping[str, Any], asked: Sequence[Question]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Name and texts of each held-out corpus as its source has it, the questions and each
    benchmark; the texts of one are to be read before the next is asked for."""
    for name, found in corpora(params, heldout(params)):
        yield name, (document.text for document in found)
    yield "questions", (f"{question.prompt} {question.answer}" for question in asked)
    for kind, where in benchmarks.chosen(params).items():
        found = benchmarks.items(kind, where)
        yield kind, (" ".join((one.question, *one.choices, one.solution)) for one in found)


def split(
    params: Mapping[str, Any], chunker: Chunker, split_to: Path, chunks_to: Path
) -> dict[str, int | float]:
    """Write every corpus's documents and chunks, and the questions; return the counts. The
    corpus `base` is left out: nothing but the stage `base` reads it, before there are chunks.

    A document that is empty, or that the tokenizer cannot give back, is left out and counted; so
    is one that repeats an evaluation set, where `split.drop_contaminated` asks for it.
    """
    config = build(Split, section(params, "split"), "split")
    counts: Counter[str] = Counter()
    names = [name for name in section(params, "corpora") if name != BASE]
    asked, measured = questions(params), heldout(params)
    training = [name for name in names if name not in measured]
    overlap = Contamination(evaluation_sets(params, asked), training, config.overlap_words)
    for name, found in corpora(params, names):
        total = section(params, f"corpora.{name}.documents")
        with Progress(what=f"split {name}", total=total, unit="documents") as progress:
            seen: set[bytes] = set()
            batches = _batches(found, config.shard_documents)
            for index, batch in enumerate(batches):
                _no_twins(batch, seen, name)
                made = _chunked(batch, chunker, counts, name)
                if name in training:
                    repeats = overlap.repeats(name, [document.text for document, _ in made])
                    if config.drop_contaminated:
                        counts[f"{name}/left_out_contaminated"] += int(repeats.sum())
                        made = [one for one, dirty in zip(made, repeats, strict=True) if not dirty]
                kept = [document for document, _ in made]
                chunks = [chunk for _, own in made for chunk in own]
                counts[f"{name}/documents"] += len(kept)
                counts[f"{name}/chunks"] += len(chunks)
                counts[f"{name}/tokens"] += sum(len(chunk.tokens) for chunk in chunks)
                write_shard(split_to / name / shard_name(index), Document, kept)
                write_shard(chunks_to / name / shard_name(index), Chunk, chunks)
                progress.advance(len(batch))
        if counts[f"{name}/documents"] == 0:
            raise UserError(f"corpora.{name}: every document was left out; see its texts")
    write_shard(split_to / "questions" / shard_name(0), Question, asked)
    counts["questions"] = len(asked)
    counts["cut_chunks"] = chunker.cut_chunks
    return {**counts, **overlap.counts()}


def _batches(found: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(found, size)):
        yield batch


def _no_twins(batch: list[Document], seen: set[bytes], name: str) -> None:
    """Raises UserError for an id that was there before: every later stage joins by it. Eight
    bytes of a digest stand for an id."""
    for document in batch:
        digest = hashlib.blake2b(document.doc_id.encode(), digest_size=8).digest()
        if digest in seen:
            raise UserError(
                f"corpora.{name}: two documents have the id '{document.doc_id}'; map another"
                " column to doc_id, or null to number them"
            )
        seen.add(digest)


def _chunked(
    batch: list[Document], chunker: Chunker, counts: Counter[str], name: str
) -> list[tuple[Document, list[Chunk]]]:
    """The documents that can be kept, each with its chunks; why the others cannot is counted."""
    made: list[tuple[Document, list[Chunk]]] = []
    for document in batch:
        if not document.text:
            counts[f"{name}/left_out_empty"] += 1
            continue
        try:
            made.append((document, chunker.chunks(document)))
        except LossyTextError:
            counts[f"{name}/left_out_not_reversible"] += 1
    return made

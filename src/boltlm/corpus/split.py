"""Sources become named corpora: shards of documents and of their chunks, and held-out questions.

Training documents that share an n-gram with an evaluation set are counted, and dropped if
`split.drop_contaminated` is true.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from boltlm.corpus import sources
from boltlm.corpus.benchmarks import BENCHMARKS, BenchmarkName, read_benchmark
from boltlm.corpus.chunks import Chunker, ChunkingConfig, LossyTextError
from boltlm.corpus.contamination import Contamination
from boltlm.corpus.corpora import BASE_CORPUS, CorpusEntry, open_source, take_documents
from boltlm.corpus.inputs import require_input
from boltlm.corpus.readers import is_file_name
from boltlm.corpus.reference_latents import by_sentences
from boltlm.corpus.sources import CorpusSource
from boltlm.errors import UserError
from boltlm.param_types import (
    CommandText,
    Distinct,
    EntryName,
    Name,
    NewName,
    NonNegativeInt,
    Overlay,
    PositiveInt,
    Text,
)
from boltlm.params import from_key
from boltlm.progress import Progress
from boltlm.records import Chunk, Document, Question, shard_name, write_shard

# Other names of folders of data/split, and of prefixes in metrics.
CorpusName = Annotated[str, NewName("questions", *BENCHMARKS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionsConfig:
    """The number of held-out questions (0: none), and the source that they come from."""

    count: NonNegativeInt
    source: Annotated[CorpusSource, Overlay("corpus")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """`shard_documents`: documents of a shard. `ngram_size`: number of consecutive words that a
    document must share with an evaluation set to count as contaminated."""

    shard_documents: PositiveInt
    ngram_size: PositiveInt
    drop_contaminated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSettings:
    """What the stage `split` reads of params.yaml."""

    data_seed: NonNegativeInt
    inputs: Mapping[Name, CommandText]
    corpora: Mapping[CorpusName, CorpusEntry]
    questions: QuestionsConfig
    benchmarks: Mapping[BenchmarkName, Text]
    split: SplitConfig
    chunks: ChunkingConfig
    max_latent_tokens: PositiveInt
    heldout_corpus: Annotated[str, EntryName("corpora")] = from_key("evaluate.corpus")
    extra_corpora: Annotated[tuple[Annotated[str, EntryName("corpora")], ...], Distinct()] = (
        from_key("evaluate.extra_corpora")
    )

    def __post_init__(self) -> None:
        sources_by_key = {f"corpora.{name}": entry.source for name, entry in self.corpora.items()}
        for key, source in {**sources_by_key, "questions": self.questions.source}.items():
            if (path := sources.local_path(source)) is not None:
                require_input(f"{key}.source.path", path, self.inputs)
        for benchmark, path in self.benchmarks.items():
            if is_file_name(path):
                require_input(f"benchmarks.{benchmark}", path, self.inputs)
        self._check_order()
        self._check_pieces()

    def _check_order(self) -> None:
        """Raises UserError where the stage `base` would read what another corpus takes."""
        if BASE_CORPUS not in self.corpora:
            return
        source = self.corpora[BASE_CORPUS].source
        first = next(name for name, entry in self.corpora.items() if entry.source == source)
        if first != BASE_CORPUS:
            raise UserError(
                f"corpora.{BASE_CORPUS} must come before corpora.{first}, because both read the"
                " same source and the stage 'base' reads its first documents; move it up"
            )

    def _check_pieces(self) -> None:
        """Raises UserError where a corpus of `chunks.from_source` has no pieces."""
        for name in self.chunks.from_source:
            if name == BASE_CORPUS or name not in self.corpora:
                names = ", ".join(corpus for corpus in self.corpora if corpus != BASE_CORPUS)
                raise UserError(f"chunks.from_source must name corpora ({names}), found '{name}'")
            columns = getattr(self.corpora[name].source, "columns", None)
            if columns is None or columns.pieces is None:
                raise UserError(
                    f"chunks.from_source names '{name}', but the source of corpora.{name} lists no"
                    " pieces; set columns.pieces of a source of kind files or hub, or take the"
                    " corpus out of chunks.from_source"
                )


def stream_corpora(
    settings: SplitSettings, names: Sequence[str]
) -> Iterator[tuple[str, Iterator[Document]]]:
    """Name and documents of each corpus in `names`, with a single pass over each source.

    Documents that are not read before the next corpus is requested are skipped. Raises UserError
    where a source has fewer documents than its corpora need.
    """
    members: dict[CorpusSource, list[str]] = {}
    for name, entry in settings.corpora.items():
        members.setdefault(entry.source, []).append(name)
    for source, sharing in members.items():
        last = max((i for i, name in enumerate(sharing) if name in names), default=-1)
        stream = open_source(source, settings.data_seed)
        skipped = 0
        for name in sharing[: last + 1]:
            size = settings.corpora[name].documents
            documents = take_documents(stream, size, skipped, f"corpora.{name}")
            if name in names:
                yield name, documents
            for _ in documents:
                pass
            skipped += size


def heldout_questions(settings: SplitSettings) -> list[Question]:
    """The held-out questions; none if `questions.count` is 0."""
    config = settings.questions
    if config.count == 0:
        return []
    questions = sources.read_questions(config.source, settings.data_seed)
    return list(itertools.islice(questions, config.count))


def heldout_corpora(settings: SplitSettings) -> list[str]:
    """The names of the corpora on which models are evaluated."""
    return list(dict.fromkeys((settings.heldout_corpus, *settings.extra_corpora)))


def evaluation_sets(
    settings: SplitSettings, questions: Sequence[Question]
) -> Iterator[tuple[str, Iterator[str]]]:
    """Name and texts of each evaluation set: the held-out corpora as their sources have them, the
    questions and the benchmarks. The texts of a set must be read before the next set is
    requested."""
    for name, documents in stream_corpora(settings, heldout_corpora(settings)):
        yield name, (document.text for document in documents)
    yield "questions", (f"{question.prompt} {question.answer}" for question in questions)
    for benchmark, data_path in settings.benchmarks.items():
        items = read_benchmark(benchmark, data_path)
        yield benchmark, (" ".join((i.question, *i.choices, i.solution)) for i in items)


def split_corpora(
    settings: SplitSettings, chunker: Chunker, *, split_dir: Path, chunks_dir: Path
) -> dict[str, int | float]:
    """Write the documents and chunks of every corpus, and the questions; return the counts. The
    corpus `base` is not written, because only the stage `base` reads it, before chunks exist.

    Documents that are empty, that the tokenizer cannot reproduce or, if `split.drop_contaminated`
    is true, that are contaminated are dropped and counted as `<corpus>/dropped_<reason>`; so are
    pieces without text in the corpora of `chunks.from_source`, whose chunks are the pieces.
    Raises UserError where a source has too few documents, two documents of a corpus share an id, or
    all documents of a corpus are dropped.
    """
    names = [name for name in settings.corpora if name != BASE_CORPUS]
    heldout = heldout_corpora(settings)
    training = [name for name in names if name not in heldout]
    questions = heldout_questions(settings)
    contamination = Contamination(
        evaluation_sets(settings, questions), training, settings.split.ngram_size
    )
    writer = _CorpusWriter(settings.split, chunker, contamination, split_dir, chunks_dir)
    for name, documents in stream_corpora(settings, names):
        total = settings.corpora[name].documents
        with Progress(what=f"split {name}", total=total, unit="documents") as progress:
            writer.write(name, documents, name in training, progress)
    write_shard(split_dir / "questions" / shard_name(0), Question, questions)
    counts = {"questions": len(questions), "cut_chunks": chunker.cut_chunks}
    return {**writer.counts, **counts, **contamination.counts()}


class _CorpusWriter:
    """Writes corpora shard by shard and counts what was written and what was dropped."""

    def __init__(
        self,
        config: SplitConfig,
        chunker: Chunker,
        contamination: Contamination,
        split_dir: Path,
        chunks_dir: Path,
    ) -> None:
        self.config, self.chunker, self.contamination = config, chunker, contamination
        self.split_dir, self.chunks_dir = split_dir, chunks_dir
        self.counts: Counter[str] = Counter()

    def write(
        self, name: str, documents: Iterator[Document], is_training: bool, progress: Progress
    ) -> None:
        """Write the corpus `name`. `is_training`: whether its contamination is checked."""
        seen: set[bytes] = set()
        for index, batch in enumerate(_batches(documents, self.config.shard_documents)):
            _check_unique_ids(batch, seen, name)
            chunked = self._chunk(name, batch)
            if is_training:
                chunked = self._check_contamination(name, chunked)
            self._write_shard(name, shard_name(index), chunked)
            progress.advance(len(batch))
        if self.counts[f"{name}/documents"] == 0:
            raise UserError(
                f"corpora.{name}: every document was dropped; check its texts, and"
                " split.drop_contaminated"
            )

    def _chunk(self, name: str, batch: list[Document]) -> list[tuple[Document, list[Chunk]]]:
        """The documents that can be chunked, with their chunks."""
        chunked: list[tuple[Document, list[Chunk]]] = []
        from_source = name in self.chunker.config.from_source
        for document in batch if from_source else map(by_sentences, batch):
            if not document.text:
                self.counts[f"{name}/dropped_empty"] += 1
                continue
            try:
                chunked.append((document, self.chunker.chunks(document)))
            except LossyTextError:
                self.counts[f"{name}/dropped_not_reversible"] += 1
                continue
            if from_source and (empty := (document.pieces or ()).count(0)):
                self.counts[f"{name}/dropped_empty_pieces"] += empty
        return chunked

    def _check_contamination(
        self, name: str, chunked: list[tuple[Document, list[Chunk]]]
    ) -> list[tuple[Document, list[Chunk]]]:
        """Count contaminated documents; the documents that are retained, with their chunks."""
        texts = [document.text for document, _ in chunked]
        contaminated = self.contamination.check_documents(name, texts)
        if not self.config.drop_contaminated:
            return chunked
        self.counts[f"{name}/dropped_contaminated"] += int(contaminated.sum())
        return [pair for pair, drop in zip(chunked, contaminated, strict=True) if not drop]

    def _write_shard(
        self, name: str, shard: str, chunked: list[tuple[Document, list[Chunk]]]
    ) -> None:
        documents = [document for document, _ in chunked]
        chunks = [chunk for _, document_chunks in chunked for chunk in document_chunks]
        self.counts[f"{name}/documents"] += len(documents)
        self.counts[f"{name}/chunks"] += len(chunks)
        self.counts[f"{name}/tokens"] += sum(len(chunk.tokens) for chunk in chunks)
        write_shard(self.split_dir / name / shard, Document, documents)
        write_shard(self.chunks_dir / name / shard, Chunk, chunks)


def _batches(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, size)):
        yield batch


def _check_unique_ids(batch: list[Document], seen: set[bytes], name: str) -> None:
    """Raises UserError for a document id that occurred before, because later stages join tables by
    it. `seen`: a digest of eight bytes for each earlier id, which takes less memory."""
    for document in batch:
        digest = hashlib.blake2b(document.doc_id.encode(), digest_size=8).digest()
        if digest in seen:
            raise UserError(
                f"corpora.{name}: two documents have the id '{document.doc_id}'; map another"
                " column to doc_id, or set it to null to number the documents"
            )
        seen.add(digest)

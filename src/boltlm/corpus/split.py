"""Sources become named corpora: shards of documents and of their chunks, and held-out questions.

Training documents that share an n-gram with an evaluation set are counted, and dropped if
`split.drop_contaminated` is true.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

from boltlm.corpus import sources
from boltlm.corpus.benchmarks import BENCHMARKS, BenchmarkName, read_benchmark
from boltlm.corpus.chunker import Chunker
from boltlm.corpus.chunks import ChunkingConfig
from boltlm.corpus.contamination import Contamination
from boltlm.corpus.corpora import BASE_CORPUS, CorpusEntry, open_source, take_documents
from boltlm.corpus.inputs import require_input
from boltlm.corpus.readers import is_file_name
from boltlm.corpus.sources import CorpusSource
from boltlm.corpus.split_shards import (
    CHUNKS,
    DOCUMENTS,
    ShardChunker,
    ShardComparer,
    SourceShard,
    SplitShard,
    chunking_folder,
)
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
from boltlm.records import Document, Question, shard_name, write_shard
from boltlm.shard_store import publish_files
from boltlm.worker_pool import process_items

_Item = TypeVar("_Item")

# Other names of folders of data/split, and of prefixes in metrics.
CorpusName = Annotated[str, NewName("questions", *BENCHMARKS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionsConfig:
    """The number of held-out questions (0: none), and the source that they come from."""

    count: NonNegativeInt
    source: Annotated[CorpusSource, Overlay("corpus")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """`shard_documents`: documents of a shard. `workers`: processes that work on shards at the same
    time. `ngram_size`: number of consecutive words that a document must share with an evaluation
    set to count as contaminated."""

    shard_documents: PositiveInt
    workers: PositiveInt
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


def heldout_names(settings: SplitSettings) -> list[str]:
    """The names of the corpora on which models are evaluated."""
    return list(dict.fromkeys((settings.heldout_corpus, *settings.extra_corpora)))


def split_corpora(
    settings: SplitSettings, chunker: Chunker, *, work: Path, split_dir: Path, chunks_dir: Path
) -> dict[str, int | float]:
    """Write the documents and chunks of every corpus, and the questions; return the counts. The
    corpus `base` is not written, because only the stage `base` reads it, before chunks exist.

    Each source is read once, by this process; `split.workers` processes do the rest of the work,
    shard by shard, and save it below `work`. The result does not depend on their number. Documents
    that are empty, that the tokenizer cannot reproduce or, if `split.drop_contaminated` is true,
    that are contaminated are dropped and counted as `<corpus>/dropped_<reason>`; so are pieces
    without text in the corpora of `chunks.from_source`, whose chunks are the pieces.
    Raises UserError where a source has too few documents, two documents of a corpus share an id, or
    all documents of a corpus are dropped.
    """
    heldout = heldout_names(settings)
    questions = heldout_questions(settings)
    sets: dict[str, list[str]] = {name: [] for name in heldout}
    sets["questions"] = [f"{question.prompt} {question.answer}" for question in questions]
    for benchmark, data_path in settings.benchmarks.items():
        items = read_benchmark(benchmark, data_path)
        sets[benchmark] = [" ".join((i.question, *i.choices, i.solution)) for i in items]
    shards = _chunk_shards(settings, chunker, sets, chunking_folder(work, chunker))
    training = [name for name in shards if name not in heldout]
    contamination = Contamination(sets, training, settings.split.ngram_size)
    for shard in _compare_shards(settings, contamination, [s for n in training for s in shards[n]]):
        shards[shard.corpus][shard.index] = shard
    counts = _count(shards)
    for name, corpus_shards in shards.items():
        for out, file_name in ((split_dir, DOCUMENTS), (chunks_dir, CHUNKS)):
            paths = (shard.folder / file_name for shard in corpus_shards)
            publish_files({shard_name(i): path for i, path in enumerate(paths)}, out / name)
    write_shard(split_dir / "questions" / shard_name(0), Question, questions)
    return {**counts, "questions": len(questions), **contamination.counts()}


def _chunk_shards(
    settings: SplitSettings, chunker: Chunker, sets: Mapping[str, list[str]], folder: Path
) -> dict[str, list[SplitShard]]:
    """The shards of each corpus but `base`, in order, with their chunks. The texts of held-out
    corpora, as their sources have them, are added to `sets`."""
    names = [name for name in settings.corpora if name != BASE_CORPUS]
    done: dict[str, dict[int, SplitShard]] = {name: {} for name in names}
    total = sum(settings.corpora[name].documents for name in names)
    with Progress(what="split", total=total, unit="documents") as progress:
        source_shards = _source_shards(settings, names, sets)
        create = partial(ShardChunker, chunker, folder)
        for shard in _in_workers(settings, create, source_shards):
            done[shard.corpus][shard.index] = shard
            progress.note(shard.corpus)
            progress.advance(shard.source_documents)
    return {name: [shards[i] for i in sorted(shards)] for name, shards in done.items()}


def _source_shards(
    settings: SplitSettings, names: Sequence[str], sets: Mapping[str, list[str]]
) -> Iterator[SourceShard]:
    for name, documents in stream_corpora(settings, names):
        seen: set[bytes] = set()
        for index in itertools.count():
            batch = list(itertools.islice(documents, settings.split.shard_documents))
            if not batch:
                break
            _check_unique_ids(batch, seen, name)
            if name in sets:
                sets[name].extend(document.text for document in batch)
            has_pieces = name in settings.chunks.from_source
            yield SourceShard(corpus=name, index=index, documents=batch, has_pieces=has_pieces)


def _compare_shards(
    settings: SplitSettings, contamination: Contamination, shards: Sequence[SplitShard]
) -> Iterator[SplitShard]:
    """Each shard of a training corpus when it is compared with the evaluation sets, any first;
    what it shares with them is added to `contamination`."""
    create = partial(ShardComparer, contamination.ngrams, settings.split.drop_contaminated)
    with Progress(what="contamination", total=len(shards), unit="shards") as progress:
        for shard in _in_workers(settings, create, shards):
            assert shard.overlaps is not None
            contamination.add(shard.corpus, *shard.overlaps)
            progress.advance(1)
            yield shard


def _in_workers(
    settings: SplitSettings,
    create: Callable[[], Callable[[_Item], SplitShard]],
    items: Iterable[_Item],
) -> Iterator[SplitShard]:
    """The result for each item, in any order: made here, or in several worker processes."""
    if settings.split.workers == 1:
        return map(create(), items)
    return process_items([create] * settings.split.workers, items, what="split")


def _count(shards: Mapping[str, Sequence[SplitShard]]) -> Counter[str]:
    """What was written and dropped. Raises UserError where nothing is left of a corpus."""
    counts = Counter({"cut_chunks": 0})
    for name, corpus_shards in shards.items():
        for shard in corpus_shards:
            for key, count in shard.counts.items():
                counts[key if key == "cut_chunks" else f"{name}/{key}"] += count
        if counts[f"{name}/documents"] == 0:
            raise UserError(
                f"corpora.{name}: every document was dropped; check its texts, and"
                " split.drop_contaminated"
            )
    return counts


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

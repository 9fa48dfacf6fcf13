"""Speed of the stage `split`, on one core and with several workers.

    python benchmarks/split.py --model models/base --corpus 'books/*.jsonl.gz'
    python benchmarks/split.py --model stories260K      # a checkpoint that `base` has not prepared

`before`: the algorithm of an earlier version, which encoded every chunk twice, or once more for
each sentence where it was too long, decoded it, and wrote the tables in one process. `ours`: the
stage, first with one worker and then with several. All of them read the same documents (the columns
`text` and `id` of the corpus, or generated pages), compare them with the same held-out documents,
and run in a process of their own, one after the other. The fractions of time are of processor time,
which other programs change little; `ratio_workers` is of the time by the clock, and to be measured
on an idle machine. The last line also has the speed-up with eight workers by calculation: as long
as the process that reads the source has less to do than each worker, the workers are the limit.
"""

import argparse
import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from sides import measured  # noqa: E402

from boltlm.corpus.chunker import Chunker  # noqa: E402
from boltlm.corpus.contamination import Contamination  # noqa: E402
from boltlm.corpus.split import SplitSettings, split_corpora, stream_corpora  # noqa: E402
from boltlm.corpus.split_shards import use_one_core  # noqa: E402
from boltlm.params import build_settings, load  # noqa: E402
from boltlm.records import Chunk, Document, shard_name, write_shard  # noqa: E402
from boltlm.tokens import SOL, TextCoder  # noqa: E402

SIDES = ("before", "ours", "workers")


class TwiceEncodingChunker(Chunker):
    """The chunker of the earlier version; it makes the same chunks."""

    def chunks(self, documents: Sequence[Document]) -> list[list[Chunk] | None]:
        return [self._chunks_of(document) for document in documents]

    def _chunks_of(self, document: Document) -> list[Chunk] | None:
        texts: list[str] = []
        for run in self._runs(document):
            text = "".join(run)
            fits = len(self.encoder.encode(text)) <= self.max_chunk_tokens
            texts += [text] if fits else self._cut(run, [None] * len(run))
        chunks: list[Chunk] = []
        for text in texts:
            tokens = tuple(self.encoder.encode(text))
            if self.encoder.decode(list(tokens)) != text:
                return None
            number = len(chunks)
            chunks.append(Chunk(doc_id=document.doc_id, chunk=number, text=text, tokens=tokens))
        return chunks


def read_settings(args: argparse.Namespace) -> SplitSettings:
    """The corpus in two parts, with the chunk lengths of the paper."""
    params = load(ROOT / "params.yaml")
    source: dict[str, Any] = {"pages": "primer"}
    if args.corpus is not None:
        columns = {"text": "text", "doc_id": None, "cluster": None, "latent": None, "pieces": None}
        source = {"kind": "files", "path": args.corpus, "columns": columns, "shuffle_buffer": 0}
    params["corpora"] = {
        "em": {"documents": args.documents, "source": source},
        "heldout": {"documents": args.heldout, "source": source},
    }
    params["inputs"] = {"corpus": args.corpus} if args.corpus else {}
    params["evaluate"] |= {"corpus": "heldout", "extra_corpora": []}
    params["questions"]["count"] = 0
    lengths = {"mean_sentences": 8, "min_sentences": 1, "max_sentences": 20, "from_source": []}
    params["chunks"] = lengths
    params["split"] |= {"workers": args.workers if args.side == "workers" else 1}
    params["split"] |= {"shard_documents": args.shard_documents}
    return build_settings(SplitSettings, params)


def prepared(model: Path, folder: Path) -> Path:
    """The folder of a model that the stage `base` has made, or one with the tokenizer of another
    checkpoint as that stage would prepare it."""
    if SOL in (model / "tokenizer.json").read_text("utf-8"):
        return model
    from boltlm.training.base_model import load_checkpoint
    from boltlm.training.tokenizer import remove_leading_space
    from tests import tiny

    _, tokenizer = load_checkpoint(str(model))
    remove_leading_space(tokenizer)
    return tiny.coder_folder(tokenizer, folder)


def split_before(settings: SplitSettings, chunker: Chunker, folder: Path) -> int:
    """The stage as it was, without what it did for other kinds of corpora; the number of tokens."""
    (heldout,) = (
        [document.text for document in documents]
        for _, documents in stream_corpora(settings, ["heldout"])
    )
    ngrams = Contamination({"heldout": heldout}, ["em"], settings.split.ngram_size).ngrams
    num_tokens = 0
    for name, documents in stream_corpora(settings, list(settings.corpora)):
        for index in itertools.count():
            batch = list(itertools.islice(documents, settings.split.shard_documents))
            if not batch:
                break
            batch = [document for document in batch if document.text]
            chunks = [chunk for chunked in chunker.chunks(batch) for chunk in chunked or ()]
            if name == "em":
                ngrams.overlaps([document.text for document in batch])
            write_shard(folder / "split" / name / shard_name(index), Document, batch)
            write_shard(folder / "chunks" / name / shard_name(index), Chunk, chunks)
            num_tokens += sum(len(chunk.tokens) for chunk in chunks)
    return num_tokens


def measure_side(args: argparse.Namespace) -> dict[str, float]:
    use_one_core()
    settings = read_settings(args)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coder = TextCoder(prepared(args.model, folder))
        kind = TwiceEncodingChunker if args.side == "before" else Chunker
        chunker = kind(settings.chunks, coder, args.max_chunk_tokens, seed=1)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        if args.side == "before":
            num_tokens = split_before(settings, chunker, folder)
        else:
            paths = {"work": folder, "split_dir": folder / "split", "chunks_dir": folder / "chunks"}
            counts = split_corpora(settings, chunker, **paths)
            num_tokens = int(counts["em/tokens"] + counts["heldout/tokens"])
        seconds = time.perf_counter() - started
    own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own_seconds = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    child_seconds = children.ru_utime + children.ru_stime
    return {
        "tokens": num_tokens,
        "seconds": seconds,
        "own_cpu_seconds": own_seconds,
        "worker_cpu_seconds": child_seconds,
        "tokens_per_cpu_second": num_tokens / (own_seconds + child_seconds),
        "peak_mib": own.ru_maxrss / 1024,
        "worker_peak_mib": children.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "base")
    parser.add_argument("--corpus", default=None, help="JSONL or Parquet files with a column text")
    parser.add_argument("--documents", type=int, default=16000)
    parser.add_argument("--heldout", type=int, default=200, help="held-out documents")
    parser.add_argument("--shard-documents", type=int, default=200)
    parser.add_argument("--max-chunk-tokens", type=int, default=458)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    sides: dict[str, dict[str, float]] = {}
    for side in SIDES:
        sides[side] = measured("--side", side)
        print(side, json.dumps(sides[side]), flush=True)
    assert len({side["tokens"] for side in sides.values()}) == 1, "the sides differ"
    speed = {name: side["tokens_per_cpu_second"] for name, side in sides.items()}
    reading = sides["workers"]["own_cpu_seconds"]
    work = sides["workers"]["worker_cpu_seconds"]
    facts = {
        "model": str(args.model),
        "workers": args.workers,
        "tokens": sides["ours"]["tokens"],
        **{f"tokens_per_cpu_second_{name}": value for name, value in speed.items()},
        "ratio_per_core": speed["ours"] / speed["before"],
        "ratio_workers": sides["ours"]["seconds"] / sides["workers"]["seconds"],
        "ratio_8_workers_by_calculation": sides["ours"]["own_cpu_seconds"] / max(reading, work / 8),
        "reading_fraction": reading / (reading + work),
        "worker_peak_mib": sides["workers"]["worker_peak_mib"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

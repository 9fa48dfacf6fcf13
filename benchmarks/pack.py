"""Throughput and memory of packing texts into training sequences, at 1, 10 and 100 times the data.

    python benchmarks/pack.py --model models/base      # generated pages, 30 a document
    python benchmarks/pack.py --corpus my.jsonl.gz     # or other texts, repeated as often as needed

`ours`: texts are tokenized, stored, shuffled and packed. `tokenizer`: the tokenizer's own batch
call on the same texts in the same batches; its ids are discarded. `documents`: from stored chunks
with latents (data/chunks, data/latents) to training sequences, without tokenizing. Each side runs
at each size in a process of its own. Memory is the maximum growth of a process's anonymous memory;
mapped files, which the operating system can evict, do not count.
"""

import argparse
import gzip
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from sides import add_paths, measured  # noqa: E402

from boltlm.corpus.generated import GeneratedSource, generate_documents  # noqa: E402
from boltlm.param_values import build  # noqa: E402
from boltlm.params import load  # noqa: E402
from boltlm.sequences import packing, store  # noqa: E402
from boltlm.sequences.formatter import SequenceFormatter  # noqa: E402
from boltlm.sequences.layouts import SequenceFormat  # noqa: E402
from boltlm.sequences.packing import SequenceSource  # noqa: E402
from boltlm.sequences.store import BATCH_TEXTS, TokenizedDocument  # noqa: E402
from boltlm.tokens import TextCoder  # noqa: E402

SIDES = ("tokenizer", "ours", "documents")
SIZES = (1, 10, 100)
PAGES = 30  # pages of a generated document


def read_texts(args: argparse.Namespace, count: int) -> Iterator[str]:
    """`count` texts; the corpus is repeated as often as needed."""
    if args.corpus is not None:
        with gzip.open(args.corpus, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in itertools.islice(file, args.documents)]
    else:
        values = load(args.params)["corpus"] | {"pages": "primer"}
        source = build(GeneratedSource, values, "corpus")
        pages = (document.text for document in generate_documents(source, seed=1))
        texts = [" ".join(itertools.islice(pages, PAGES)) for _ in range(args.documents)]
    return itertools.islice(itertools.cycle(texts), count)


class MemoryMonitor:
    """The maximum growth of the process's anonymous memory, MiB, sampled every 10 ms."""

    def __enter__(self) -> "MemoryMonitor":
        self.initial = self.maximum = self._read()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.ended.wait(0.01):
            self.maximum = max(self.maximum, self._read())

    def _read(self) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    @property
    def growth(self) -> float:
        return self.maximum - self.initial


def tokenize_only(coder: TextCoder, texts: Iterator[str]) -> int:
    """The number of tokens that the tokenizer's own batch call returns."""
    num_tokens = 0
    while batch := list(itertools.islice(texts, BATCH_TEXTS)):
        encodings = coder.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(len(encoding.ids) for encoding in encodings)
    return num_tokens


def pack(
    coder: TextCoder,
    documents: Iterator[TokenizedDocument],
    sequence_format: SequenceFormat,
    folder: Path,
) -> int:
    """Pack one epoch of the documents and read a batch; the number of tokens packed."""
    formatter = SequenceFormatter(
        special_tokens=coder.special_tokens,
        sequence_format=sequence_format,
        draws="selected",
        layout="chunk",
        context_loss=True,
        context_chunks=3,
        token_budget=400,
        seed=1,
    )
    stored = store.write_documents(folder / "documents", documents)
    dataset = packing.pack_sequences(
        lambda _: [SequenceSource(stored, formatter)],
        folder,
        sequence_length=256,
        seed=1,
        vocab_size=coder.tokenizer.get_vocab_size(),
        epochs=1,
        tokens=None,
    )
    dataset.batch(len(dataset) // 16, 8)
    return len(dataset.tokens)


def measure_side(args: argparse.Namespace) -> dict[str, float]:
    coder = TextCoder(args.model)
    texts = read_texts(args, args.documents * args.size)
    next(texts)  # generates or reads the corpus before the clock starts
    with tempfile.TemporaryDirectory() as name, MemoryMonitor() as memory:
        started = time.perf_counter()
        if args.side == "tokenizer":
            num_tokens = tokenize_only(coder, texts)
        elif args.side == "ours":
            numbered = ((f"d{index}", text) for index, text in enumerate(texts))
            num_tokens = pack(coder, store.tokenize_texts(numbered, coder), "raw", Path(name))
        else:
            repeated = (
                document
                for _ in range(args.size)
                for document in store.read_tokenized(args.chunks, args.data)
            )
            num_tokens = pack(coder, repeated, "latent", Path(name))
        seconds = time.perf_counter() - started
    return {
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "memory_growth_mib": memory.growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_paths(
        parser,
        params="params.yaml",
        model="models/base",
        chunks="data/chunks/em",
        data="data/latents/em1",
    )
    parser.add_argument("--corpus", type=Path, default=None, help="JSONL.gz with a column text")
    parser.add_argument("--documents", type=int, default=1000, help="documents at size 1")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    results: dict[tuple[str, int], dict[str, float]] = {}
    for size, name in itertools.product(SIZES, SIDES):
        results[name, size] = measured("--side", name, "--size", str(size))
        print(name, size, json.dumps(results[name, size]), flush=True)
    speeds = {key: result["tokens_per_second"] for key, result in results.items()}
    summary: dict[str, float | None] = {"cores": os.cpu_count()}
    for (name, size), result in results.items():
        summary[f"tokens_per_second_{name}_{size}"] = result["tokens_per_second"]
        summary[f"memory_growth_mib_{name}_{size}"] = result["memory_growth_mib"]
    for size in SIZES:
        summary[f"ratio_vs_tokenizer_{size}"] = speeds["ours", size] / speeds["tokenizer", size]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

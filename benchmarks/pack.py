"""Tokens a second and memory from texts to packed training rows, at 1, 10 and 100 times the data.

    python benchmarks/pack.py --model models/base      # generated pages, 30 a document
    python benchmarks/pack.py --corpus my.jsonl.gz     # or texts of one's own, again and again

`ours`: texts are encoded, stored, shuffled and written as rows. `tokenizer`: the tokenizer's own
batch call on the same texts in the same batches, its ids taken and thrown away. `documents`: the
further step from stored chunks with latents to rows, a corpus's data/chunks and data/latents.
Sizes take turns in processes of their own; memory is what a process's own pages grew by at most
(mapped files, which the system may drop, not counted).
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

from boltlm.corpus import generated, sources  # noqa: E402
from boltlm.params import load  # noqa: E402
from boltlm.sequences import packing, store  # noqa: E402
from boltlm.sequences.layouts import Format  # noqa: E402
from boltlm.sequences.packing import Source, Writer  # noqa: E402
from boltlm.sequences.store import BATCH_TEXTS, Text  # noqa: E402
from boltlm.tokens import TextCoder  # noqa: E402

SIDES = ("tokenizer", "ours", "documents")
SIZES = (1, 10, 100)
PAGES = 30  # of a generated document


def texts(args: argparse.Namespace, count: int) -> Iterator[str]:
    """So many documents; what there is comes again and again."""
    if args.corpus is not None:
        with gzip.open(args.corpus, "rt", encoding="utf-8") as file:
            found = [json.loads(line)["text"] for line in itertools.islice(file, args.documents)]
    else:
        source = sources.resolve(load(args.params), {"pages": "primer"}, "benchmark")
        assert isinstance(source, generated.Generated)
        pages = (document.text for document in generated.documents(source, seed=1))
        found = [" ".join(itertools.islice(pages, PAGES)) for _ in range(args.documents)]
    return itertools.islice(itertools.cycle(found), count)


class Memory:
    """The most that the process's own pages grew by, MiB, looked at every 10 ms."""

    def __enter__(self) -> "Memory":
        self.before = self.most = self._now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, self._now())

    def _now(self) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    @property
    def grown(self) -> float:
        return self.most - self.before


def tokenizer(coder: TextCoder, given: Iterator[str]) -> int:
    count = 0
    while batch := list(itertools.islice(given, BATCH_TEXTS)):
        encoded = coder.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        count += sum(len(one.ids) for one in encoded)
    return count


def pack(coder: TextCoder, documents: Iterator[Text], form: Format, folder: Path) -> int:
    writer = Writer(
        markers=coder.markers, form=form, layout="chunk", context_chunks=3, room=400, seed=1
    )
    main = store.write(folder / "documents", documents)
    rows = packing.pack(
        lambda _: [Source(main, writer)],
        folder,
        length=256,
        seed=1,
        vocabulary=coder.tokenizer.get_vocab_size(),
        epochs=1,
        tokens=None,
    )
    rows.batch(len(rows) // 16, 8)
    return len(rows.tokens)


def side(args: argparse.Namespace) -> dict[str, float]:
    coder = TextCoder(args.model)
    given = texts(args, args.documents * args.size)
    next(given)  # what is made once is made
    with tempfile.TemporaryDirectory() as name, Memory() as memory:
        started = time.perf_counter()
        if args.side == "tokenizer":
            count = tokenizer(coder, given)
        elif args.side == "ours":
            named = ((f"d{place}", text) for place, text in enumerate(given))
            count = pack(coder, store.encoded(named, coder), "raw", Path(name))
        else:
            again = (t for _ in range(args.size) for t in store.texts(args.chunks, args.data))
            count = pack(coder, again, "latent", Path(name))
        seconds = time.perf_counter() - started
    return {"tokens": count, "tokens_per_second": count / seconds, "grown_mib": memory.grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_paths(
        parser,
        params="params.yaml",
        model="models/base",
        chunks="data/chunks/em",
        data="data/latents/em1",
    )
    parser.add_argument("--corpus", type=Path, default=None, help="JSONL.gz with the column text")
    parser.add_argument("--documents", type=int, default=1000, help="at the size 1")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args)))
        return
    found: dict[tuple[str, int], dict[str, float]] = {}
    for size, name in itertools.product(SIZES, SIDES):
        found[name, size] = measured("--side", name, "--size", str(size))
        print(name, size, json.dumps(found[name, size]), flush=True)
    speeds = {key: facts["tokens_per_second"] for key, facts in found.items()}
    facts = {"cores": os.cpu_count()}
    for name, size in found:
        facts[f"tokens_per_second_{name}_{size}"] = speeds[name, size]
        facts[f"grown_mib_{name}_{size}"] = found[name, size]["grown_mib"]
    for size in SIZES:
        facts[f"ratio_vs_tokenizer_{size}"] = speeds["ours", size] / speeds["tokenizer", size]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Time to cut documents into chunks, by the length of a document: one that is long should cost no
more for each token than many short ones.

    python benchmarks/chunk.py --model models/base --megabytes 10

Prints one JSON line for each kind of text: nanoseconds a token for documents of 1 kB and for a
single document of the given size, and the ratio of the two.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

from boltlm.corpus.chunks import Chunker, ChunkingConfig  # noqa: E402
from boltlm.records import Document  # noqa: E402
from boltlm.tokens import TextCoder, chunk_token_budget  # noqa: E402

_WORDS = ("the", "of", "dial", "turns", "mark", "a", "result", "is", "what", "was", "left", "when")
LENGTHS = ChunkingConfig(mean_sentences=3, min_sentences=1, max_sentences=8, from_source=())


def _prose(rng: random.Random, size: int, end: str) -> str:
    """Sentences of six to twenty words; `end` follows each of them."""
    parts, length = list[str](), 0
    while length < size:
        sentence = " ".join(rng.choices(_WORDS, k=rng.randint(6, 20))) + end
        parts.append(sentence)
        length += len(sentence)
    return "".join(parts)[:size]


# Each kind of text, by a function of a random generator and a number of characters.
TEXTS: Mapping[str, Callable[[random.Random, int], str]] = {
    "sentences": lambda rng, size: _prose(rng, size, ". "),
    "no sentence ends": lambda rng, size: _prose(rng, size, ", "),
    "no spaces": lambda rng, size: "".join(rng.choices("abcdefgh", k=size)),
    "full stops": lambda _, size: "." * size,
    "blank lines": lambda _, size: "\n" * size,
    "Chinese": lambda rng, size: "".join(map(chr, rng.choices(range(0x4E00, 0x5000), k=size))),
}


def seconds_per_token(chunker: Chunker, texts: list[str]) -> float:
    start, tokens = time.perf_counter(), 0
    for index, text in enumerate(texts):
        document = Document(doc_id=str(index), text=text, source="benchmark")
        tokens += sum(len(chunk.tokens) for chunk in chunker.chunks(document))
    return (time.perf_counter() - start) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--megabytes", type=float, default=10)
    args = parser.parse_args()
    coder = TextCoder(args.model)
    chunker = Chunker(LENGTHS, coder, chunk_token_budget(coder.context_length, 48), seed=1)
    for name, make in TEXTS.items():
        rng = random.Random(1)
        size = int(args.megabytes * 1e6) // len(make(rng, 1).encode())
        short = [make(rng, 1000) for _ in range(300)]
        one = seconds_per_token(chunker, short)
        other = seconds_per_token(chunker, [make(rng, size)])
        figures = {"ns_1kB": round(one * 1e9), "ns_long": round(other * 1e9)}
        print(json.dumps({"text": name, **figures, "ratio": round(other / one, 2)}), flush=True)


if __name__ == "__main__":
    main()

"""Cuts the sources into corpora of documents, chunks of token ids, and held-out questions.

What the training corpora share with evaluation sets is in the metrics.

    python stages/split.py --params params.yaml --base models/base --split data/split \
        --chunks data/chunks --metrics metrics/split.json
"""

import argparse
from pathlib import Path

from boltlm.corpus.chunks import Chunker, Chunking
from boltlm.corpus.split import split
from boltlm.errors import stage
from boltlm.params import build, load, section
from boltlm.records import write_json
from boltlm.tokens import TextCoder, most_chunk_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--base", "--split", "--chunks", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    params = load(args.params)
    coder = TextCoder(args.base)
    chunker = Chunker(
        build(Chunking, section(params, "chunks"), "chunks"),
        coder,
        most_chunk_tokens(coder.window, section(params, "max_latent_tokens")),
        section(params, "seed"),
    )
    write_json(args.metrics, split(params, chunker, args.split, args.chunks))


if __name__ == "__main__":
    stage(main)

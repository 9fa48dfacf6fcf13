"""Splits the sources into corpora: documents, their chunks as token ids, and held-out questions.

The metrics count what the training corpora share with the evaluation sets.

    python stages/split.py --params params.yaml --base models/base --work .work \
        --split data/split --chunks data/chunks --metrics metrics/split.json
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--params", "--base", "--work", "--split", "--chunks", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.corpus.chunker import Chunker
    from boltlm.corpus.split import SplitSettings, split_corpora
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path
    from boltlm.tokens import TextCoder, chunk_token_budget

    settings = load_settings(SplitSettings, args.params)
    coder = TextCoder(args.base)
    budget = chunk_token_budget(coder.context_length, settings.max_latent_tokens)
    chunker = Chunker(settings.chunks, coder, budget, settings.data_seed)
    counts = split_corpora(
        settings,
        chunker,
        work=repository_path(args.work),
        split_dir=args.split,
        chunks_dir=args.chunks,
    )
    write_json(args.metrics, counts)


if __name__ == "__main__":
    run_main(main)

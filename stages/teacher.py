"""Has a teacher write latents for the chunks of a corpus, or paraphrases of its documents.

    python stages/teacher.py --params params.yaml --name warmstart --base models/base \
        --split data/split/warmstart --chunks data/chunks/warmstart \
        --cache response_cache/responses.sqlite --prompts src/boltlm/teachers/templates \
        --out data/teacher/warmstart --metrics metrics/teacher/warmstart.json

Every response of a teacher is saved in the response cache, which belongs to the repository itself
also when DVC runs a queued experiment in a copy of it.
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    inputs = ("--params", "--base", "--split", "--chunks", "--prompts")
    for flag in (*inputs, "--cache", "--out", "--metrics"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path
    from boltlm.teachers.config import TeacherSettings
    from boltlm.teachers.run import run_teacher
    from boltlm.tokens import TextCoder

    counts = run_teacher(
        load_settings(TeacherSettings, args.params, name=args.name),
        TextCoder(args.base),
        split=args.split,
        chunks=args.chunks,
        out=args.out,
        cache=repository_path(args.cache),
        prompts=args.prompts,
    )
    write_json(args.metrics, counts)


if __name__ == "__main__":
    run_main(main)

"""Draws, weighs and selects latents for each chunk of a corpus: the E-step.

    python stages/latents.py --params params.yaml --name em1 --model models/warmstart \
        --split data/split/em --chunks data/chunks/em --previous data/chunks/em \
        --previous-model models/warmstart --work .work --timings timings --out data/latents/em1 \
        --metrics metrics/latents/em1.json --histogram metrics/latents/em1.csv
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    inputs = ("params", "model", "split", "chunks", "previous", "previous-model", "work", "timings")
    for flag in (*inputs, "out", "metrics", "histogram"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.estep.compute import check_reuse, record_estep_compute
    from boltlm.estep.config import EStepSettings
    from boltlm.estep.run import run_estep
    from boltlm.params import load_settings
    from boltlm.records import write_json
    from boltlm.shard_store import repository_path
    from boltlm.timing import timing_path, write_timing

    settings = load_settings(EStepSettings, args.params, name=args.name)
    if (reused := None if settings.options.reuse == "none" else args.previous) is not None:
        check_reuse(args.model, reused)
    metrics, timing = run_estep(
        settings,
        model=args.model,
        split=args.split,
        chunks=args.chunks,
        previous=args.previous,
        previous_model=args.previous_model,
        work=repository_path(args.work),
        out=args.out,
        histogram_path=args.histogram,
    )
    tokens = int(metrics["forward_tokens"])
    compute = record_estep_compute(args.name, tokens, model=args.model, reused=reused, out=args.out)
    write_json(args.metrics, {**metrics, **compute})
    if timing:
        path = timing_path(repository_path(args.timings), "latents", args.name)
        write_timing(path, args.metrics, [timing])


if __name__ == "__main__":
    run_main(main)

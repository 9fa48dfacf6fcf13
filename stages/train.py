"""Trains a model on a corpus with latents, on raw text, or on paraphrases: the M-step.

    python stages/train.py --params params.yaml --name em1 --parent models/base \
        --chunks data/chunks/em --data data/latents/em1 --mixed data/chunks/em \
        --heldout data/chunks/heldout --work .work --timings timings --out models/em1 --csv \
        metrics/train/em1.csv --metrics metrics/train/em1.json --snapshots snapshots/em1 \
        --db mlflow.db --artifacts mlartifacts
On several GPUs: python -m boltlm.training.launch --num_processes 8 [--use_fsdp] stages/train.py …
"""

import argparse
from pathlib import Path

from boltlm.errors import run_main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    inputs = ("params", "parent", "chunks", "data", "mixed", "heldout", "work", "timings")
    for flag in (*inputs, "out", "csv", "metrics", "snapshots", "db", "artifacts"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from boltlm.preflight.check import check_params

    check_params(args.params)
    from boltlm.checkpoint import final_weights
    from boltlm.params import flatten_params, load, load_settings
    from boltlm.shard_store import repository_path
    from boltlm.timing import timing_path
    from boltlm.training.config import TrainSettings
    from boltlm.training.distributed import process_state
    from boltlm.training.run import TrainPaths, run_training

    settings = load_settings(TrainSettings, args.params, name=args.name)
    hook = line_logger = None
    if config := settings.model.train.validation:
        from boltlm.evaluation.validation import ValidationSettings, validation_hook

        draws = load_settings(ValidationSettings, args.params)
        latent = settings.model.format == "latent"
        places = {"tokenizer": final_weights(args.parent), "heldout": args.heldout}
        hook = validation_hook(draws, config, latent=latent, **places)
    if settings.model.train.log_live and process_state().is_main_process:
        from boltlm.reporting.live_logging import live_logger, tracking_store

        store = tracking_store(repository_path(args.db), repository_path(args.artifacts))
        line_logger = live_logger(flatten_params(load(args.params)), args.name, store)
    timing = timing_path(repository_path(args.timings), "train", args.name)
    inputs = args.parent, args.chunks, args.mixed, args.data, repository_path(args.work)
    paths = TrainPaths(*inputs, args.out, args.csv, timing, args.metrics, args.snapshots)
    run_training(settings, paths, validation_hook=hook, line_logger=line_logger)


if __name__ == "__main__":
    run_main(main)

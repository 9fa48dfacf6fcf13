"""Trains a model on a corpus, with latents, raw, or paraphrased.

    python stages/train.py --params params.yaml --name em1 --parent models/base \
        --chunks data/chunks/em --data data/latents/em1 --mixed data/chunks/em \
        --heldout data/chunks/heldout --work .work --out models/em1 \
        --csv metrics/train/em1.csv --db mlflow.db --artifacts mlartifacts

On several GPUs: accelerate launch --num_processes 8 [--use_fsdp] in the place of python.
"""

import argparse
from importlib import import_module
from pathlib import Path

from boltlm import tracking
from boltlm.engine import work_root
from boltlm.errors import stage
from boltlm.model.checkpoint import final
from boltlm.model.parallel import machine
from boltlm.model.runs import Paths, run, settings
from boltlm.params import load

# By name: what measures a model meanwhile is no part of what it becomes, so DVC does not hash it.
MEASURES = "boltlm.evaluation.during"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    for flag in ("--params", "--parent", "--chunks", "--data", "--mixed", "--heldout"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--work", "--out", "--csv", "--db", "--artifacts"):
        parser.add_argument(flag, type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    params = load(args.params)
    entry, config = settings(params, args.name)
    hook = live = None
    if during := config.evaluate:
        hook = import_module(MEASURES).measures(
            params,
            latent=entry.format == "latent",
            documents=during.documents,
            k_samples=during.k_samples,
            tokenizer=final(args.parent),
            heldout=args.heldout,
        )
    if config.live and machine().is_main_process:
        place = tracking.store(work_root(args.db), work_root(args.artifacts))
        live = tracking.live(params, args.name, place)
    work = work_root(args.work)
    paths = Paths(args.parent, args.chunks, args.mixed, args.data, work, args.out, args.csv)
    run(params, args.name, paths, hook=hook, live=live)


if __name__ == "__main__":
    stage(main)

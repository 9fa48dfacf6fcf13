"""The sub-command that checks a finished experiment: files, shards, and the numbers of latents."""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from boltlm.commands.parser import Commands, add_command, count
from boltlm.errors import UserError
from boltlm.params import load, load_settings

EXPERIMENT_EXAMPLE = """\
example:
  boltlm verify
  boltlm verify --chunks 200 --seed 2

Reads every file that dvc.lock names, DVC's copy of it and every finished shard of unfinished work,
and compares them with their checksums. Then it recomputes log q and log p of some draws of each
table of latents in float64, from the ids and the model that are stored. The exit code is 1 if
anything differs."""


def add_verify_command(commands: Commands) -> None:
    """Add `boltlm verify`."""
    summary = "check the files, shards and latents of a finished experiment"
    parser = add_command(commands, "verify", summary, EXPERIMENT_EXAMPLE, _verify)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--lock", type=Path, default=Path("dvc.lock"))
    parser.add_argument("--dvc-cache", type=Path, default=Path(".dvc/cache/files/md5"))
    parser.add_argument("--work", type=Path, default=Path(".work"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of tables")
    parser.add_argument("--models", type=Path, default=Path("models"), help="the folder of models")
    parser.add_argument(
        "--chunks", type=count, default=20, metavar="N", help="chunks of each table (default: 20)"
    )
    parser.add_argument("--seed", type=count, default=1, help="chooses the chunks (default: 1)")


def _verify(args: argparse.Namespace) -> None:
    num_problems = 0
    parts = _lock_lines(args), _work_lines(args), _latents_lines(args)
    for line, is_problem in itertools.chain.from_iterable(parts):
        print(f"{'WRONG' if is_problem else 'ok':5}  {line}", flush=True)
        num_problems += is_problem
    if num_problems:
        raise UserError(f"{num_problems} of these checks failed; see the lines WRONG above")


def _lock_lines(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """A line for each output of dvc.lock and for each dependency that is wrong, with whether it is
    wrong; one for the other dependencies, one for DVC's cache."""
    from boltlm.lock_file import damaged_objects, locked_paths, path_problem

    intact: Counter[bool] = Counter()
    damaged: list[Path] = []
    for locked in locked_paths(args.lock):
        problem = path_problem(locked, args.lock.parent)
        if problem:
            yield f"{locked.path} {problem}", True
        elif locked.stage is not None:
            yield f"{locked.path}: as in {args.lock}", False
        intact[locked.stage is None] += not problem
        damaged += damaged_objects(locked, args.dvc_cache)
    yield f"{intact[True]} inputs and source files: as in {args.lock}", False
    for path in damaged:
        yield f"{path}: damaged copy in DVC's cache; delete it, then run dvc commit", True
    if not damaged:
        yield f"{args.dvc_cache}: no damaged copy of an output", False


def _work_lines(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    from boltlm.shard_store import repository_path, sealed_files

    damaged, intact = sealed_files(repository_path(args.work))
    for path in damaged:
        yield f"{path}: not as its checksum says; the next run makes it anew", True
    yield f"{args.work}: {len(intact)} finished shards and files as their checksums say", False


def _latents_lines(args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    from boltlm.estep.config import EStepSettings
    from boltlm.estep.verify_latents import latent_errors

    for name in load(args.params)["latents"]:
        settings = load_settings(EStepSettings, args.params, name=name)
        table, model = args.data / "latents" / name, args.models / settings.entry.model
        if not (table.is_dir() and model.is_dir()):
            yield f"{table}: it or {model} is missing; run dvc repro latents@{name}", True
            continue
        errors = latent_errors(
            settings,
            model=model,
            chunks=args.data / "chunks" / settings.entry.corpus,
            latents=table,
            count=args.chunks,
            seed=args.seed,
        )
        if errors is None:
            yield f"{table}: particles of method smc, not recomputed", False
            continue
        line = (
            f"{table}: {errors.draws} draws of {errors.chunks} chunks, log q within"
            f" {errors.log_q:.1e} and log p within {errors.log_p:.1e} nats of {model} in float64"
            f" (limit {errors.limit})"
        )
        yield line, not errors.hold

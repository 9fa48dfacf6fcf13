"""The sub-command `plan`: the work, cost and time of an experiment before it is started."""

import argparse
import re
from pathlib import Path

from boltlm.commands.parser import Commands, add_command, count
from boltlm.errors import UserError
from boltlm.params import build_settings, load

PLAN_EXAMPLE = """\
examples:
  boltlm plan                                                  # of params.yaml
  boltlm plan --params presets/paper-fixed.yaml --gpu h200 --gpus 8
  boltlm plan --measured                                       # with what finished stages recorded

Needs no key, no network and no data. A stage is done if dvc.lock has it with the values that
params.yaml has now and its outputs are there; `dvc status` also compares code and data."""


def add_plan_command(commands: Commands) -> None:
    """Declare `plan`."""
    summary = "documents, tokens, steps, dollars, FLOPs, hours and disk of each stage beforehand"
    parser = add_command(commands, "plan", summary, PLAN_EXAMPLE, _plan)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--gpu", help="cpu, h200, …; default: h200 if `launcher` starts processes")
    parser.add_argument("--gpus", type=count, metavar="N", help="default: as `launcher` says")
    parser.add_argument("--measured", action="store_true", help="recorded figures beside the plan")
    parser.add_argument("--metrics", type=Path, default=Path("metrics"))
    parser.add_argument("--timings", type=Path, default=Path("timings"))
    parser.add_argument("--lock", type=Path, default=Path("dvc.lock"))


def _plan(args: argparse.Namespace) -> None:
    print(plan_report(args))


def plan_of(path: Path) -> str:
    """The plan of a params file, on the device that it is made for."""
    values = {"params": path, "gpu": None, "gpus": None, "measured": False}
    return plan_report(argparse.Namespace(**values, lock=Path("dvc.lock")))


def plan_report(args: argparse.Namespace) -> str:
    """The plan as text. `args`: the arguments of the command."""
    from boltlm.preflight.disk import done_stages
    from boltlm.reporting.arms import ReportSettings
    from boltlm.reporting.plan import Planner
    from boltlm.reporting.plan_config import ACCELERATORS, PlanSettings
    from boltlm.reporting.plan_table import plan_text

    params = load(args.params)
    settings = build_settings(PlanSettings, params)
    processes = re.search(r"--num_processes[ =](\d+)", settings.launcher)
    device = args.gpu or ("h200" if processes else "cpu")
    if device not in ACCELERATORS:
        raise UserError(f"--gpu must be {' | '.join(ACCELERATORS)}, found {device!r}")
    number = int(processes[1]) if processes and device != "cpu" else 1
    number = number if args.gpus is None else args.gpus
    if number < 1:
        raise UserError(f"--gpus must be 1 or more, found {number}")
    accelerator = ACCELERATORS[device]
    stages = list(Planner(settings, accelerator, number).stages())
    measured = None
    if args.measured:
        from boltlm.reporting.plan_recorded import recorded_stages

        report = build_settings(ReportSettings, params)
        measured = recorded_stages(report, args.metrics, args.timings)
    return plan_text(
        stages,
        device=(device, accelerator, number),
        sizes=(settings.plan.chunk_tokens, settings.plan.latent_tokens),
        done=done_stages(params, args.lock),
        measured=measured,
    )

"""The sub-command `init`: a params.yaml for one's own text."""

import argparse
import subprocess
from pathlib import Path

from boltlm.commands.parser import Commands, add_command, count
from boltlm.errors import UserError

INIT_EXAMPLE = """\
examples:
  boltlm init --text notes/                            # a folder of .txt or Markdown files
  boltlm init --text book.md --by-heading              # a document from each heading to the next
  boltlm init --text 'pages/*.jsonl.gz' --column body
  boltlm init --text notes/ --model HuggingFaceTB/SmolLM2-135M --teacher openai

Measures the text, writes params.yaml with a comment on every choice, checks it and prints the plan.
Without --model a small base model is pretrained on part of the text; without --teacher a plan that
rules extract from the text stands in for thoughts, so that all runs without a key."""

_NEXT = """\
{path} is written. DVC watches the text through `inputs`: when it changes, `dvc status` says so and
`dvc repro` runs again what depends on it. Next:

  dvc repro train@warmstart && boltlm try  # teacher's latents, cost, an E-step on few documents
  dvc repro                                # everything; the page is reports/workspace/index.html"""


def add_init_command(commands: Commands) -> None:
    """Declare `init`."""
    summary = "write a params.yaml for your own text"
    parser = add_command(commands, "init", summary, INIT_EXAMPLE, _init)
    parser.add_argument("--text", required=True, metavar="PATH", help="file, folder or pattern")
    parser.add_argument("--column", help="the column with the text, of JSONL and Parquet files")
    parser.add_argument("--by-heading", action="store_true", help="cut Markdown at its headings")
    parser.add_argument(
        "--max-characters",
        type=count,
        default=4000,
        metavar="N",
        help="cut longer text files at blank lines; 0: never (default: 4000)",
    )
    parser.add_argument("--model", help="base model, a path or hub name; default: a new small one")
    kinds = ("none", "openai", "server", "local")
    parser.add_argument("--teacher", choices=kinds, default="none")
    parser.add_argument("--teacher-model", help="a path or hub name, for server and local")
    parser.add_argument("--server", default="http://127.0.0.1:8000/v1", help="address of a server")
    parser.add_argument("--force", action="store_true", help="overwrite a params.yaml with changes")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="file to write")
    parser.add_argument("--presets", type=Path, default=Path("presets"))


def _init(args: argparse.Namespace) -> None:
    from boltlm.checkpoint import default_device
    from boltlm.commands.own_params import Choices, base_facts, write_params
    from boltlm.commands.plan import plan_of
    from boltlm.commands.text_profile import profile_text
    from boltlm.params import load

    preset = args.presets / "own.yaml"
    if not preset.is_file():
        raise UserError(f"{preset}: no such file; run boltlm init in the root of the repository")
    if args.teacher in ("server", "local") and not args.teacher_model:
        raise UserError(f"--teacher {args.teacher}: give --teacher-model, a path or a hub name")
    if args.teacher in ("none", "openai") and args.teacher_model:
        raise UserError(f"--teacher-model is for server and local, not for {args.teacher}")
    if not args.force:
        _check_overwrite(args.params, args.presets)
    profile = profile_text(
        args.text,
        column=args.column,
        by_heading=args.by_heading,
        max_characters=args.max_characters or None,
    )
    choices = Choices(
        model=args.model,
        teacher=args.teacher,
        teacher_model=args.teacher_model,
        server=args.server,
        on_laptop=default_device().type == "cpu",
    )
    facts = base_facts(args.model, load(preset), profile)
    draft = args.params.with_name(f".{args.params.name}.draft")
    try:
        write_params(draft, preset, profile, choices, facts)
        _check_settings(draft)
        draft.replace(args.params)
    finally:
        draft.unlink(missing_ok=True)
    for line in args.params.read_text(encoding="utf-8").partition("\n\n")[0].splitlines():
        print(line.removeprefix("# ").removeprefix("#"))
    print(f"\n{plan_of(args.params)}\n\n{_NEXT.format(path=args.params)}")


def _check_overwrite(params: Path, presets: Path) -> None:
    """Raises UserError where a params.yaml has changes that neither git nor a preset has."""
    if not params.is_file():
        return
    content = params.read_bytes()
    if any(content == preset.read_bytes() for preset in presets.glob("*.yaml")):
        return
    command = ["git", "diff", "--quiet", "HEAD", "--", str(params)]
    known = ["git", "ls-files", "--error-unmatch", str(params)]
    for step in (known, command):
        if subprocess.run(step, capture_output=True, check=False).returncode:
            raise UserError(
                f"{params} has changes that are in no commit; save them (cp {params} my.yaml, or"
                " git commit), or give --force to overwrite them"
            )


def _check_settings(path: Path) -> None:
    """Build the settings of every stage. Raises UserError for what they do not take."""
    from boltlm.corpus.split import SplitSettings
    from boltlm.estep.config import EStepSettings
    from boltlm.evaluation.config import EvaluateSettings
    from boltlm.params import build_settings, load
    from boltlm.reporting.html_config import HtmlReportSettings
    from boltlm.reporting.plan_config import PlanSettings
    from boltlm.teachers.config import TeacherSettings
    from boltlm.training.base import BaseSettings
    from boltlm.training.config import TrainSettings

    params = load(path)
    for kind in (BaseSettings, SplitSettings, HtmlReportSettings, PlanSettings):
        build_settings(kind, params)
    for kind, section in (
        (TeacherSettings, "teachers"),
        (TrainSettings, "models"),
        (EvaluateSettings, "models"),
        (EStepSettings, "latents"),
    ):
        for name in params[section]:
            build_settings(kind, params, name=name)

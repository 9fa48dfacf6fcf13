"""Sub-commands for teachers: a preview, and care of the response cache."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from boltlm.commands.parser import Commands, add_command, count
from boltlm.errors import UserError
from boltlm.params import from_key, load_settings

TEACHER_EXAMPLE = """\
examples:
  boltlm teacher preview warmstart                          # what the model will be asked
  boltlm teacher preview warmstart --requests 1 --send 20   # what it answers, and what that costs

Needs the documents and chunks of the stage `split`, and for --send an API key or a local model.
Responses are saved in the response cache, so the stage `teacher` does not pay for them again."""

CACHE_EXAMPLE = """\
examples:
  boltlm cache check                     # read all responses; damage is an error
  boltlm cache export responses.jsonl    # write what can be read, also of a damaged cache
  boltlm cache import responses.jsonl    # add an export, or a copy of another cache"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPromptsSettings:
    """The folder of the prompts of teachers."""

    prompts: str = from_key("prompts.teacher")


def add_teacher_commands(commands: Commands) -> None:
    """Declare `teacher` and `cache`."""
    _add_teacher(commands)
    _add_cache(commands)


def _add_teacher(commands: Commands) -> None:
    summary = "preview what a teacher is asked, what it answers and what that costs"
    teacher = commands.add_parser("teacher", help=summary)
    actions = teacher.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parser = add_command(actions, "preview", summary, TEACHER_EXAMPLE, _preview_teacher)
    parser.add_argument("name", help="an entry of `teachers` in params.yaml")
    parser.add_argument("--requests", type=count, default=3, metavar="N", help="prompts to print")
    parser.add_argument("--send", type=count, default=0, metavar="M", help="requests to send")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--base", type=Path, default=Path("models/base"), help="for its tokenizer")
    parser.add_argument("--split", type=Path, default=Path("data/split"))
    parser.add_argument("--chunks", type=Path, default=Path("data/chunks"))
    cache = Path("response_cache/responses.sqlite")
    parser.add_argument("--cache", type=Path, default=cache, help="the response cache")


def _preview_teacher(args: argparse.Namespace) -> None:
    from boltlm.shard_store import repository_path
    from boltlm.teachers.config import TeacherSettings
    from boltlm.teachers.preview import PreviewPaths, preview
    from boltlm.tokens import TextCoder

    settings = load_settings(TeacherSettings, args.params, name=args.name)
    paths = PreviewPaths(
        split=args.split / settings.teacher.corpus,
        chunks=args.chunks / settings.teacher.corpus,
        cache=repository_path(args.cache),
        prompts=Path(load_settings(TeacherPromptsSettings, args.params).prompts),
    )
    coder = TextCoder(args.base) if args.base.exists() else None
    texts = preview(settings, coder, paths, num_requests=args.requests, num_sent=args.send)
    for text in texts:
        print(text, flush=True)


def _add_cache(commands: Commands) -> None:
    summary = "check, export or import the responses of teachers that were paid for"
    parser = add_command(commands, "cache", summary, CACHE_EXAMPLE, _cache)
    parser.add_argument("action", choices=("check", "export", "import"))
    parser.add_argument("file", type=Path, nargs="?", help="the file to export to or import from")
    parser.add_argument("--cache", type=Path, default=Path("response_cache/responses.sqlite"))


def _cache(args: argparse.Namespace) -> None:
    from boltlm.teachers import cache_transfer

    if args.action == "check":
        print(cache_transfer.check_cache(args.cache))
    elif args.file is None:
        raise UserError(f"boltlm cache {args.action}: give the file")
    elif args.action == "export":
        print(cache_transfer.export_cache(args.cache, args.file))
    else:
        print(cache_transfer.import_cache(args.cache, args.file))

"""The command `boltlm`: a preview of a teacher, care of the response cache, analyses of a finished
experiment.

Each sub-command is a function of the parsed arguments. It imports what it needs when it runs, so
that `boltlm --help` is quick.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boltlm.errors import UserError, run_main
from boltlm.param_types import PositiveInt
from boltlm.params import from_key, load_settings

COMPARE_EXAMPLE = """\
example:
  boltlm compare data/evaluate/em3 data/evaluate/em1 --corpus heldout

Both models were measured on the same documents and questions, so what makes some of them hard for
any model cancels, and the errors are smaller than those of the two models' own numbers. Give the
same folder twice to compare the verdicts of a task's graders."""

SEEDS_EXAMPLE = """\
example:
  dvc exp run --queue -S +models.em1.seed=1,2,3 evaluate@em1  # trainings over the same latents
  dvc exp run --queue -S data_seed=2 -S seed=2              # a full replicate
  dvc exp run --queue -S k_samples=1,8 evaluate@em1
  dvc queue start
  boltlm seeds --out metrics/seeds.csv --differences em1-warmstart em2-em1

An experiment is identified by its own params.yaml, not by its name."""

VERIFY_EXAMPLE = """\
example:
  boltlm verify-weights --model models/em1 --chunks data/chunks/em --limit 50

Draws latents for the first chunks of a corpus, as the section `sampling` says, recomputes their log
q and log w in float64, and prints the differences as one JSON object."""

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

BROWSE_EXAMPLE = """\
example:
  boltlm browse data/latents/em2
  boltlm browse data/latents/em2 --doc reckoning-train-1-4-of-4-00000005

Serves a page on 127.0.0.1 with documents, all their draws in every iteration, and what each token
gains by the latent. Without --doc it shows a sample, as the section `report` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPromptsSettings:
    """The folder of the prompts of teachers."""

    prompts: str = from_key("prompts.teacher")


@dataclass(frozen=True, kw_only=True, slots=True)
class KSamplesSettings:
    """The number of draws in the E-step, K."""

    k_samples: PositiveInt


def main() -> None:
    """Entry point of the command."""
    run_main(_run_command)


def _run_command() -> None:
    parser = argparse.ArgumentParser(
        prog="boltlm", description="Preview teachers, check their responses; analyse experiments."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_teacher(commands)
    _add_compare(commands)
    _add_seeds(commands)
    _add_verify_weights(commands)
    _add_cache(commands)
    _add_browse(commands)
    args = parser.parse_args()
    args.run(args)


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    example: str,
    run: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """A sub-command whose help ends with an example."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[:1].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_teacher(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "preview what a teacher is asked, what it answers and what that costs"
    teacher = commands.add_parser("teacher", help=summary)
    actions = teacher.add_subparsers(title="commands", required=True, metavar="COMMAND")
    parser = _add(actions, "preview", summary, TEACHER_EXAMPLE, _preview_teacher)
    parser.add_argument("name", help="an entry of `teachers` in params.yaml")
    parser.add_argument("--requests", type=_count, default=3, metavar="N", help="prompts to print")
    parser.add_argument("--send", type=_count, default=0, metavar="M", help="requests to send")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--base", type=Path, default=Path("models/base"), help="for its tokenizer")
    parser.add_argument("--split", type=Path, default=Path("data/split"))
    parser.add_argument("--chunks", type=Path, default=Path("data/chunks"))
    cache = Path("response_cache/responses.sqlite")
    parser.add_argument("--cache", type=Path, default=cache, help="the response cache")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be 0 or more, found {text!r}")
    return int(text)


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


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "paired differences of two models on the same documents and questions"
    parser = _add(commands, "compare", summary, COMPARE_EXAMPLE, _compare)
    parser.add_argument("one", type=Path, help="data/evaluate/<model>")
    parser.add_argument("other", type=Path, help="data/evaluate/<another model>")
    parser.add_argument("--corpus", help="a held-out corpus")
    parser.add_argument(
        "--disagreements",
        type=int,
        default=0,
        metavar="N",
        help="print N answers of which only one is correct",
    )


def _compare(args: argparse.Namespace) -> None:
    from boltlm.evaluation import compare

    if args.one != args.other:
        if args.corpus is None:
            raise UserError("--corpus is missing: give the name of a held-out corpus")
        differences = compare.paired_differences(args.one, args.other, args.corpus)
        print(compare.format_comparison(args.one, args.other, differences))
    if args.disagreements or args.one == args.other:
        pairs = compare.disagreements(args.one, args.other)
        print(compare.format_disagreements(args.one, args.other, pairs, args.disagreements))


def _add_seeds(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "aggregate finished DVC experiments over seeds: means with confidence intervals"
    parser = _add(commands, "seeds", summary, SEEDS_EXAMPLE, _seeds)
    parser.add_argument("--out", type=Path, required=True, help="CSV with one row a model and seed")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument(
        "--folders",
        nargs="+",
        type=Path,
        default=[],
        help="copies of the repository, one for each seed, to read instead of DVC's experiments",
    )
    parser.add_argument(
        "--of-other-k",
        nargs="*",
        default=["em1"],
        metavar="MODEL",
        help="models to report of experiments whose k_samples differs from that of --params",
    )
    parser.add_argument(
        "--differences",
        nargs="*",
        default=[],
        metavar="MODEL-MODEL",
        help="pairs whose bounds are compared seed by seed, such as em1-warmstart",
    )


def _seeds(args: argparse.Namespace) -> None:
    from boltlm.reporting import seed_aggregation

    k_samples = load_settings(KSamplesSettings, args.params).k_samples
    rows = seed_aggregation.collect_seeds(k_samples, args.of_other_k, args.folders)
    seed_aggregation.write_seed_csv(args.out, rows)
    print(f"{seed_aggregation.INTERVAL_NOTE}\n")
    print(seed_aggregation.seed_table(rows))
    if args.differences:
        print()
        print(seed_aggregation.paired_table(rows, k_samples, args.differences))


def _add_verify_weights(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "compare importance weights with a recomputation in float64"
    parser = _add(commands, "verify-weights", summary, VERIFY_EXAMPLE, _verify_weights)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--model", type=Path, required=True, help="models/<name>")
    parser.add_argument("--chunks", type=Path, required=True, help="data/chunks/<corpus>")
    parser.add_argument("--limit", type=int, default=50, help="number of chunks (default: 50)")


def _verify_weights(args: argparse.Namespace) -> None:
    from boltlm.estep.config import DrawSettings
    from boltlm.estep.verify_weights import verify_weights

    settings = load_settings(DrawSettings, args.params)
    k_samples = load_settings(KSamplesSettings, args.params).k_samples
    errors = verify_weights(settings, k_samples, args.model, args.chunks, args.limit)
    print(json.dumps(errors))


def _add_cache(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "check, export or import the responses of teachers that were paid for"
    parser = _add(commands, "cache", summary, CACHE_EXAMPLE, _cache)
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


def _add_browse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "show documents with their latents in a web browser"
    parser = _add(commands, "browse", summary, BROWSE_EXAMPLE, _browse)
    parser.add_argument("latents", type=Path, help="data/latents/<entry>")
    parser.add_argument(
        "--doc", nargs="+", action="extend", default=[], metavar="ID", help="ids of documents"
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="the folder of models")
    parser.add_argument("--port", type=int, default=0, help="0: any free one (default)")


def _browse(args: argparse.Namespace) -> None:
    from boltlm.reporting.browse_server import browser_page, serve
    from boltlm.reporting.html_config import HtmlReportSettings

    settings = load_settings(HtmlReportSettings, args.params)
    browser_page(settings, args.latents, args.models, args.doc)  # what is wrong is said now
    serve(lambda ids: browser_page(settings, args.latents, args.models, ids), args.doc, args.port)

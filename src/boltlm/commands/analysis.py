"""Sub-commands that analyse an experiment: comparisons, seeds, weights, documents in a browser."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from boltlm.commands.parser import Commands, add_command
from boltlm.errors import UserError
from boltlm.param_types import PositiveInt
from boltlm.params import load, load_settings

COMPARE_EXAMPLE = """\
examples:
  boltlm compare data/evaluate/em3 data/evaluate/em1 --corpus heldout
  boltlm compare data/evaluate/em3 data/evaluate/em1 --corpus heldout --html em3-em1.html

Both models were measured on the same documents and questions, so what makes some of them hard for
any model cancels, and the errors are smaller than those of the two models' own numbers. Give the
same folder twice to compare the verdicts of a task's graders."""

SEEDS_EXAMPLE = """\
example:
  dvc exp run --queue -S +models.em1.seed=1,2,3 evaluate@em1  # trainings over the same latents
  dvc exp run --queue -S data_seed=2 -S seed=2              # a full replicate
  dvc exp run --queue -S k_samples=1,8 evaluate@em1
  dvc queue start
  boltlm seeds --out metrics/collected/seeds.csv --differences em1-warmstart em2-em1

An experiment is identified by the params that dvc.lock says it was made with, not by its name; the
table has what differs by seeds alone as one group."""

VERIFY_EXAMPLE = """\
example:
  boltlm verify-weights --model models/em1 --chunks data/chunks/em --limit 50

Draws latents for the first chunks of a corpus, as the section `sampling` says, recomputes their log
q and log w in float64, and prints the differences as one JSON object."""

BROWSE_EXAMPLE = """\
example:
  boltlm browse data/latents/em2
  boltlm browse data/latents/em2 --doc reckoning-train-1-4-of-4-00000005

Serves a page on 127.0.0.1 with documents, all their draws in every iteration, and what each token
gains by the latent. Without --doc it shows a sample, as the section `report` says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KSamplesSettings:
    """The number of draws in the E-step, K."""

    k_samples: PositiveInt


def add_analysis_commands(commands: Commands) -> None:
    """Declare `compare`, `seeds`, `verify-weights` and `browse`."""
    _add_compare(commands)
    _add_seeds(commands)
    _add_verify_weights(commands)
    _add_browse(commands)


def _add_compare(commands: Commands) -> None:
    summary = "paired differences of two models on the same documents and questions"
    parser = add_command(commands, "compare", summary, COMPARE_EXAMPLE, _compare)
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
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write differences and all such answers to a page"
    )


def _compare(args: argparse.Namespace) -> None:
    from boltlm.evaluation import compare

    differences: dict[str, compare.PairedDifference] = {}
    if args.one != args.other:
        if args.corpus is None:
            raise UserError("--corpus is missing: give the name of a held-out corpus")
        differences = compare.paired_differences(args.one, args.other, args.corpus)
        print(compare.format_comparison(args.one, args.other, differences))
    if args.disagreements or args.html or args.one == args.other:
        pairs = compare.disagreements(args.one, args.other)
        print(compare.format_disagreements(args.one, args.other, pairs, args.disagreements))
        if args.html:
            from boltlm.reporting.comparison_page import write_comparison

            write_comparison(args.one, args.other, differences, pairs, args.html)
            print(f"page: {args.html}")


def _add_seeds(commands: Commands) -> None:
    summary = "aggregate finished DVC experiments over seeds: means with confidence intervals"
    parser = add_command(commands, "seeds", summary, SEEDS_EXAMPLE, _seeds)
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
        "--differences",
        nargs="*",
        default=[],
        metavar="MODEL-MODEL",
        help="pairs that are compared seed by seed, such as em1-warmstart (default: every model"
        " with seeds.baseline of --params)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="PATTERN",
        help="names of metrics, with * (default: seeds.metrics of --params)",
    )


def _seeds(args: argparse.Namespace) -> None:
    from boltlm.reporting import seed_aggregation, seed_tables
    from boltlm.reporting.seed_rows import collect_rows

    config = load_settings(seed_tables.CollectSettings, args.params).seeds
    patterns = args.metrics or config.metrics
    rows, left_out = collect_rows(load(args.params), patterns, args.folders)
    groups = seed_aggregation.seed_groups(args.out.stem, rows)
    pairs = seed_aggregation.parse_pairs(groups, args.differences)
    seed_tables.write_seed_rows(args.out, rows)
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"{seed_aggregation.INTERVAL_NOTE}\n")
    print(seed_aggregation.seed_table(groups))
    if pairs := pairs or seed_aggregation.pairs_with(groups, config.baseline):
        print(f"\n{seed_aggregation.paired_table(groups, pairs)}")


def _add_verify_weights(commands: Commands) -> None:
    summary = "compare importance weights with a recomputation in float64"
    parser = add_command(commands, "verify-weights", summary, VERIFY_EXAMPLE, _verify_weights)
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


def _add_browse(commands: Commands) -> None:
    summary = "show documents with their latents in a web browser"
    parser = add_command(commands, "browse", summary, BROWSE_EXAMPLE, _browse)
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

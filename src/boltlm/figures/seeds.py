"""Finished DVC experiments as one table: mean ± standard error over seeds.

    dvc exp run --queue -S seed=1,2,3
    dvc exp run --queue -S seed=1,2,3 -S k_samples=1,8 evaluate@em1
    dvc queue start
    python -m boltlm.figures.seeds --out metrics/seeds.csv

An experiment counts by what its own params.yaml says, not by its name. Of a run with another
`k_samples` than the workspace's only the models named by --of-other-k count. --differences em1-em0
sets models against each other seed by seed.
"""

import argparse
import csv
import json
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

METRICS: tuple[str, ...] = (
    "elbo_per_token",
    "nll_per_token",
    "exact_fraction",
    "questions/standard/latent/accuracy",
    "questions/standard/raw/accuracy",
)


def git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), check=True, capture_output=True, text=True).stdout


def rows(default_k: int, of_other_k: list[str]) -> list[dict[str, Any]]:
    """One row a model, K and seed, from every experiment of this repository."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for ref in git("for-each-ref", "refs/exps", "--format=%(refname)").split():
        if len(ref.split("/")) != 5:  # refs/exps/<2 of the commit>/<38 of it>/<name>
            continue
        params = yaml.safe_load(git("show", f"{ref}:params.yaml"))
        seed, draws = params["seed"], params["k_samples"]
        for path in git("ls-tree", "--name-only", ref, "metrics/eval/").split():
            model = Path(path).stem
            if draws == default_k or model in of_other_k:
                facts = json.loads(git("show", f"{ref}:{path}"))
                measured = {metric: facts.get(metric) for metric in METRICS}
                row = {"model": model, "k_samples": draws, "seed": seed, **measured}
                found[model, draws, seed] = row
    return [found[key] for key in sorted(found)]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model and K."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        groups[row["model"], row["k_samples"]].append(row)
    lines = [["model", "K", "seeds", *METRICS], ["---"] * (3 + len(METRICS))]
    for (model, draws), group in groups.items():
        cells = [mean([row[metric] for row in group]) for metric in METRICS]
        lines.append([model, str(draws), str(len(group)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps(found: list[dict[str, Any]], default_k: int, pairs: list[str]) -> str:
    """Markdown: how much one model's bound lies above another's, paired by seed. A raw model's
    likelihood is known itself and stands for its bound."""
    bounds = {
        (r["model"], r["seed"]): -r["nll_per_token"] if r[METRICS[0]] is None else r[METRICS[0]]
        for r in found
        if r["k_samples"] == default_k
    }
    lines = [["difference", "seeds", METRICS[0]], ["---"] * 3]
    for pair in pairs:
        model, other = pair.split("-")
        seeds = [seed for name, seed in bounds if name == model and (other, seed) in bounds]
        gains = [bounds[model, seed] - bounds[other, seed] for seed in seeds]
        lines.append([f"{model} − {other}", str(len(gains)), mean([*gains])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: list[float | None]) -> str:
    """Mean and its standard error, `–` where nothing was measured."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return f"{known[0]:.3f}" if known else "–"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) / len(known) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--of-other-k", nargs="*", default=["em1"])
    parser.add_argument("--differences", nargs="*", default=[], metavar="em1-warmstart")
    args = parser.parse_args()
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    found = rows(params["k_samples"], args.of_other_k)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]) if found else ["model"])
        writer.writeheader()
        writer.writerows(found)
    print(table(found))
    if args.differences:
        print()
        print(steps(found, params["k_samples"], args.differences))


if __name__ == "__main__":
    main()

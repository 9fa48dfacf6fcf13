"""Finished DVC experiments as one table: means over seeds with 95 % intervals.

An experiment is identified by the params.yaml of its own commit, not by its name. Experiments whose
`k_samples` differs from the workspace's contribute only the models that were asked for, because all
other models in them are copies of those with the default K.

Entries of `models` that differ by their `seed` alone are further trainings of the first of them.
What a mean is taken over is told apart: full replicates differ by `data_seed`, others by `seed`
over the same data, trainings by the seed of the model alone (docs/method.md, 6.5).
"""

import csv
import json
import math
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scipy.special import stdtrit

from boltlm.errors import UserError

SEED_METRICS: tuple[str, ...] = (
    "elbo_per_token",
    "subset/elbo_per_token",
    "nll_in_context_per_token",
    "nll_per_token",
    "numbers_match",
    "questions/standard/latent/accuracy",
    "questions/standard/cot/accuracy",
    "questions/standard/raw/accuracy",
)
INTERVAL_NOTE = "mean ± half-width of the 95 % interval (t distribution, over seeds)"


class SeedMean(NamedTuple):
    """A mean over independent seeds, its standard error, and the half-width of its 95 % interval;
    the last two are NaN for a single seed."""

    mean: float
    standard_error: float
    half_width: float


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """x̄, s/√n and t_{0.975, n−1} s/√n of n values, with the unbiased standard deviation s."""
    count = len(values)
    if count < 2:
        return SeedMean(statistics.mean(values), math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(count)
    return SeedMean(statistics.mean(values), error, float(stdtrit(count - 1, 0.975)) * error)


class Seeds(NamedTuple):
    """The seeds of the data, of the experiment (sampling), and of the model's training."""

    data_seed: int
    seed: int
    train_seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedRow:
    """The metrics of one model in one experiment; those that it does not have are absent.
    `model`: the first of the entries that differ by their seed alone."""

    model: str
    k_samples: int
    seeds: Seeds
    metrics: Mapping[str, float]


def collect_seeds(
    default_k: int, of_other_k: Sequence[str], folders: Sequence[Path] = ()
) -> list[SeedRow]:
    """One row for each model, K and seeds, from every experiment of this repository, or from copies
    of the repository in `folders`, sorted. Of experiments with a K other than `default_k`, only
    the models `of_other_k` are taken.

    Raises UserError if git fails, if there are no experiments, or if the params of one have no seed
    or k_samples.
    """
    rows: dict[tuple[str, int, Seeds], SeedRow] = {}
    for name, params, metrics in map(_read_folder, folders) if folders else _experiments():
        k_samples, seed = _integer(params, "k_samples", name), _integer(params, "seed", name)
        data_seed = _integer(params, "data_seed", name) if "data_seed" in params else seed
        for entry, values in metrics.items():
            if _has_reseeded_ancestor(params, entry):
                continue
            model, seeds = _trained_model(params, entry, Seeds(data_seed, seed, seed))
            if k_samples == default_k or model in of_other_k:
                known = {m: values[m] for m in SEED_METRICS if values.get(m) is not None}
                key = model, k_samples, seeds
                row = SeedRow(model=model, k_samples=k_samples, seeds=seeds, metrics=known)
                if folders and rows.get(key, row) != row:
                    raise UserError(
                        f"{name}: another folder has other metrics of {model} with the same seeds"
                        f" {tuple(seeds)} and K ({k_samples})"
                    )
                rows[key] = row
    return [rows[key] for key in sorted(rows)]


def seed_table(rows: Sequence[SeedRow]) -> str:
    """A Markdown table with one line for each model, K and kind of seeds; the cells are
    INTERVAL_NOTE."""
    lines = [["model", "K", "n", *SEED_METRICS], ["---"] * (3 + len(SEED_METRICS))]
    for model, k_samples in dict.fromkeys((row.model, row.k_samples) for row in rows):
        same = {row.seeds: row for row in rows if (row.model, row.k_samples) == (model, k_samples)}
        for what, group in _seed_groups(list(same)):
            cells = [
                _format_mean([same[s].metrics[m] for s in group if m in same[s].metrics])
                for m in SEED_METRICS
            ]
            lines.append([model, str(k_samples), what, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paired_table(rows: Sequence[SeedRow], default_k: int, pairs: Sequence[str]) -> str:
    """A Markdown table with the difference in elbo_per_token of each pair `model-reference`, paired
    by seed; the cells are INTERVAL_NOTE. A training with a seed of its own is compared with that of
    the reference, or else with the reference that has the seed of the experiment. For a model
    without latents, −nll_in_context_per_token, which is exact and covers the same chunks in the
    same contexts, takes the bound's place.

    Raises UserError if a pair does not name two models that have such a value.
    """
    bounds = {
        (row.model, row.seeds): bound
        for row in rows
        if row.k_samples == default_k and (bound := _bound(row)) is not None
    }
    models = dict.fromkeys(model for model, _ in bounds)
    lines = [["difference", "n", "elbo_per_token"], ["---"] * 3]
    for pair in pairs:
        model, _, reference = pair.partition("-")
        if model not in models or reference not in models:
            raise UserError(
                f"a pair must be <model>-<reference>, each one of {', '.join(models) or 'none'};"
                f" found '{pair}'"
            )
        differences: dict[Seeds, float] = {}
        for seeds in (seeds for name, seeds in bounds if name == model):
            default = bounds.get((reference, seeds._replace(train_seed=seeds.seed)))
            if (other := bounds.get((reference, seeds), default)) is not None:
                differences[seeds] = bounds[model, seeds] - other
        for what, group in _seed_groups(list(differences)) or [("0", [])]:
            cell = _format_mean([differences[seeds] for seeds in group])
            lines.append([f"{model} − {reference}", what, cell])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_seed_csv(path: Path, rows: Sequence[SeedRow]) -> None:
    """Write the rows as CSV; metrics that a model does not have are blank."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["model", "k_samples", *Seeds._fields, *SEED_METRICS])
        writer.writeheader()
        for row in rows:
            key = {"model": row.model, "k_samples": row.k_samples, **row.seeds._asdict()}
            writer.writerow({**key, **row.metrics})


def _seed_groups(seeds: Sequence[Seeds]) -> list[tuple[str, list[Seeds]]]:
    """What means are taken over, each with its size and kind: `10 replicates` are runs whose model
    has the seed of its experiment, `5 trainings` those of one experiment with seeds of their own.
    A single run is shown only where there are no trainings."""
    trainings: dict[tuple[int, int], list[Seeds]] = defaultdict(list)
    for item in seeds:
        trainings[item.data_seed, item.seed].append(item)
    groups = [(f"{len(g)} trainings", g) for g in trainings.values() if len(g) > 1]
    runs = [item for item in seeds if item.train_seed == item.seed]
    if len(runs) > 1:
        is_replicated = len({item.data_seed for item in runs}) == len(runs)
        groups.insert(0, (f"{len(runs)} {'replicates' if is_replicated else 'seeds'}", runs))
    return groups or [("1", list(seeds))] if seeds else []


class _Experiment(NamedTuple):
    """Its name, its params, and the metrics of each model."""

    name: str
    params: Any
    metrics: dict[str, dict[str, float]]


def _experiments() -> Iterator[_Experiment]:
    """The experiments below refs/exps/<2 digits of the baseline commit>/<38 digits>/<name>."""
    refs = _git("for-each-ref", "refs/exps", "--format=%(refname)").split()
    refs = [ref for ref in refs if len(ref.split("/")) == 5]  # others belong to DVC's queue
    if not refs:
        raise UserError(
            "this repository has no finished DVC experiments; queue some with `dvc exp run --queue"
            " -S seed=1,2,3` and run them with `dvc queue start`"
        )
    for ref in refs:
        params = yaml.safe_load(_git("show", f"{ref}:params.yaml"))
        paths = _git("ls-tree", "--name-only", ref, "metrics/eval/").split()
        metrics = {Path(path).stem: json.loads(_git("show", f"{ref}:{path}")) for path in paths}
        yield _Experiment(ref, params, metrics)


def _read_folder(folder: Path) -> _Experiment:
    paths = sorted((folder / "metrics" / "eval").glob("*.json"))
    if not paths or not (folder / "params.yaml").is_file():
        raise UserError(f"{folder}: no params.yaml or no metrics/eval/*.json; run dvc repro there")
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    metrics = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return _Experiment(str(folder), params, metrics)


def _has_reseeded_ancestor(params: Any, name: str) -> bool:
    """Whether a model that `name` builds on, by its weights or its latents, has a seed of its own:
    what `name` was trained on is then not what it is in other experiments of the same seeds."""
    models = params.get("models") or {}
    entry = models.get(name, {})
    ancestors = [entry.get("parent")]
    folder, _, latents = entry.get("data", "").partition("/")
    if folder == "latents":
        source = (params.get("latents") or {}).get(latents, {})
        ancestors += [source.get("model"), source.get("previous_model")]
    return any(
        models[ancestor].get("seed") is not None or _has_reseeded_ancestor(params, ancestor)
        for ancestor in ancestors
        if ancestor in models
    )


def _trained_model(params: Any, name: str, seeds: Seeds) -> tuple[str, Seeds]:
    """The first entry of `models` that differs from the entry `name` by its seed alone, and the
    seeds of this one; `seeds`: those of the experiment."""
    models = params.get("models") or {}
    if name not in models:
        return name, seeds
    entry = _without_seed(models[name])
    first = next(other for other in models if _without_seed(models[other]) == entry)
    own = models[name].get("seed", params.get("model_defaults", {}).get("seed"))
    return first, seeds if own is None else seeds._replace(train_seed=own)


def _without_seed(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "seed"}


def _integer(params: Any, key: str, name: str) -> int:
    value = params.get(key) if isinstance(params, dict) else None
    if not isinstance(value, int):
        raise UserError(
            f"{name}: params.yaml has {key} = {value!r}, which must be an integer; leave this"
            f" folder out, or remove the experiment with: dvc exp remove {name.split('/')[-1]}"
        )
    return value


def _git(*arguments: str) -> str:
    command = ("git", *arguments)
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise UserError(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


def _bound(row: SeedRow) -> float | None:
    if "elbo_per_token" in row.metrics:
        return row.metrics["elbo_per_token"]
    nll = row.metrics.get("nll_in_context_per_token")
    return None if nll is None else -nll


def _format_mean(values: Sequence[float]) -> str:
    """INTERVAL_NOTE, the mean alone for one value, `–` for none."""
    if not values:
        return "–"
    mean, _, half_width = mean_over_seeds(values)
    return f"{mean:.3f}" if math.isnan(half_width) else f"{mean:.3f} ± {half_width:.3f}"

"""Means over seeds of any metric, with 95 % intervals and differences paired by seed
(docs/method.md, 6.5; docs/reporting.md).

What a mean is taken over is told apart: full replicates differ by `data_seed`, seeds by `seed` over
the same data, trainings by the seed of the model alone.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

from boltlm.errors import UserError
from boltlm.evaluation.curve_points import metric_direction
from boltlm.reporting.seed_rows import SeedRow

BOUND, EXACT = "elbo_per_token", "nll_in_context_per_token"
INTERVAL_NOTE = "mean ± half-width of the 95 % interval (t distribution, over seeds)"


class SeedMean(NamedTuple):
    """A mean over independent seeds, its standard error, and the half-width of its 95 % interval;
    the last two are NaN for a single seed."""

    mean: float
    standard_error: float
    half_width: float


class SeedGroup(NamedTuple):
    """The rows of one model over which means are taken. `source`: the collected file, or
    `experiment`; `over`: replicates, seeds or trainings, `run` for a single row."""

    source: str
    group: str
    model: str
    over: str
    rows: tuple[SeedRow, ...]


def mean_over_seeds(values: Sequence[float]) -> SeedMean:
    """x̄, s/√n and t_{0.975, n−1} s/√n of n values, with the unbiased standard deviation s."""
    count = len(values)
    if count < 2:
        return SeedMean(statistics.mean(values), math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(count)
    return SeedMean(statistics.mean(values), error, float(stdtrit(count - 1, 0.975)) * error)


def seed_groups(source: str, rows: Sequence[SeedRow]) -> list[SeedGroup]:
    """What means are taken over, for each group and model in the order of the rows: `replicates`
    or `seeds` are runs whose model has the seed of its experiment, `trainings` those of one
    experiment with seeds of their own. A single run is a group only where there are none."""
    models: dict[tuple[str, str], list[SeedRow]] = defaultdict(list)
    for row in rows:
        models[row.group, row.model].append(row)
    groups: list[SeedGroup] = []
    for (group, model), same in models.items():
        parts: list[tuple[str, list[SeedRow]]] = []
        runs = [row for row in same if row.seeds.train_seed == row.seeds.seed]
        if len(runs) > 1:
            is_replicated = len({row.seeds.data_seed for row in runs}) == len(runs)
            parts.append(("replicates" if is_replicated else "seeds", runs))
        trainings: dict[tuple[int, int], list[SeedRow]] = defaultdict(list)
        for row in same:
            trainings[row.seeds.data_seed, row.seeds.seed].append(row)
        parts += [("trainings", part) for part in trainings.values() if len(part) > 1]
        for over, part in parts or [("run", same)]:
            groups.append(SeedGroup(source, group, model, over, tuple(part)))
    return groups


def seed_table(groups: Sequence[SeedGroup]) -> str:
    """A Markdown table with a line for each group; the cells are INTERVAL_NOTE."""
    lines = [
        (group, _names(group)[0], [values_of(group.rows, name) for name in metric_names(groups)])
        for group in groups
    ]
    return _markdown("model", metric_names(groups), lines)


def paired_table(
    groups: Sequence[SeedGroup], pairs: Sequence[tuple[str, str]], min_seeds: int = 1
) -> str:
    """A Markdown table with the differences of each pair (model, reference) in every metric that
    has a better and a worse, paired by seed, where there are `min_seeds`; the cells are
    INTERVAL_NOTE."""
    metrics = [name for name in metric_names(groups) if metric_direction(name)]
    lines: list[tuple[SeedGroup, str, list[list[float]]]] = []
    for model, reference in pairs:
        for group in groups:
            cells = [paired_by_seed(group, reference, groups, name) for name in metrics]
            if group.model == model and max(map(len, cells), default=0) >= min_seeds:
                lines.append((group, f"{_names(group)[0]} − {reference}", cells))
    return _markdown("difference", metrics, lines) if lines else ""


def paired_by_seed(
    group: SeedGroup, reference: str, groups: Sequence[SeedGroup], metric: str
) -> list[float]:
    """The differences to the model `reference` of the same source. A training with a seed of its
    own is compared with that of the reference, or else with the reference that has the seed of the
    experiment. For a model without latents, −nll_in_context_per_token, which is exact and covers
    the same chunks in the same contexts, takes the bound's place."""
    others = {
        row.seeds: value
        for other in groups
        if (other.source, other.group, other.model) == (group.source, group.group, reference)
        for row in other.rows
        if (value := value_of(row, metric)) is not None
    }
    differences: list[float] = []
    for row in group.rows:
        default = others.get(row.seeds._replace(train_seed=row.seeds.seed))
        other, value = others.get(row.seeds, default), value_of(row, metric)
        if value is not None and other is not None:
            differences.append(value - other)
    return differences


def parse_pairs(groups: Sequence[SeedGroup], pairs: Iterable[str]) -> list[tuple[str, str]]:
    """`<model>-<reference>` of the command line. Raises UserError for models that there are not."""
    models = dict.fromkeys(group.model for group in groups)
    parsed: list[tuple[str, str]] = []
    for pair in pairs:
        model, _, reference = pair.partition("-")
        if model not in models or reference not in models:
            raise UserError(
                f"a pair must be <model>-<reference>, each one of {', '.join(models) or 'none'};"
                f" found '{pair}'"
            )
        parsed.append((model, reference))
    return parsed


def pairs_with(groups: Sequence[SeedGroup], baseline: str | None) -> list[tuple[str, str]]:
    """Every other model with the baseline, if there is one."""
    models = dict.fromkeys(group.model for group in groups)
    others = [model for model in models if model != baseline and "/" not in model]
    return [(model, baseline) for model in others if baseline is not None and baseline in models]


def metric_names(groups: Sequence[SeedGroup]) -> list[str]:
    """The metrics that some row has, in the order of their names."""
    return sorted({name for group in groups for row in group.rows for name in row.metrics})


def values_of(rows: Sequence[SeedRow], metric: str) -> list[float]:
    """A metric of the rows that have it."""
    return [row.metrics[metric] for row in rows if metric in row.metrics]


def value_of(row: SeedRow, metric: str) -> float | None:
    """A metric for a comparison, in which an exact likelihood stands for the bound that a model
    without latents does not have."""
    if metric == BOUND and metric not in row.metrics and EXACT in row.metrics:
        return -row.metrics[EXACT]
    return row.metrics.get(metric)


def _names(group: SeedGroup) -> tuple[str, str]:
    """The model with its params, and the number and kind of its seeds."""
    model = f"{group.model}, {group.group}" if group.group else group.model
    return model, f"{len(group.rows)} {group.over}" if len(group.rows) > 1 else "1"


def _format_mean(values: Sequence[float], size: int) -> str:
    """INTERVAL_NOTE, the mean alone for one value, `–` for none. The mean has the decimals of the
    half-width, which has two significant digits. `size`: of the group; fewer values are told."""
    if not values:
        return "–"
    mean, _, half = mean_over_seeds(values)
    cell = f"{mean:.3f}"
    if half > 0:
        digits = min(max(1 - math.floor(math.log10(half)), 0), 4)
        cell = f"{mean:.{digits}f} ± {half:.{digits}f}"
    elif half == 0:
        cell += " ± 0"
    return (cell if len(values) == size else f"{cell} (n = {len(values)})").replace("-", "−")


def _markdown(
    what: str, metrics: Sequence[str], lines: Sequence[tuple[SeedGroup, str, list[list[float]]]]
) -> str:
    """A line for each group, with its label and the values of every metric; without the metrics of
    which no line has any."""
    shown = [i for i in range(len(metrics)) if any(cells[i] for _, _, cells in lines)]
    rows = [
        [what, "n", *(metrics[i] for i in shown)],
        ["---", "---", *["---:"] * len(shown)],
        *(
            [label, _names(group)[1], *(_format_mean(cells[i], len(group.rows)) for i in shown)]
            for group, label, cells in lines
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

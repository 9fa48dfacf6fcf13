"""The few numbers that say how an experiment went: for `dvc exp show`, `dvc plots show` and the
experiment's run in MLflow (docs/reporting.md).
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from boltlm.reporting.arms import Arm, Role, control_arms, em_chain, ordered_arms
from boltlm.reporting.results import MetricPoint, Metrics, Results
from boltlm.shard_store import atomic_write

# Names of headline metrics and those of the same metrics in metrics/eval.
_EVALUATION_METRICS = {
    "elbo": "elbo_per_token",
    "nll_in_context": "nll_in_context_per_token",
    "nll": "nll_per_token",
    "ess": "ess_mean",
    "right_latents": "numbers_match",
    "right_latents_selected": "numbers_match_selected",
    "distinct_latents": "distinct_latents_mean",
    "latent_tokens": "latent_tokens_mean",
    "masked_mass": "masked_mass",
    "log_weight_std": "log_weight_std_mean",
}
_ACCURACY_SPACES = {"accuracy": "latent", "accuracy_cot": "cot", "accuracy_raw": "raw"}
_SUMMARIZED = ("elbo", "accuracy", "ess")
# With these limits metrics/summary.json has at most 15 numbers.
_FIRST_ITERATIONS, _LAST_ITERATIONS = 1, 3
_BASELINE_ROLES: tuple[Role, ...] = ("teacher", "frozen", "raw")
_MODELS_WITHOUT_CHAIN = 5
MAX_CURVE_LINES = 200  # of one training in the table of all training curves
CHAIN_SERIES = "EM chain"


def headline_metrics(results: Results, model: str) -> dict[str, float]:
    """The headline metrics that a model has. `elbo` of a model of raw text is the log-likelihood of
    the same chunks, which is what bounds are compared with. The accuracies are those of the first
    task of each thought space, the corpus's own questions before benchmarks."""
    metrics = results.evaluation[model]
    values = {name: metrics[key] for name, key in _EVALUATION_METRICS.items() if key in metrics}
    if "elbo" not in values and "nll_in_context" in values:
        values["elbo"] = -values["nll_in_context"]
    if sizes := results.bound_sizes("subset/"):
        large = metrics.get(f"subset/elbo_per_token_k{sizes[-1]}")
        values |= {} if large is None else {"elbo_large_k": large}
    for name, space in _ACCURACY_SPACES.items():
        accuracy = metrics.get(_accuracy_metric(results, space))
        values |= {} if accuracy is None else {name: accuracy}
    flops = results.training.get(model, {}).get("history_flops")
    return values | ({} if flops is None else {"history_flops": flops})


def _accuracy_metric(results: Results, space: str) -> str:
    """The name of the accuracy of the first task in this thought space; "" if there is none."""
    keys = dict.fromkeys(key for metrics in results.evaluation.values() for key in metrics)
    found = [key for key in keys if key.endswith(f"/{space}/accuracy")]
    return min(found, key=lambda key: not key.startswith("questions/"), default="")


def headline_points(results: Results) -> list[MetricPoint]:
    """At most 15 metrics of the EM chain with the iteration t of M_t as step. Without a chain: the
    numbers of the summary as `<metric>/<model>`, all at step 0."""
    chain = em_chain(results.arms)
    if not chain:
        return [
            MetricPoint(f"{metric}/{model}", value, 0)
            for metric, values in summary_numbers(results).items()
            for model, value in values.items()
        ]
    return [
        MetricPoint(metric, value, arm.iteration or 0)
        for arm in chain
        for metric, value in headline_metrics(results, arm.name).items()
    ]


def summary_numbers(results: Results) -> dict[str, dict[str, float]]:
    """At most 15 numbers, by metric and model: `elbo`, `accuracy` and `ess` of M_0 and of the last
    three models of the EM chain, and `elbo` of the best baselines: `best_teacher` is trained on a
    teacher's latents, `best_frozen` on latents that a model of the chain drew, `best_raw` on raw
    text. Without a chain: those of the first models in params.yaml."""
    chain = em_chain(results.arms)
    rest = chain[_FIRST_ITERATIONS:]
    shown = [*chain[:_FIRST_ITERATIONS], *rest[-_LAST_ITERATIONS:]]
    shown = shown or ordered_arms(results.arms)[:_MODELS_WITHOUT_CHAIN]
    numbers: dict[str, dict[str, float]] = {metric: {} for metric in _SUMMARIZED}
    for arm in shown:
        values = headline_metrics(results, arm.name)
        for metric in _SUMMARIZED:
            if metric in values:
                numbers[metric][arm.name] = values[metric]
    if chain:
        numbers["elbo"] |= _best_baselines(results, control_arms(results.arms))
    return {metric: values for metric, values in numbers.items() if values}


def _best_baselines(results: Results, arms: Sequence[Arm]) -> dict[str, float]:
    """`elbo` of the best model of each of the roles of baselines."""
    best: dict[str, float] = {}
    for role in _BASELINE_ROLES:
        values = [
            headline_metrics(results, arm.name).get("elbo") for arm in arms if arm.role == role
        ]
        measured = [value for value in values if value is not None]
        best |= {f"best_{role}": max(measured)} if measured else {}
    return best


def write_summary(results: Results, out: Path, tables: Path) -> None:
    """Write the summary to the JSON file `out`, and into the folder `tables` what `dvc plots show`
    draws: <metric>.csv of `elbo`, `accuracy` and `ess` by iteration, and training.csv."""
    with atomic_write(out) as temporary:
        text = json.dumps(summary_numbers(results), indent=2)
        temporary.write_text(f"{text}\n", encoding="utf-8")
    tables.mkdir(parents=True, exist_ok=True)
    for metric in _SUMMARIZED:
        head = ("iteration", metric, "series")
        _write_csv(tables / f"{metric}.csv", head, _iteration_rows(results, metric))
    head = ("tokens", "loss", "series")
    _write_csv(tables / "training.csv", head, _training_rows(results))


def _iteration_rows(results: Results, metric: str) -> list[tuple[float, float, str]]:
    """The chain's values by iteration; every other model but the base is a horizontal line."""
    chain = em_chain(results.arms)
    rows: list[tuple[float, float, str]] = []
    for arm in [arm for arm in ordered_arms(results.arms) if arm.role != "base"]:
        value = headline_metrics(results, arm.name).get(metric)
        if value is not None and arm.iteration is not None:
            rows.append((arm.iteration, value, CHAIN_SERIES))
        elif value is not None:
            ends = sorted({0, max(len(chain) - 1, 0)})
            rows += [(iteration, value, arm.name) for iteration in ends]
    return rows


def _training_rows(results: Results) -> list[tuple[float, float, str]]:
    """The training curves of all models, of long ones every n-th line."""
    return [
        (line["tokens"], line["loss"], model)
        for model, lines in results.curves.items()
        for line in _thinned([line for line in lines if {"tokens", "loss"} <= line.keys()])
    ]


def _thinned(lines: Sequence[Metrics]) -> Sequence[Metrics]:
    return lines[:: -(-len(lines) // MAX_CURVE_LINES) or 1]


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([head, *rows])

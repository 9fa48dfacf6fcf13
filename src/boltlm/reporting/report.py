"""All figures, and a report with the numbers: `metrics/` becomes `metrics/figures/`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context

from boltlm.estep.diagnostics import UNUSABLE_FRACTION
from boltlm.reporting.arms import ordered_arms
from boltlm.reporting.experiment import Experiment, FigureSettings
from boltlm.reporting.figures import FIGURES
from boltlm.reporting.iterations import COT_ACCURACY, LATENT_ACCURACY, RAW_ACCURACY
from boltlm.reporting.plotting import STYLE, Plot, SkippedPlot, save_plot
from boltlm.reporting.results import (
    DAGGER,
    DOUBLE_DAGGER,
    HIGH_FORCED,
    Estimate,
    Metrics,
    Results,
    read_results,
)

MISSING = "–"
ABOUT_DOUBTS = (
    f"{DAGGER}: more than {HIGH_FORCED:.0%} of the draws behind the bound were cut at the limit, so"
    f" it says little; {DOUBLE_DAGGER}: a single cluster, which gives no error"
)
ABOUT_MODELS = (
    "ELBO: importance-weighted bound with the largest of `evaluate.k_samples`; NLL in context:"
    " negative log-likelihood of the same chunks in the same contexts without a latent, in the"
    " model's own format; NLL: that of the whole raw text; all in nats per token on held-out"
    " documents. Thought in plain text: the question is followed by the best of `evaluate.cues`."
    " Right numbers: fraction of sampled latents with the numbers of the data's reference latent,"
    " in order. ESS: effective sample size of the K draws. FLOPs: of the model's training;"
    " history: and of everything that its data needed, from the base model on."
)
ABOUT_LATENTS = (
    "SD of log w: standard deviation within a chunk, averaged over chunks. Distinct: number of"
    " different latents among the K of a chunk."
)
ABOUT_FINETUNED = (
    "Accuracy: mean over questions, samples and seeds ± standard error over clusters of questions;"
    " the next two columns are the standard errors over seeds (independent trainings) and over"
    " samples."
)


def write_report(settings: FigureSettings, *, metrics: Path, out: Path) -> None:
    """Write every figure that has numbers, the CSV of each, and `report.md`, which also names the
    figures that were skipped and says why."""
    results = read_results(settings, metrics)
    experiment = Experiment(settings, results)
    out.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Plot | SkippedPlot] = {}
    for spec in FIGURES:
        with rc_context(dict(STYLE)):
            plots[spec.stem] = spec.draw(experiment)
        save_plot(out, spec.stem, plots[spec.stem])
    for warning in unusable_latents(results):
        print(f"WARNING: {warning}", file=sys.stderr)
    (out / "report.md").write_text(render_report(results, plots), encoding="utf-8")


def render_report(results: Results, plots: Mapping[str, Plot | SkippedPlot]) -> str:
    """The report in Markdown; `plots` by the stem of their files."""
    about_errors = (
        "Written by the stage `figures` from the files in `metrics/`; ± is one standard error,"
        " robust to dependence within clusters of documents and questions"
    )
    blocks = [
        "# Results",
        f"{about_errors}{_cluster_counts(results)}.",
        *(f"**Warning: {warning}**" for warning in unusable_latents(results)),
        "## Models",
        _models(results),
        ABOUT_MODELS,
        *([f"{ABOUT_DOUBTS}."] if _has_doubts(results) else []),
    ]
    if sizes := results.bound_sizes():
        metrics = {f"K = {size}": f"elbo_per_token_k{size}" for size in sizes}
        blocks += ["### ELBO by number of draws K, nats per token", _bounds(results, metrics)]
    if sizes := results.bound_sizes("subset/"):
        metrics = {f"K = {size}": f"subset/elbo_per_token_k{size}" for size in sizes}
        title = "### ELBO on the first documents (`evaluate.large_k`), nats per token"
        blocks += [title, _bounds(results, metrics)]
    if subjects := results.subjects(LATENT_ACCURACY):
        metrics = {key.rpartition("/")[2]: key for key in subjects}
        blocks += ["### Accuracy with latent thought, by subject", _accuracies(results, metrics)]
    if tasks := results.tasks():
        metrics = {task: f"{task}/accuracy" for task in tasks}
        blocks += ["### Accuracy by task", _accuracies(results, metrics)]
    if any(results.finetuning.values()):
        blocks += ["## Fine-tuning", _finetuning(results), ABOUT_FINETUNED]
    if results.diagnostics:
        blocks += ["## Latents", _latents(results), ABOUT_LATENTS]
    blocks.append("## Figures")
    drawn = {stem: plot for stem, plot in plots.items() if isinstance(plot, Plot)}
    for spec in FIGURES:
        if plot := drawn.get(spec.stem):
            caption = f"{spec.title} {spec.errors}".strip()
            if any(row.get("doubtful") for row in plot.rows):
                caption += f" Hollow markers: values in doubt ({ABOUT_DOUBTS})."
            files = f"[{spec.stem}.svg]({spec.stem}.svg), [{spec.stem}.csv]({spec.stem}.csv)"
            blocks.append(f"![{spec.title}]({spec.stem}.png)\n\n{caption} {files}")
    skipped = [
        f"- `{spec.stem}`, {spec.title.rstrip('.')}: {plot.reason}."
        for spec in FIGURES
        if isinstance(plot := plots[spec.stem], SkippedPlot)
    ]
    if skipped:
        blocks += ["## Figures that are not drawn", "\n".join(skipped)]
    return "\n\n".join(blocks) + "\n"


def unusable_latents(results: Results) -> list[str]:
    """What to say of entries of latents most of whose draws do not end by themselves."""
    return [
        f"latents {name}: {metrics['forced_fraction']:.0%} of the draws did not end within"
        " max_latent_tokens and were cut; models that are trained on them learn from cut-off text"
        for name, metrics in results.diagnostics.items()
        if metrics.get("forced_fraction", 0) > UNUSABLE_FRACTION
    ]


def _has_doubts(results: Results) -> bool:
    return any(
        results.doubt(name, metric)
        for name, metrics in results.evaluation.items()
        for metric in metrics
    )


def _models(results: Results) -> str:
    columns: dict[str, Callable[[str], str]] = {
        "ELBO": lambda name: _nats(results, name, "elbo_per_token"),
        "NLL in context": lambda name: _nats(results, name, "nll_in_context_per_token"),
        "NLL": lambda name: _nats(results, name, "nll_per_token"),
        "accuracy, with latent thought": lambda name: _accuracy(results, name, LATENT_ACCURACY),
        "accuracy, thought in plain text": lambda name: _accuracy(results, name, COT_ACCURACY),
        "accuracy, direct answer": lambda name: _accuracy(results, name, RAW_ACCURACY),
        "right numbers": lambda name: _accuracy(results, name, "numbers_match"),
        "ESS": lambda name: _decimal(results.evaluation[name], "ess_mean", 2),
        "FLOPs": lambda name: _flops(results.training.get(name, {}), "training_flops"),
        "FLOPs, history": lambda name: _flops(results.training.get(name, {}), "history_flops"),
    }
    return _table(
        ["model", "description", *columns],
        [
            [arm.name, arm.description, *(cell(arm.name) for cell in columns.values())]
            for arm in ordered_arms(results.arms)
        ],
    )


def _cluster_counts(results: Results) -> str:
    """How many clusters of held-out documents and of questions there are, if that is known."""
    names = {"heldout_clusters": "documents", "questions/standard/raw/clusters": "questions"}
    counts = {
        kind: int(metrics[name])
        for metrics in results.evaluation.values()
        for name, kind in names.items()
        if name in metrics
    }
    listed = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
    return f" ({listed})" if listed else ""


def _bounds(results: Results, metrics: Mapping[str, str]) -> str:
    """`metrics`: the metric of each column."""
    return _table(
        ["model", *metrics],
        [
            [arm.name, *(_nats(results, arm.name, metric) for metric in metrics.values())]
            for arm in ordered_arms(results.arms)
            if any(metric in results.evaluation[arm.name] for metric in metrics.values())
        ],
    )


def _accuracies(results: Results, metrics: Mapping[str, str]) -> str:
    """`metrics`: the metric of each column."""
    return _table(
        ["model", *metrics],
        [
            [arm.name, *(_accuracy(results, arm.name, key) for key in metrics.values())]
            for arm in ordered_arms(results.arms)
            if any(key in results.evaluation[arm.name] for key in metrics.values())
        ],
    )


def _finetuning(results: Results) -> str:
    rows: list[list[str]] = []
    for run, metrics in results.finetuning.items():
        for name in (key for key in metrics if key.endswith("/accuracy")):
            accuracy = Estimate(value=metrics[name], se=metrics.get(f"{name}_se"))
            errors = [_fraction(metrics, f"{name}_se_{over}") for over in ("seeds", "samples")]
            sizes = [_decimal(metrics, key, 0) for key in ("seeds", "samples")]
            rows.append([run, name.removesuffix("/accuracy"), _percent(accuracy), *errors, *sizes])
    head = ["run", "task", "accuracy", "± seeds", "± samples", "seeds", "samples"]
    return _table(head, rows)


def _latents(results: Results) -> str:
    columns: dict[str, Callable[[Metrics], str]] = {
        "chunks": lambda metrics: _decimal(metrics, "chunks", 0),
        "draws": lambda metrics: _decimal(metrics, "samples", 0),
        "ESS": lambda metrics: _decimal(metrics, "ess_mean", 2),
        "largest weight": lambda metrics: _decimal(metrics, "max_weight_mean", 2),
        "SD of log w, nats": lambda metrics: _decimal(metrics, "log_weight_std_mean", 2),
        "distinct": lambda metrics: _decimal(metrics, "distinct_latents_mean", 2),
        "mass masked": lambda metrics: _fraction(metrics, "masked_mass"),
        "ended at the limit": lambda metrics: _fraction(metrics, "forced_fraction"),
        "exact match": lambda metrics: _fraction(metrics, "exact_match"),
        "right numbers": lambda metrics: _fraction(metrics, "numbers_match"),
        "right numbers, selected": lambda metrics: _fraction(metrics, "numbers_match_selected"),
        "tokens per latent": lambda metrics: _decimal(metrics, "latent_tokens_mean", 1),
    }
    return _table(
        ["latents", "sampled by", *columns],
        [
            [name, results.generators[name], *(cell(metrics) for cell in columns.values())]
            for name, metrics in results.diagnostics.items()
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    numeric = [
        all(row[column][:1].isdigit() or row[column][:1] in "−–" for row in rows)
        for column in range(1, len(head))
    ]
    separators = ["---", *("---:" if is_numeric else "---" for is_numeric in numeric)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, separators, *rows])


def _flops(metrics: Metrics, name: str) -> str:
    return f"{metrics[name]:.1e}" if name in metrics else "–"


def _nats(results: Results, model: str, metric: str) -> str:
    estimate = results.estimate(model, metric)
    if estimate is None:
        return MISSING
    error = "" if estimate.se is None else f" ± {estimate.se:.3f}"
    return f"{estimate.value:.3f}{error}{results.doubt(model, metric)}".replace("-", "−")


def _accuracy(results: Results, model: str, metric: str) -> str:
    return f"{_percent(results.estimate(model, metric))}{results.doubt(model, metric)}"


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return MISSING
    error = "" if estimate.se is None else f" ± {estimate.se:.1%}"
    return f"{estimate.value:.1%}{error}"


def _fraction(metrics: Metrics, metric: str) -> str:
    return f"{metrics[metric]:.1%}" if metric in metrics else MISSING


def _decimal(metrics: Metrics, metric: str, digits: int) -> str:
    return f"{metrics[metric]:,.{digits}f}" if metric in metrics else MISSING

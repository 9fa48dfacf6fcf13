"""Figures that compare final models: by K, by the share of raw text, by prompts, fine-tuned."""

import re
from collections.abc import Callable, Mapping, Sequence

from boltlm.reporting.arms import Arm
from boltlm.reporting.experiment import PAPER_TABLE_1, Experiment
from boltlm.reporting.iterations import References, draw_by_number, draw_models, use_log2_axis
from boltlm.reporting.metric_names import TASK_LABELS
from boltlm.reporting.plotting import Plot, SkippedPlot, line_styles
from boltlm.reporting.quantities import (
    Quantity,
    Value,
    accuracies,
    accuracy,
    best_so_far,
    curve_of_arm,
    likelihood,
    of_metric,
    value_of_arm,
)

Drawn = Plot | SkippedPlot


def draw_finetuned(e: Experiment) -> Drawn:
    if not e.settings.finetune_runs:
        return SkippedPlot("no model was fine-tuned (finetune.runs)")
    values: dict[tuple[str, str, str], Value] = {}
    panels: dict[str, dict[str, Quantity]] = {}
    for run, metrics in e.results.finetuning.items():
        for name in metrics:
            if not name.endswith("/accuracy") or name.count("/") != 3:
                continue
            panel = TASK_LABELS.get(name.partition("/")[0], name)
            errors = [metrics.get(f"{name}_se{over}", 0.0) for over in ("", "_seeds")]
            value = Value(metrics[name], max(errors), int(metrics.get("seeds", 1)), name, False)
            panels[panel] = {"fine-tuned": of_metric(name)}
            values[panel, "fine-tuned", e.results.finetune_models[run]] = value
    panels = {task: panels[task] for task in TASK_LABELS.values() if task in panels}
    return draw_models(panels, arms=e.arms, values=values)


def draw_k_samples(e: Experiment) -> Drawn:
    if len(e.chain) < 2:
        return SkippedPlot("the models form no EM chain")
    quantities = [likelihood(), *e.accuracies]
    variants = [arm for arm in e.arms if arm.k_samples]
    points = [
        (float(arm.k_samples or 0), q.label, value)
        for arm in variants
        for q in quantities
        if (value := value_of_arm(e.results, arm, q))
    ]
    families = {"this experiment": points, "collected experiments": _collected(e, quantities)}
    families = {name: found for name, found in families.items() if found}
    ks = sorted({x for found in families.values() for x, _, _ in found})
    if len(ks) < 2:
        return SkippedPlot(
            f"{e.chain[1].name} was trained with one K only: run `dvc exp run -S k_samples=1,2,8"
            f" evaluate@{e.chain[1].name}`, collect it and name it in seeds.collected"
        )
    plot = draw_by_number(quantities, families, "K: latents drawn for each chunk")
    for axes in plot.figure.axes:
        use_log2_axis(axes, ks)
    return plot


def _collected(e: Experiment, quantities: Sequence[Quantity]) -> list[tuple[float, str, Value]]:
    """Values of M_1 in collected experiments that differ by `k_samples` alone."""
    points: list[tuple[float, str, Value]] = []
    for line in e.results.means:
        match = re.fullmatch(r"(?:k_samples=(\d+))?", line["group"])
        if match is None or line["model"] != e.chain[1].name or line["over"] == "trainings":
            continue
        k = float(match[1] or e.settings.k_samples)
        for q in quantities:
            if line["metric"] == q.metrics[0][0] and line["source"] != "experiment":
                error = float(line["se"]) if line["se"] else None
                value = Value(float(line["mean"]), error, int(line["n"]), line["metric"], False)
                points.append((k, q.label, value))
    return points if len({k for k, _, _ in points}) > 1 else []


def draw_bounds(e: Experiment) -> Drawn:
    sizes = e.results.bound_sizes()
    families = {
        f"{arm.name}: {arm.description}": [
            (float(size), likelihood().label, value)
            for size in sizes
            if (value := value_of_arm(e.results, arm, of_metric(f"elbo_per_token_k{size}")))
        ]
        for arm in e.chain
    }
    families = {name: points for name, points in families.items() if points}
    if len(sizes) < 2 or not families:
        return SkippedPlot("no model of an EM chain has bounds of several K (evaluate.k_samples)")
    label = "K: draws for the bound of each chunk"
    all_styles = line_styles(e.results.arms)
    styles = [all_styles[name.partition(":")[0]] for name in families]
    plot = draw_by_number([likelihood()], families, label, styles)
    for axes in plot.figure.axes:
        use_log2_axis(axes, sizes)
    return plot


def draw_mixes(e: Experiment) -> Drawn:
    if not e.mix_families:
        return SkippedPlot("no models differ by their share of raw text alone (mix_raw)")
    families = {
        name: [
            (100 * arm.mix_raw, q.label, value)
            for arm in arms
            for q in e.accuracies
            if (value := value_of_arm(e.results, arm, q))
        ]
        for name, arms in e.mix_families.items()
    }
    if not any(families.values()):
        return SkippedPlot("models with shares of raw text have no accuracy")
    return draw_by_number(e.accuracies, families, "raw documents in the data, %")


def _models(
    e: Experiment, series: Mapping[str, Callable[[Arm, str], Value | None]], **options: References
) -> Drawn:
    """A panel for each task; `series`: the value of a model on a task."""
    tasks = [q.metrics[0][0].partition("/")[0] for q in e.accuracies]
    values = {
        (TASK_LABELS[task], name, arm.name): value
        for task in tasks
        for name, measure in series.items()
        for arm in e.arms
        if (value := measure(arm, task))
    }
    shown = [name for name in series if any(key[1] == name for key in values)]
    panels = {
        TASK_LABELS[task]: {name: accuracy(task, "standard") for name in shown} for task in tasks
    }
    return draw_models(panels, arms=e.arms, values=values, **options)


def draw_table_1(e: Experiment) -> Drawn:
    if e.chain:
        return SkippedPlot("for experiments without an EM chain")

    def best(arm: Arm, task: str) -> Value | None:
        curve = curve_of_arm(e.results, arm, accuracy(task, "standard"))
        return best_so_far(curve, 1)[-1].measured if curve else None

    def in_raw_text(arm: Arm, task: str) -> Value | None:
        metric = of_metric(f"{task}/standard/raw/accuracy")
        return value_of_arm(e.results, arm, metric) if arm.format == "latent" else None

    series = {
        "last model": lambda arm, task: value_of_arm(e.results, arm, accuracy(task, "standard")),
        "best snapshot": best,
        "last model, thought in plain text": in_raw_text,
    }
    known: References = {
        (name, TASK_LABELS[task]): value
        for name, row in (PAPER_TABLE_1 if e.is_papers else {}).items()
        for task, value in zip(("math", "gsm8k", "mmlu_stem"), row, strict=True)
    }
    return _models(e, series, references=known)


def draw_prompts(e: Experiment) -> Drawn:
    known = [accuracies(e.results, prompts) for prompts in ("standard", "synthetic")]
    one, other = ({q.label.partition(",")[0] for q in found} for found in known)
    if not one & other:
        return SkippedPlot("no task was asked with both prompt sets (evaluate.tasks)")
    return _models(
        e,
        {
            prompts: lambda arm, task, p=prompts: value_of_arm(e.results, arm, accuracy(task, p))
            for prompts in ("standard", "synthetic")
        },
    )

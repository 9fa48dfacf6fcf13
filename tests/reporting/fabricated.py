"""Metrics files of any experiment, made up from its params: with the names and the form of those
that the stages write. Later iterations are better, and so are later snapshots, but for a dip."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from boltlm.evaluation.curve_points import CurvePoint, write_curves
from boltlm.reporting.seed_aggregation import seed_groups
from boltlm.reporting.seed_rows import SeedRow, Seeds
from boltlm.reporting.seed_tables import write_means

STEPS = (1000, 2000, 3000, 4000)
DIP = 2  # the index of the snapshot that is worse than the one before
TOKENS_PER_STEP = 400_000
SE = 0.01


def model_metrics(
    params: Mapping[str, Any], name: str, quality: float
) -> Iterator[tuple[str, float]]:
    """The evaluation of a model; `quality` between 0 and 1."""
    evaluate = params["evaluate"]
    entry = {**params["model_defaults"], **params["models"].get(name, {"format": "raw"})}
    for corpus in ("", *(f"{extra}/" for extra in evaluate["extra_corpora"])):
        yield f"{corpus}heldout_clusters", 300
        yield f"{corpus}nll_per_token", 2.5 - quality
        yield f"{corpus}nll_in_context_per_token", 2.4 - quality
        if entry["format"] == "latent":
            for size in evaluate["k_samples"]:
                yield f"{corpus}elbo_per_token_k{size}", -2 + quality + 0.01 * size
            yield f"{corpus}elbo_per_token", -2 + quality + 0.01 * max(evaluate["k_samples"])
            parts = {"utility": -300, "simplicity": -700, "diversity": 650}
            for part, value in parts.items():
                yield f"{corpus}{part}", value * (1 - quality / 20)
                yield f"{corpus}{part}_per_document", 4.4 * value * (1 - quality / 20)
            yield f"{corpus}elbo_k1_per_document", -1590 + 80 * quality
            yield f"{corpus}ess_mean", 3 + quality
            yield f"{corpus}forced_fraction", 0.01
    for task in evaluate["tasks"]:
        if not task.endswith("/latent") or entry["format"] == "latent":
            shift = {"math": 0.0, "gsm8k": 0.05}.get(task.partition("/")[0], 0.1)
            shift += 0.02 * ("synthetic" in task) + 0.05 * task.endswith("/latent")
            yield f"{task}/accuracy", shift + 0.3 * quality
            yield f"{task}/clusters", 500


def with_errors(metrics: Mapping[str, float]) -> dict[str, float]:
    """Every mean with its standard error beside it."""
    counted = ("clusters", "fraction", "ess_mean")
    errors = {
        f"{k}_se": SE * max(abs(v), 0.2) for k, v in metrics.items() if not k.endswith(counted)
    }
    return {**metrics, **errors}


def curve_points(
    params: Mapping[str, Any], name: str, quality: float, start: int
) -> Iterator[CurvePoint]:
    """The points of a curve after `start` steps of ancestors."""
    for index, step in enumerate(STEPS):
        progress = index - 1.5 * (index == DIP)
        metrics = with_errors(dict(model_metrics(params, name, quality + progress / 20)))
        for metric, value in metrics.items():
            if not metric.endswith("_se"):
                yield CurvePoint(
                    step=start + step,
                    tokens=(start + step) * TOKENS_PER_STEP,
                    raw_tokens=(start + step) * TOKENS_PER_STEP // 3,
                    metric=metric,
                    value=value,
                    se=metrics.get(f"{metric}_se"),
                )


def fabricate(params: Mapping[str, Any], root: Path) -> None:
    """Write root/metrics."""
    metrics = root / "metrics"
    for folder in ("eval", "train", "latents", "finetune", "curves", "seeds"):
        (metrics / folder).mkdir(parents=True)
    start = {"base": 0}
    for index, name in enumerate([*params["models"], "base"]):
        quality = min(0.1 + 0.08 * index, 0.95) if name != "base" else 0.02
        values = with_errors(dict(model_metrics(params, name, quality)))
        (metrics / "eval" / f"{name}.json").write_text(json.dumps(values))
        lines = [f"{s},{s * TOKENS_PER_STEP},{3 - s / 5000 - quality},1e-4,1," for s in STEPS]
        text = "\n".join(["step,tokens,loss,lr,grad_norm,val_nll", *lines])
        (metrics / "train" / f"{name}.csv").write_text(text + "\n")
        parent = params["models"].get(name, {}).get("parent", "base")
        if name in params["curves"]:
            points = list(curve_points(params, name, quality, start.get(parent, 0)))
            write_curves(metrics / "curves" / f"{name}.csv", points)
            start[name] = start.get(parent, 0) + STEPS[-1]
    for index, name in enumerate(params["latents"]):
        diagnostics = {"chunks": 100, "samples": 400, "ess_mean": 2.5, "forced_fraction": 0.01}
        (metrics / "latents" / f"{name}.json").write_text(json.dumps(diagnostics))
        bins = [(low / 2 - 300, low / 2 - 299.5, 1 + (low * 7 + index) % 11) for low in range(1200)]
        text = "\n".join(["from_nats,to_nats,count", *(f"{a},{b},{c}" for a, b, c in bins)])
        (metrics / "latents" / f"{name}.csv").write_text(text + "\n")
    for index, (run, entry) in enumerate(params["finetune"]["runs"].items()):
        key = f"{entry['task']}/standard/{entry['space']}/accuracy"
        tuned = {key: 0.2 + index / 50, f"{key}_se": 0.01, f"{key}_se_seeds": 0.02, "seeds": 5}
        (metrics / "finetune" / f"{run}.json").write_text(json.dumps(tuned))


def fabricate_means(params: Mapping[str, Any], root: Path, model: str) -> None:
    """Means over two seeds of experiments with K = 1, 2 and 8 and with the default K, whose bounds
    rise with log2 K, and over three seeds of every model of the EM chain."""
    rows = [
        SeedRow(
            group=f"k_samples={k}" if k != params["k_samples"] else "",
            model=model,
            seeds=Seeds(1, seed, seed),
            metrics={
                "elbo_per_token": -1 + 0.1 * k.bit_length() + 0.01 * seed,
                "math/standard/latent/accuracy": 0.1 + 0.02 * k.bit_length() + 0.01 * seed,
            },
        )
        for k in (1, 2, params["k_samples"], 8)
        for seed in (1, 2, 3)
    ]
    rows += [
        SeedRow(
            group="",
            model="warmstart",
            seeds=Seeds(1, seed, seed),
            metrics={"elbo_per_token": -1.5 + 0.02 * seed, "math/standard/latent/accuracy": 0.1},
        )
        for seed in (1, 2, 3)
    ]
    path = root / "metrics" / "seeds" / "means.csv"
    write_means(path, seed_groups("collected", rows), "warmstart")

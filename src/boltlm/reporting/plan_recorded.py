"""The figures that the finished stages of an experiment have recorded, beside their plan."""

import json
from collections import Counter
from pathlib import Path

from boltlm.reporting.arms import ReportSettings
from boltlm.reporting.plan import StagePlan
from boltlm.reporting.results import Metrics, read_results


def recorded_stages(settings: ReportSettings, metrics: Path, timings: Path) -> dict[str, StagePlan]:
    """The recorded figures of each stage that has any: from the folders of metrics and of
    wall-clock figures."""
    results = read_results(settings, metrics, timings)
    stages = _recorded_split(_numbers(metrics / "split.json"))
    for name in settings.teachers:
        if numbers := _numbers(metrics / "teacher" / f"{name}.json"):
            stages[f"teacher@{name}"] = StagePlan(
                stage=f"teacher@{name}",
                chunks=_whole(numbers.get("chunks")),
                latent_tokens=_whole(numbers.get("latent_tokens")),
                requests=_whole(numbers.get("requests")),
                usd=numbers.get("cost_usd"),
            )
    for name, curve in results.curves.items():
        if curve:
            stage = f"train@{name}" if name in settings.models else name
            totals, times = results.training[name], results.timings.get(name) or [{}]
            stages[stage] = StagePlan(
                stage=stage,
                training_tokens=_whole(totals.get("training_tokens", curve[-1].get("tokens"))),
                steps=_whole(curve[-1]["step"]),
                flops=totals.get("training_flops"),
                seconds=times[-1].get("seconds"),
            )
    for name, numbers in results.diagnostics.items():
        if numbers:
            drawn = numbers.get("latent_tokens_mean", 0) * numbers.get("samples", 0)
            times = results.timings.get(f"latents/{name}") or [{}]
            stages[f"latents@{name}"] = StagePlan(
                stage=f"latents@{name}",
                chunks=_whole(numbers.get("chunks")),
                latent_tokens=round(drawn),
                flops=numbers.get("estep_flops"),
                seconds=times[-1].get("seconds"),
            )
    return stages


def _recorded_split(numbers: Metrics) -> dict[str, StagePlan]:
    """The sums over the corpora; `contamination/…` has further keys that end in the same way."""
    if not numbers:
        return {}
    sums = Counter[str]()
    for key, value in numbers.items():
        _, _, what = key.partition("/")
        sums[what] += int(value)
    split = StagePlan(
        stage="split",
        documents=sums["documents"],
        chunks=sums["chunks"],
        raw_tokens=sums["tokens"],
    )
    return {split.stage: split}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _numbers(path: Path) -> Metrics:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

"""What an experiment found, in five sentences with their numbers, and what speaks against it."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from scipy.special import stdtrit

from boltlm.errors import UserError
from boltlm.evaluation.compare import PairedDifference, paired_differences
from boltlm.reporting.arms import Arm, control_arms, em_chain
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.iterations import LATENT_ACCURACY
from boltlm.reporting.results import Metrics, Results

LOW_ESS_FRACTION = 0.5  # of the candidates of a chunk; below it, few draws have all the weight
HIGH_FRACTION = 0.05  # of draws or answers that are unusable
FEW_SEEDS = 3
MINUS = "−"


class _Measure(NamedTuple):
    """A metric of one model: its name in metrics/eval, its value and error so that larger is
    better."""

    name: str
    value: float
    se: float


class Summary:
    """Sentences on the results in `metrics/`. `evaluations`: the folder data/evaluate, whose tables
    give paired differences; where it is missing, errors are those of independent models."""

    def __init__(self, settings: HtmlReportSettings, results: Results, evaluations: Path) -> None:
        self.settings, self.results, self.evaluations = settings, results, evaluations
        self.pairs: dict[tuple[str, str], Mapping[str, PairedDifference]] = {}

    def sentences(self) -> list[str]:
        """Five sentences: what was measured, and four comparisons."""
        chain = [arm.name for arm in em_chain(self.results.arms)]
        measured = [name for name in chain if self._likelihood(name)]
        if len(measured) > 1:
            first, before, last = measured[0], measured[-2], measured[-1]
            controls = self._ranked(control_arms(self.results.arms))
            return [
                self._setting(chain),
                self._compare_likelihood(last, first),
                self._compare_likelihood(last, before)
                if before != first
                else "There is one iteration, so no later one to compare with the first.",
                self._compare_accuracy(last, first),
                self._compare_likelihood(last, controls[0], "the best model outside the chain")
                if controls
                else "No model outside the chain was measured.",
            ]
        best, *others = [*self._ranked(self.results.arms), "", ""][:3]
        if not others[0]:
            return [self._setting(chain), "Fewer than two models have a likelihood to compare."]
        return [
            self._setting(chain),
            self._compare_likelihood(best, others[0], "the second best model"),
            self._compare_likelihood(best, others[1], "the third best model")
            if others[1]
            else "No further model was measured.",
            self._compare_accuracy(best, others[0]),
            "Without an EM chain there are no iterations to compare.",
        ]

    def _setting(self, chain: Sequence[str]) -> str:
        settings = self.settings
        heldout = max((m.get("heldout_documents", 0) for m in self._evaluated), default=0)
        measured = (
            f"{len(self._evaluated)} models were measured on {heldout:.0f} held-out documents"
        )
        if len(chain) > 1:
            return (
                f"The EM chain {' → '.join(chain)} has {len(chain) - 1}"
                f" iteration{'s' if len(chain) > 2 else ''} with K = {settings.k_samples} draws a"
                f" chunk; {measured}, with the seed {settings.seed}."
            )
        return f"No model is trained on latents that another one drew; {measured}."

    @cached_property
    def _evaluated(self) -> list[Metrics]:
        return [metrics for metrics in self.results.evaluation.values() if metrics]

    def _ranked(self, arms: Sequence[Arm]) -> list[str]:
        """The names of the models that have a likelihood, the best first."""
        measures = {arm.name: self._likelihood(arm.name) for arm in arms}
        known = {name: measure for name, measure in measures.items() if measure}
        return sorted(known, key=lambda name: -known[name].value)

    def _likelihood(self, model: str) -> _Measure | None:
        """The bound with the largest K; for a model without latents, the exact log-likelihood of
        the same chunks."""
        sizes = self.results.bound_sizes()
        if sizes and (bound := self._measure(model, f"elbo_per_token_k{sizes[-1]}")):
            return bound
        exact = self._measure(model, "nll_in_context_per_token")
        return exact and exact._replace(value=-exact.value)

    def _measure(self, model: str, metric: str) -> _Measure | None:
        estimate = self.results.estimate(model, metric)
        if estimate is None:
            return None
        return _Measure(metric, estimate.value, math.nan if estimate.se is None else estimate.se)

    def _compare_likelihood(self, one: str, other: str, role: str = "") -> str:
        measures = [m for model in (one, other) if (m := self._likelihood(model))]
        names = [measure.name for measure in measures]
        sign = -1 if names == ["nll_in_context_per_token"] * 2 else 1
        key = names[0]
        if names[0] != names[1]:  # the one comparison of a bound with an exact value
            sides = " − ".join(name.replace("context_per_token", "context") for name in names)
            key = f"best_bound_per_token [{sides}]"
        kind = "ELBO" if names[0].startswith("elbo") else "log-likelihood"
        what = f"The held-out {kind} in nats per token"
        difference = self._difference((one, other), (measures[0], measures[1]), key, sign)
        values = [f"{measure.value:.3f}".replace("-", MINUS) for measure in measures]
        return _sentence(what, (one, other), role, values, difference)

    def _compare_accuracy(self, one: str, other: str) -> str:
        """With a latent thought, on the held-out questions or else on the first other task."""
        tasks = [f"{task}/accuracy" for task in self.results.tasks()]
        for metric in (LATENT_ACCURACY, *tasks):
            first, second = (self._measure(model, metric) for model in (one, other))
            if first and second:
                difference = self._difference((one, other), (first, second), metric, 1)
                values = [f"{measure.value:.1%}" for measure in (first, second)]
                what = f"The accuracy on {metric.removesuffix('/accuracy')}"
                return _sentence(what, (one, other), "", values, difference, percent=True)
        return f"No task was measured for both {one} and {other}."

    def _difference(
        self, models: tuple[str, str], measures: tuple[_Measure, _Measure], key: str, sign: int
    ) -> PairedDifference:
        """The paired difference where both models' tables have it, else that of the two values with
        the error of independent ones, whose number of pairs is 0."""
        if models not in self.pairs:
            folders = [self.evaluations / model for model in models]
            self.pairs[models] = {}
            if all(folder.is_dir() for folder in folders):
                try:
                    corpus = self.settings.evaluate.corpus
                    self.pairs[models] = paired_differences(folders[0], folders[1], corpus)
                except UserError as error:  # the sentence then says "not paired"
                    print(f"no paired comparison: {error}")
        if key in self.pairs[models]:
            paired = self.pairs[models][key]
            return paired._replace(value=sign * paired.value)
        one, other = measures
        clusters = int(self.results.evaluation[models[0]].get("heldout_clusters", 0))
        error = math.hypot(one.se, other.se)
        return PairedDifference(one.value - other.value, error, 0, clusters)


def _sentence(
    what: str,
    models: tuple[str, str],
    role: str,
    values: Sequence[str],
    difference: PairedDifference,
    percent: bool = False,
) -> str:
    """One comparison with the 95 % interval of the difference (t distribution over clusters)."""
    value, error, pairs, clusters = difference
    scale, digits, unit = (100, ".1f", " percentage points") if percent else (1, ".3f", "")
    text = (
        f"{what} of {models[0]} is {values[0]}, {abs(scale * value):{digits}}{unit}"
        f" {'above' if value >= 0 else 'below'} that of {models[1]}{f', {role}' if role else ''}"
        f" ({values[1]})"
    )
    if math.isnan(error) or clusters < 2:
        return f"{text}; the difference has no standard error."
    half = float(stdtrit(clusters - 1, 0.975)) * error
    low, high = (f"{scale * edge:+{digits}}" for edge in (value - half, value + half))
    kind = f"paired over {clusters} clusters" if pairs else "not paired"
    verdict = "significant" if abs(value) > half else "not significant"
    interval = f"{low} to {high}".replace("-", MINUS)
    return f"{text}; 95 % interval of the difference {interval}, {kind}: {verdict}."


def find_warnings(settings: HtmlReportSettings, results: Results, metrics: Path) -> list[str]:
    """What a reader must know before believing the numbers; empty if nothing was noticed."""
    return [
        *_seed_warnings(settings),
        *_latents_warnings(results),
        *_evaluation_warnings(results),
        *_data_warnings(settings, metrics),
    ]


def _seed_warnings(settings: HtmlReportSettings) -> list[str]:
    seeds = {settings.seed if m.seed is None else m.seed for m in settings.models.values()}
    if len(seeds) >= FEW_SEEDS:
        return []
    listed = ", ".join(map(str, sorted(seeds)))
    text = f"Few seeds: trainings have the seed {listed} only. Intervals cover documents and"
    return [f"{text} questions, not seeds; boltlm seeds aggregates experiments."]


def _latents_warnings(results: Results) -> list[str]:
    warnings: list[str] = []
    for name, metrics in results.diagnostics.items():
        if not metrics:
            warnings.append(f"latents {name}: no metrics; run dvc repro latents@{name}.")
            continue
        ess = metrics.get("ess_mean", math.inf)
        size = metrics.get("candidates", 0) / max(metrics.get("chunks", 0), 1)
        if ess < LOW_ESS_FRACTION * size:
            warnings.append(
                f"latents {name}: low effective sample size, {ess:.2f} of {size:.0f} on average;"
                " few draws have nearly all the weight."
            )
        if (forced := metrics.get("forced_fraction", 0)) > HIGH_FRACTION:
            warnings.append(f"latents {name}: {forced:.1%} of the draws were cut at the limit.")
        if (masked := metrics.get("masked_mass", 0)) > HIGH_FRACTION:
            warnings.append(
                f"latents {name}: the model gives draws that are ruled out a probability of"
                f" {masked:.1%}."
            )
    return warnings


def _evaluation_warnings(results: Results) -> list[str]:
    tuned = {f"finetune {run}": metrics for run, metrics in results.finetuning.items()}
    warnings: list[str] = []
    for name, metrics in {**results.evaluation, **tuned}.items():
        if not metrics:
            warnings.append(f"{name}: not measured.")
        for key, value in metrics.items():
            task, _, measure = key.rpartition("/")
            if measure == "invalid_fraction" and value > HIGH_FRACTION:
                warnings.append(f"{name}: {value:.1%} of the answers of {task} are invalid.")
            elif measure == "lost_shots_fraction" and value > 0:
                warnings.append(f"{name}: {value:.1%} of the prompts of {task} lost shots.")
            elif measure in ("dropped_too_long", "documents_without_thought") and value > 0:
                warnings.append(f"{name}: {value:.0f} examples left out ({measure}).")
    return warnings


def _data_warnings(settings: HtmlReportSettings, metrics: Path) -> list[str]:
    warnings: list[str] = []
    split = read_numbers(metrics / "split.json")
    is_dropped = any(key.endswith("/dropped_contaminated") for key in split)
    for key, value in split.items():
        if key.endswith("/overlapping_items") and value > 0 and not is_dropped:
            measured = key.split("/")[1]
            total = split.get(f"contamination/{measured}/items", 0)
            warnings.append(
                f"Contamination: {value:.0f} of {total:.0f} items of {measured} share an n-gram"
                " with training documents."
            )
    if split.get("cut_chunks", 0) > 0:
        warnings.append(f"{split['cut_chunks']:.0f} chunks were cut to fit the context window.")
    for name in used_teachers(settings):
        counts = read_numbers(metrics / "teacher" / f"{name}.json")
        missing = counts.get("chunks", 0) - counts.get("latents", 0)
        if "latents" in counts and missing > 0:
            warnings.append(f"teacher {name}: {missing:.0f} chunks have no latent.")
    return warnings


def used_teachers(settings: HtmlReportSettings) -> list[str]:
    """The entries of `teachers` whose output models or fine-tuning runs are trained on."""
    sources = [entry.data for entry in settings.models.values()]
    sources += [run.data for run in settings.finetune_runs.values()]
    parts = (source.partition("/") for source in sources)
    return list(dict.fromkeys(name for folder, _, name in parts if folder == "teacher"))


def read_numbers(path: Path) -> Metrics:
    """The numbers in a metrics file; none where it does not exist."""
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if isinstance(value, int | float)}

"""The declared schema of the metrics: what each name in `metrics/` means, its unit, and which
direction is better (docs/evaluation.md). Figures take their axis labels from it, tables their
units."""

import re
from typing import NamedTuple

from boltlm.evaluation.curve_points import metric_direction

NATS_TOKEN, NATS_CHUNK, NATS_DOCUMENT = "nats per token", "nats per chunk", "nats per document"
FRACTION = "fraction"
TASK_LABELS = {
    "math": "MATH",
    "gsm8k": "GSM8K",
    "mmlu_stem": "MMLU-STEM",
    "questions": "held-out questions",
}
# By the last part of a name, without `_selected` and without the K of a bound.
_MEANINGS = {
    "elbo_per_token": ("ELBO", NATS_TOKEN),
    "elbo_k1_per_document": ("ELBO (K = 1)", NATS_DOCUMENT),
    "nll_per_token": ("NLL of raw text", NATS_TOKEN),
    "nll_in_context_per_token": ("NLL in context", NATS_TOKEN),
    "bound_per_token": ("ELBO on the training chunks", NATS_TOKEN),
    "val_nll_per_token": ("validation NLL of fine-tuning", NATS_TOKEN),
    "ceiling_per_token": ("log p of the generator", NATS_TOKEN),
    "utility": ("utility, E[log p(X | Z)]", NATS_CHUNK),
    "simplicity": ("simplicity, E[log p(Z)]", NATS_CHUNK),
    "diversity": ("diversity, E[−log q(Z)]", NATS_CHUNK),
    "utility_per_document": ("utility, E[log p(X | Z)]", NATS_DOCUMENT),
    "simplicity_per_document": ("simplicity, E[log p(Z)]", NATS_DOCUMENT),
    "diversity_per_document": ("diversity, E[−log q(Z)]", NATS_DOCUMENT),
    "ess_mean": ("effective sample size", "draws"),
    "max_weight_mean": ("largest weight", FRACTION),
    "log_weight_std_mean": ("SD of log w in a chunk", "nats"),
    "distinct_latents_mean": ("distinct latents of a chunk", "latents"),
    "latent_tokens_mean": ("length of a latent", "tokens"),
    "masked_mass": ("masked probability", FRACTION),
    "forced_fraction": ("draws cut at the limit", FRACTION),
    "exact_match": ("latents like the reference", FRACTION),
    "numbers_match": ("right numbers in a latent", FRACTION),
    "invalid_fraction": ("answers without a thought's end", FRACTION),
    "lost_shots_fraction": ("prompts that lost shots", FRACTION),
}


class MetricInfo(NamedTuple):
    """What a metric is called on an axis, its unit (empty for a pure number), and 1 if more of it
    is better, −1 if less is, 0 if it is neither."""

    label: str
    unit: str
    direction: int


def describe_metric(name: str) -> MetricInfo:
    """The meaning of any metric of a metrics file. One that the schema does not have keeps its name
    and has no unit."""
    direction = metric_direction(name)
    prefix, _, last = name.rpartition("/")
    if last == "accuracy" or "/accuracy_by_" in name:
        return MetricInfo(_accuracy_label(name), FRACTION, direction)
    bound = re.fullmatch(r"(elbo_per_token)_k(\d+)", last)
    stem = bound[1] if bound else last.removesuffix("_selected")
    if stem not in _MEANINGS:
        return MetricInfo(name, "", direction)
    label, unit = _MEANINGS[stem]
    if bound:
        label += f" (K = {bound[2]})"
    if last.endswith("_selected"):
        label += ", selected"
    if prefix:
        label += f" on {prefix}"
    return MetricInfo(label, unit, direction)


def _accuracy_label(name: str) -> str:
    task, *setting = name.removesuffix("/accuracy").split("/")
    label = TASK_LABELS.get(task, task)
    return f"{label} accuracy ({', '.join(setting)})" if setting else f"{label} accuracy"

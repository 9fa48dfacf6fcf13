"""A small experiment for the tests of this package: its params, settings and metrics files."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from boltlm.params import build_settings, load
from boltlm.reporting.experiment import FigureSettings
from tests.tiny import ROOT, latents_entry

CORPORA = ("some", "all", "em")
COPIED = ("k_samples", "base", "corpus", "train", "model_defaults", "estep")  # from params.yaml


def model(data: str, sequence_format: str = "latent", parent: str = "base") -> dict[str, Any]:
    """An entry of `models`."""
    return {
        "parent": parent,
        "corpus": "em",
        "data": data,
        "format": sequence_format,
        "mix_corpus": "em",
    }


def finetune_run(model_name: str) -> dict[str, Any]:
    """An entry of `finetune.runs`."""
    return {
        "model": model_name,
        "corpus": "em",
        "data": "split/em",
        "task": "questions",
        "space": "latent",
    }


def report_params(
    models: Mapping[str, Any], latents: Mapping[str, str], runs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Params of these models; `latents`: the model that sampled each entry of `latents`."""
    return {
        "corpora": {name: {"documents": 1, "source": {}} for name in (*CORPORA, "heldout")},
        "teachers": {name: {"kind": "dataset", "corpus": name} for name in ("some", "all")},
        **{key: load(ROOT / "params.yaml")[key] for key in COPIED},
        "latents": {name: latents_entry(by) for name, by in latents.items()},
        "models": dict(models),
        "evaluate": load(ROOT / "params.yaml")["evaluate"],
        "curves": {},
        "finetune": {"runs": dict(runs or {})},
    }


def report_settings(params: Mapping[str, Any]) -> FigureSettings:
    return build_settings(FigureSettings, params)


def chain_params(chain: Sequence[str]) -> dict[str, Any]:
    """Params of an EM chain of these models, with controls listed before it and after it."""
    latents = {"fixed": chain[0]} | {f"by_{name}": name for name in chain[:-1]}
    models = {
        "plain": model(f"latents/by_{chain[0]}", "raw"),
        "mix": model(f"latents/by_{chain[0]}", "mixed"),
        "taught": model("teacher/all"),
        chain[0]: model("teacher/some"),
        **{student: model(f"latents/by_{sampler}") for sampler, student in pairwise(chain)},
        "frozen_em": model("latents/fixed"),
    }
    runs = {"tuned": finetune_run(chain[0]), "absent": finetune_run(chain[0])}
    return report_params(models, latents, runs)


def evaluation_metrics(index: int, *, raw: bool) -> dict[str, float | None]:
    """The evaluation of the model with this index in params; those of raw text have no bound."""
    metrics: dict[str, float | None] = {
        "nll_per_token": 1.5 - index / 64,
        "nll_per_token_se": 0.01,
        "nll_in_context_per_token": 1.25 - index / 64,
        "nll_in_context_per_token_se": 0.01,
        "heldout_clusters": 44,
        "questions/standard/raw/accuracy": 0.1 + index / 64,
        "questions/standard/raw/accuracy_se": 0.01,
        "questions/standard/raw/clusters": 43,
    }
    if not raw:
        names = "elbo_per_token_k1 elbo_per_token_k4 elbo_per_token utility simplicity diversity"
        for offset, name in enumerate(names.split()):
            metrics |= {name: -2 - offset + index / 8, f"{name}_se": 0.02}
        metrics |= {
            "questions/standard/latent/accuracy": 0.3 + index / 32,
            "numbers_match": index / 16,
            "math/synthetic/latent/accuracy": 0.1 + index / 64,
        }
        metrics |= {"numbers_match_selected": index / 12, "latent_tokens_mean": 20.0 + index}
        metrics |= {"ess_mean": 2 + index / 8, "masked_mass": 0.0, "ess_p10": None}
        metrics |= {"distinct_latents_mean": 1 + index / 8}
        for size in (4, 64):
            metrics |= {f"subset/elbo_per_token_k{size}": -5 + index / 8 + size / 64}
    return metrics


def histogram(index: int) -> list[tuple[int, int]]:
    """Bins of half a nat and their counts: one draw far below all others, and 1400 between −30 and
    −10 nats."""
    return [(-2000, 1), *((low + index, 35) for low in range(-60, -20))]


def write_metrics(params: dict[str, Any], root: Path) -> None:
    """Metrics files under `root / "metrics"` as the stages write them; the masked mass is 1/8."""
    for folder in ("eval", "finetune", "latents", "train"):
        (root / "metrics" / folder).mkdir(parents=True)
    tuned = {"gsm8k/standard/latent/accuracy": 0.25, "gsm8k/standard/latent/accuracy_se": 0.02}
    tuned |= {"gsm8k/standard/latent/accuracy_se_seeds": 0.03, "seeds": 5, "samples": 16}
    (root / "metrics/finetune/tuned.json").write_text(json.dumps(tuned))
    for index, (name, entry) in enumerate(params["models"].items()):
        metrics = evaluation_metrics(index, raw=entry["format"] == "raw")
        (root / "metrics/eval" / f"{name}.json").write_text(json.dumps(metrics))
        bound = "" if entry["format"] == "raw" else str(-3 - index)
        validation = {1: "2.5,", 2: ",", 3: f"{2.75 - index},{bound}"}
        lines = [f"{s},{s * 100},{5 / s + index},0.1,1,{validation[s]}" for s in (1, 2, 3)]
        head = "step,tokens,loss,lr,grad_norm,val_nll,val_elbo"
        text = "\n".join([head, *lines])
        (root / "metrics/train" / f"{name}.csv").write_text(text + "\n")
    for index, name in enumerate(params["latents"]):
        diagnostics = {
            "ess_mean": 2.5,
            "samples": 1600,
            "masked_mass": 0.125,
            "numbers_match": None,
        }
        (root / "metrics/latents" / f"{name}.json").write_text(json.dumps(diagnostics))
        lines = [f"{low / 2},{low / 2 + 0.5},{count}" for low, count in histogram(index)]
        text = "\n".join(["from_nats,to_nats,count", *lines])
        (root / "metrics/latents" / f"{name}.csv").write_text(text + "\n")

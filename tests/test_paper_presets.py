"""The presets of the paper's experiments, compared with tests/paper.yaml."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from boltlm.corpus.benchmarks import read_benchmark
from boltlm.corpus.chunks import ChunkingConfig, chunk_length_distribution
from boltlm.corpus.split import SplitSettings, stream_corpora
from boltlm.evaluation.fewshot import PROMPT_FORMS
from boltlm.evaluation.task_spec import TaskName, TaskSpec
from boltlm.param_values import build
from boltlm.params import build_settings, flatten_params, load
from boltlm.preflight.check import params_findings
from tests import tiny
from tests.shrink import QUESTIONS, SHRUNK, shrunk, write_data

PAPER: dict[str, Any] = yaml.safe_load((tiny.ROOT / "tests" / "paper.yaml").read_text("utf-8"))
PRESETS = [name for name in PAPER if name.startswith("paper-")]
# Sections with an entry for each arm, teacher or run: the paper's, and no other.
ENTRIES = ("teachers", "latents", "models", "curves", "finetune.runs")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, nested mappings key by key."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else copy.deepcopy(value)
    return result


def flattened(params: Mapping[str, Any]) -> dict[str, str]:
    """Values by dotted key, with the sections `model_defaults` and `train` as each model has them,
    and a key for each entry of a section."""
    models: dict[str, Any] = {}
    for name, entry in params["models"].items():
        whole = merged(params.get("model_defaults", {}), entry)
        models[name] = merged(whole, {"train": merged(params["train"], whole.get("train", {}))})
    flat = flatten_params({**params, "models": models})
    for section in ENTRIES:
        flat |= {f"{section}.{name}": "present" for name in entries(params, section)}
    return flat


def entries(params: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """The entries of a section, none where it is missing."""
    for key in section.split("."):
        params = params.get(key, {})
    return params


def derived(params: Mapping[str, Any], text: str) -> dict[str, Any]:
    """What a preset says in several keys, in its comments or by way of the code."""
    chunking = build(ChunkingConfig, params["chunks"], "chunks")
    law, lengths = chunk_length_distribution(chunking), np.arange(1, chunking.max_sentences)
    is_poisson = np.allclose(law[1:] / law[:-1], chunking.mean_sentences / (lengths + 1))
    sections = params["evaluate"], params["finetune"]
    limits = [section["max_thought_tokens"] + section["max_answer_tokens"] for section in sections]
    tasks: set[TaskName] = {TaskSpec.parse(task).task for task in params["evaluate"]["tasks"]}
    header, _, body = text.partition("\nseed:")
    seeds, ks, upstream = (
        re.search(rf"-S {key}=([\d,]+)", part)
        for key, part in (("seed", header), ("k_samples", header), ("seed", body))
    )
    (processes,) = re.findall(r"--num_processes (\d+)", params["launcher"])
    samples = params["finetune"]["samples"]
    return {
        "chunk_law": "Poisson in the range" if is_poisson else "another",
        "completion_tokens": limits[0],
        "finetune_completion_tokens": limits[1],
        "finetune_samples": {r["task"]: samples for r in params["finetune"]["runs"].values()},
        "finetune_thoughts": "/".join(
            sorted({r["data"].split("/")[0] for r in params["finetune"]["runs"].values()})
        ),
        "shots": {task: PROMPT_FORMS[task].num_shots for task in tasks},
        "num_processes": int(processes),
        "seeds": len(seeds[1].split(",")) if seeds else 1,
        "upstream_seeds": len(upstream[1].split(",")) if upstream else 1,
        "k_samples": sorted([params["k_samples"], *(map(int, ks[1].split(",")) if ks else ())]),
    }


def preset_values(name: str) -> dict[str, str]:
    path = tiny.ROOT / "presets" / f"{name}.yaml"
    params = load(path)
    return flattened({**params, "derived": derived(params, path.read_text("utf-8"))})


def paper_values(name: str) -> dict[str, str]:
    experiment = merged(PAPER["common"], PAPER[name])
    return flattened({**experiment["values"], "derived": experiment["derived"]})


def unexplained(
    preset: Mapping[str, str], paper: Mapping[str, str], differences: Mapping[str, Any]
) -> set[str]:
    """The keys in which a preset differs from the paper and from the listed differences, and the
    listed ones in which it does not differ as they say."""
    keys = {*paper, *(key for key in preset if preset[key] == "present")}
    found = {key: preset.get(key, "missing") for key in keys if preset.get(key) != paper.get(key)}
    listed = flatten_params({key: entry["preset"] for key, entry in differences.items()})
    return {key for key in found.keys() | listed.keys() if found.get(key) != listed.get(key)}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_papers_experiment(name: str) -> None:
    """Optimiser, schedule, batch, lengths, arms, budgets, teachers, E-step, evaluation,
    fine-tuning, seeds: each value is the paper's, or listed with the reason why it is not."""
    differences = PAPER[name]["differences"]
    assert unexplained(preset_values(name), paper_values(name), differences) == set()
    assert all(len(difference["reason"]) > 20 for difference in differences.values())


@pytest.mark.parametrize("name", PRESETS)
def test_corpora_have_the_papers_sizes(name: str) -> None:
    """In tokens, within one per cent; those of one source are together no more documents than there
    are."""
    params = load(tiny.ROOT / "presets" / f"{name}.yaml")
    sizes = {key: corpus["documents"] for key, corpus in params["corpora"].items()}
    raw_tokens, own = PAPER[name]["raw_tokens"], PAPER[name].get("own_sources", [])
    shared = {key for key, corpus in params["corpora"].items() if not corpus["source"]}
    assert shared == {"base", "heldout", *raw_tokens} - set(own)
    for corpus, tokens in raw_tokens.items():
        assert abs(sizes[corpus] * PAPER["tokens_per_document"] / tokens - 1) < 0.01, corpus
    assert sum(sizes[corpus] for corpus in shared) < PAPER["documents"]


def test_the_table_is_about_every_paper_preset() -> None:
    """A new preset of the paper gets its facts."""
    assert {path.stem for path in (tiny.ROOT / "presets").glob("paper-*.yaml")} == set(PRESETS)
    for name in PRESETS:
        assert len(paper_values(name)) > 150


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("train.learning_rate", "0.0002"),  # a value of the paper
        ("models.warmstart.train.batch_size", "192"),  # as the section `train` has it
        ("models.raw_flops.budget.amount", "3"),  # a listed difference
        ("models.raw_history", None),  # a listed difference that is gone
        ("models.em5", "present"),  # an arm that the paper does not have
        ("finetune.runs.math_em4.space", "raw"),
        ("curves.raw_flops", None),  # an entry that is gone
        ("models.em4.train.snapshots.every", "5000"),
        ("derived.seeds", "3"),
    ],
)
def test_a_changed_preset_is_noticed(changed: str, value: str | None) -> None:
    """Each change of the preset, and no other key, is reported."""
    name = "paper-fixed"
    preset: dict[str, str | None] = {**preset_values(name), changed: value}
    known = {key: text for key, text in preset.items() if text is not None}
    assert unexplained(known, paper_values(name), PAPER[name]["differences"]) == {changed}


@pytest.mark.parametrize("name", PRESETS)
def test_a_shrunken_preset_is_the_same_graph(name: str, tmp_path: Path) -> None:
    """Every stage has valid settings; only sizes and sources differ from the preset, and the files
    suffice for its corpora."""
    params = load(tiny.ROOT / "presets" / f"{name}.yaml")
    write_data(tmp_path / "data")
    small = shrunk(params, tmp_path / "data", "http://127.0.0.1:1/v1")
    assert list(params_findings(small)) == []
    before, after = flatten_params(params), flatten_params(small)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    sizes = r"corpora\.\w+\.(documents|source.*)|models\.\w+\.(budget\.amount|train\.batch_size)"
    others = r"(base|corpus|benchmarks)\..*|inputs.*"
    others += r"|teachers\.\w+\.(base_url|api_key_env|poll_interval_seconds|source\..*)"
    assert all(key in SHRUNK or re.fullmatch(f"{sizes}|{others}", key) for key in changed)
    assert "hub" not in re.findall(r"kind: (\w+)", yaml.safe_dump(small))
    settings = build_settings(SplitSettings, small)
    names = [corpus for corpus in small["corpora"] if corpus != "base"]
    sizes_read = {corpus: len(list(docs)) for corpus, docs in stream_corpora(settings, names)}
    assert sizes_read == {corpus: small["corpora"][corpus]["documents"] for corpus in names}
    for benchmark, path in settings.benchmarks.items():
        assert len(list(read_benchmark(benchmark, path))) == QUESTIONS

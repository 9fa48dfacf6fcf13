"""Evaluation against its alternatives: a GSM8K run against lm-eval's own command line, and the
bound against scoring each sample by itself.

    python benchmarks/evaluate.py --model models/em1 --chunks data/chunks/heldout \
        --questions gsm8k_test.jsonl

GSM8K: standard shots, raw space, greedy, the same model, batch size, questions and limit of new
tokens; a Llama of the given model's sizes but with a window for all eight shots and weights that
are not trained (so every answer is as long as may be). Both are whole processes, started and loaded
anew. The bound: K draws a chunk by the same sampler, then our scorer, or two full forward passes
for each draw. Each side is run twice, the better one counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import yaml  # noqa: E402
from sides import add_paths, measured  # noqa: E402

from boltlm.params import load, section  # noqa: E402
from boltlm.records import Chunk, read  # noqa: E402

SIDES = ("gsm8k_ours", "gsm8k_lm_eval", "elbo_ours", "elbo_alone")
NEW_TOKENS, WINDOW = 256, 4096


def wide(model: Path, folder: Path) -> Path:
    """A model of the same sizes with a longer window, and the tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from boltlm.model import checkpoint

    config = LlamaConfig.from_pretrained(model)
    config.max_position_embeddings = WINDOW
    torch.manual_seed(1)
    checkpoint.save(LlamaForCausalLM(config), folder, model, {})
    return folder


def ours(args: argparse.Namespace) -> dict[str, float]:
    """The task in this process; how many tokens were written."""
    from boltlm.evaluation import backends, downstream
    from boltlm.tokens import TextCoder

    backend = backends.load("hf", args.model, "float32", args.batch, 0.4)
    asking = downstream.Asking(
        where=str(args.questions),
        tokenizer=args.model,
        answer_tokens=NEW_TOKENS,
        limit=args.limit,
    )
    found = downstream.run(backend, downstream.Spec.of("gsm8k/standard/raw"), asking)
    coder = TextCoder(args.model)
    answers = [one.completion for one in found if one.grader == "flexible"]
    return {"tokens": sum(len(coder.encode(answer)) for answer in answers)}


def command_line(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, float]:
    """lm-eval's own task, with its data from the file: seconds, and tokens that were written."""
    from boltlm.tokens import TextCoder

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
            *(str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "hf"),
            *("--model_args", f"pretrained={model},dtype=float32,max_length={WINDOW}"),
            *("--tasks", "gsm8k_cot_local", "--include_path", str(folder)),
            *("--batch_size", str(args.batch), "--limit", str(args.limit), "--device", "cpu"),
            *("--output_path", str(folder / "out"), "--log_samples"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")},
    )
    seconds = time.perf_counter() - started
    (written,) = (folder / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in written.read_text("utf-8").splitlines()]
    answers = {row["doc_id"]: row["resps"][0][0] for row in rows}
    coder = TextCoder(model)
    tokens = sum(len(coder.encode(answer)) for answer in answers.values())
    return {"seconds": seconds, "tokens": tokens}


def bound(args: argparse.Namespace, alone: bool) -> dict[str, float]:
    """The bound's samples and weights for some chunks; the seconds without the loading."""
    from boltlm.sampling.estep import items
    from boltlm.sampling.precision import log_prob
    from boltlm.sampling.shards import context_room, make_estep
    from boltlm.sequences import layouts

    params = load(args.params)
    params["sampling"] |= {"sampler": "transformers", "precision": "float32"}
    estep: Any = make_estep(params, args.model, purpose="benchmark")
    m, room = estep.markers, context_room(estep.coder, params)
    chunks = list(read(args.chunks, Chunk))
    found = items(chunks, section(params, "context_chunks"), room)[: args.chunk_limit]
    draws = section(params, "k_samples")
    took: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        if not alone:
            estep.run(found, draws)
        else:
            prompts = [layouts.posterior_prefix(m, item.context, item.text) for item in found]
            keys = [("sample", "benchmark", item.doc_id, item.chunk) for item in found]
            groups = estep.sampler.sample(prompts, keys, draws)
            for item, prompt, group in zip(found, prompts, groups, strict=True):
                for draw in group:
                    latent = [*draw.tokens, m.eol]
                    log_prob(estep.model, prompt, latent)
                    before = layouts.prior_prefix(m, item.context)
                    log_prob(estep.model, before, [*latent, *item.text])
        took.append(time.perf_counter() - started)
    return {"seconds": min(took[1:]), "chunks": len(found)}


def run(args: argparse.Namespace, name: str, model: Path, folder: Path) -> dict[str, float]:
    """One side, in a process of its own."""
    if name == "gsm8k_lm_eval":
        return command_line(args, model, folder)
    started = time.perf_counter()
    found = measured("--side", name, "--wide", str(model))
    return {"seconds": time.perf_counter() - started, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_paths(parser, params="params.yaml", model="models/em1", chunks="data/chunks/heldout")
    parser.add_argument("--questions", type=Path, required=True, help="GSM8K's JSONL")
    parser.add_argument("--limit", type=int, default=64, help="questions")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk-limit", type=int, default=100)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--wide", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "gsm8k_ours":
        args.model = args.wide
        print(json.dumps(ours(args)))
        return
    if args.side:
        print(json.dumps(bound(args, alone=args.side == "elbo_alone")))
        return
    best: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        model = wide(args.model, Path(place) / "model")
        for turn in range(2):
            for name in SIDES:
                found = run(args, name, model, Path(place) / f"{name}-{turn}")
                print(name, json.dumps(found), flush=True)
                if name not in best or found["seconds"] < best[name]["seconds"]:
                    best[name] = found
    seconds = {name: found["seconds"] for name, found in best.items()}
    speed = {name: best[name]["tokens"] / seconds[name] for name in SIDES[:2]}
    facts = {
        "cores": os.cpu_count(),
        **{f"seconds_{name}": taken for name, taken in seconds.items()},
        **{f"tokens_per_second_{name}": value for name, value in speed.items()},
        "ratio_gsm8k_vs_lm_eval": seconds["gsm8k_lm_eval"] / seconds["gsm8k_ours"],
        "ratio_elbo_vs_alone": seconds["elbo_alone"] / seconds["elbo_ours"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Tokens a second of training, against transformers' Trainer and a minimal PyTorch loop.

    python benchmarks/train.py --model models/base --chunks data/chunks/em --data data/latents/em1

The same model, packed rows, order of magnitude of steps, optimiser (AdamW) and precision for all:
`ours`: the stage's loop with its log and checkpoints; `trainer`: Trainer with its defaults;
`minimal_loop`: twenty lines written out here. Each side is a process of its own; sides take turns,
and the best of the rounds counts, without the loading. The share of the measured matrix product
(`utilisation`) and the peak memory are told beside. On a GPU: --random 1.1b for a Llama of that
size with random weights, rows of 2048.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from sides import add_paths, measured  # noqa: E402

from boltlm.model import checkpoint, flops  # noqa: E402
from boltlm.model.resume import Checkpoints  # noqa: E402
from boltlm.model.settings import TrainConfig  # noqa: E402
from boltlm.model.training import train  # noqa: E402
from boltlm.params import build, load  # noqa: E402
from boltlm.seeds import generator  # noqa: E402
from boltlm.sequences import packing, store  # noqa: E402
from boltlm.sequences.packing import Rows, Source, Writer  # noqa: E402
from boltlm.tokens import TextCoder  # noqa: E402

SIDES = ("ours", "trainer", "minimal_loop")
RANDOM = {  # width, layers, heads, key-value heads, feed-forward, vocabulary, window
    "1.1b": (2048, 22, 32, 4, 5632, 32004, 2048),
    "small": (512, 8, 8, 8, 1408, 8192, 512),
}


def config(args: argparse.Namespace) -> TrainConfig:
    section = load(args.params)["train"]
    changes = {
        "optimizer": "adamw",
        "precision": args.precision,
        "batch_rows": args.batch_rows,
        "compile": args.compile,
        "activation_checkpointing": args.activation_checkpointing,
        "micro_rows": args.micro_rows,
    }
    return build(TrainConfig, {**section, **changes}, "train")


def model_of(args: argparse.Namespace) -> Any:
    if args.random is None:
        return checkpoint.load(args.model)
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, kv_heads, feed_forward, vocabulary, window = RANDOM[args.random]
    torch.manual_seed(1)
    settings = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        vocab_size=vocabulary,
        max_position_embeddings=window,
    )
    with checkpoint.device():
        return LlamaForCausalLM(settings)


def rows_of(args: argparse.Namespace, folder: Path, vocabulary: int) -> Rows:
    count = args.steps * args.batch_rows
    if args.random is not None:
        length = RANDOM[args.random][-1]
        tokens = np.random.default_rng(1).integers(0, vocabulary, count * length + 1)
        return Rows(tokens.astype(np.uint16), length, np.arange(count), "random")
    coder = TextCoder(args.model)
    writer = Writer(
        markers=coder.markers, form="latent", layout="chunk", context_chunks=3, room=400, seed=1
    )
    main = store.write(folder / "documents", store.texts(args.chunks, args.data))
    return packing.pack(
        lambda _: [Source(main, writer)],
        folder,
        length=args.length,
        seed=1,
        vocabulary=vocabulary,
        epochs=None,
        tokens=count * args.length + 1,
    )


def ours(model: Any, rows: Rows, settings: TrainConfig, folder: Path) -> None:
    kept = Checkpoints(folder / "kept", settings.checkpoint_every, "ours")
    train(model, rows, settings, seed=1, csv_path=folder / "a.csv", what="ours", kept=kept)


def trainer(model: Any, rows: Rows, settings: TrainConfig, folder: Path) -> None:
    """What a user gets who writes nothing but the batch size, the rates and the precision."""
    from transformers import Trainer, TrainingArguments

    steps = len(rows) // settings.batch_rows
    batches = [rows.batch(step, settings.batch_rows) for step in range(steps)]
    inputs = np.concatenate([one for one, _ in batches])
    dataset = [{"input_ids": row, "labels": row} for row in torch.from_numpy(inputs)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=settings.batch_rows,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        bf16=settings.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=settings.activation_checkpointing,
        torch_compile=settings.compile,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=dataset).train()  # pyright: ignore


def minimal_loop(model: Any, rows: Rows, settings: TrainConfig, _: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    model.train()
    device = model.device.type
    order = generator(1, "minimal").permutation(len(rows) // settings.batch_rows)
    for step in order:
        inputs, labels = (
            torch.from_numpy(x).to(device) for x in rows.batch(step, settings.batch_rows)
        )
        with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def side(args: argparse.Namespace) -> dict[str, float]:
    """One side, twice in one process: the first time warms up."""
    if args.side == "ours":
        checkpoint.prepare_cpu()
    settings, device = config(args), checkpoint.device()
    work = {"ours": ours, "trainer": trainer, "minimal_loop": minimal_loop}[args.side]
    seconds = 0.0
    model: Any = None
    for whole in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = None  # the one before makes room
            model = model_of(args)
            rows = rows_of(args, folder, model.config.vocab_size)
            if not whole:
                few = 3 * args.batch_rows
                rows = Rows(
                    rows.tokens[: few * rows.length + 1], rows.length, np.arange(few), "few"
                )
            started = time.perf_counter()
            work(model, rows, settings, folder)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    tokens = args.steps * args.batch_rows * rows.length
    speed = tokens / seconds
    peak = flops.peak(device, getattr(torch, args.precision))
    return {
        "tokens_per_second": speed,
        "utilisation": speed * flops.per_token(model, rows.length) / peak,
        "memory_mib": flops.memory_mib(device),
        "peak_tflops": peak / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_paths(
        parser,
        params="params.yaml",
        model="models/base",
        chunks="data/chunks/em",
        data="data/latents/em1",
    )
    parser.add_argument("--random", choices=tuple(RANDOM), help="a Llama of that size")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--micro-rows", type=int, default=None)
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name in SIDES:
            found = measured("--side", name)
            print(name, json.dumps(found), flush=True)
            if name not in best or found["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = found
    speed = {name: found["tokens_per_second"] for name, found in best.items()}
    facts = {
        "cores": os.cpu_count(),
        "precision": args.precision,
        **{f"tokens_per_second_{name}": value for name, value in speed.items()},
        **{f"utilisation_{name}": found["utilisation"] for name, found in best.items()},
        **{f"memory_mib_{name}": found["memory_mib"] for name, found in best.items()},
        "ratio_vs_trainer": speed["ours"] / speed["trainer"],
        "ratio_vs_minimal_loop": speed["ours"] / speed["minimal_loop"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

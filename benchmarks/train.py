"""Training throughput compared with transformers' Trainer and with a minimal PyTorch loop.

    python benchmarks/train.py --model models/base --chunks data/chunks/em --data data/latents/em1

All sides have the same model, packed sequences, number of steps, optimizer (AdamW) and precision.
`ours`: the training loop of the stages with its log and checkpoints. `trainer`: Trainer with its
defaults. `minimal_loop`: the twenty lines of that function. `snapshots`: `ours` with a bfloat16
snapshot every `--snapshot-every` steps; `snapshot_time_fraction` is the part of its time that they
take, measured inside the run, because the speeds of two runs differ by more. Each side runs in a
process of its own; the sides alternate, and the best round of each counts, loading excluded. The
MFU (with respect to the measured speed of a matrix product) and the peak memory are printed too. On
a GPU, use `--random 1.1b`: a Llama of that size with random weights and sequences of 2048 tokens.
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

from boltlm import checkpoint  # noqa: E402
from boltlm.param_values import build  # noqa: E402
from boltlm.params import load  # noqa: E402
from boltlm.seeds import generator  # noqa: E402
from boltlm.sequences import packing, store  # noqa: E402
from boltlm.sequences.formatter import SequenceFormatter  # noqa: E402
from boltlm.sequences.packing import PackedDataset, SequenceSource  # noqa: E402
from boltlm.tokens import TextCoder  # noqa: E402
from boltlm.training import hardware  # noqa: E402
from boltlm.training.checkpointing import CheckpointManager  # noqa: E402
from boltlm.training.compute import training_flops_per_token  # noqa: E402
from boltlm.training.config import ModelTrainConfig, SnapshotConfig, TrainConfig  # noqa: E402
from boltlm.training.snapshots import SnapshotWriter  # noqa: E402
from boltlm.training.trainer import train_model  # noqa: E402

SIDES = ("ours", "trainer", "minimal_loop", "snapshots")
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "1.1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32004,
        "max_position_embeddings": 2048,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 1408,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
    },
}


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The section `train` of params.yaml with AdamW and the values of the flags."""
    changes = {
        "optimizer": "adamw",
        "precision": args.precision,
        "batch_size": args.batch_size,
        "compile": args.compile,
        "activation_checkpointing": args.activation_checkpointing,
        "micro_batch_size": args.micro_batch_size,
    }
    return build(ModelTrainConfig, {**load(args.params)["train"], **changes}, "train")


def load_model(args: argparse.Namespace) -> Any:
    if args.random is None:
        return checkpoint.load_model(args.model)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    with checkpoint.default_device():
        return LlamaForCausalLM(LlamaConfig(**RANDOM_MODELS[args.random]))


def make_dataset(args: argparse.Namespace, folder: Path, vocab_size: int) -> PackedDataset:
    num_sequences = args.steps * args.batch_size
    if args.random is not None:
        length = RANDOM_MODELS[args.random]["max_position_embeddings"]
        tokens = np.random.default_rng(1).integers(0, vocab_size, num_sequences * length + 1)
        return PackedDataset(tokens.astype(np.uint16), length, np.arange(num_sequences), "random")
    coder = TextCoder(args.model)
    formatter = SequenceFormatter(
        special_tokens=coder.special_tokens,
        sequence_format="latent",
        draws="selected",
        layout="chunk",
        context_loss=True,
        context_chunks=3,
        token_budget=400,
        seed=1,
    )
    documents = store.read_tokenized(args.chunks, args.data)
    stored = store.write_documents(folder / "documents", documents)
    return packing.pack_sequences(
        lambda _: [SequenceSource(stored, formatter)],
        folder,
        sequence_length=args.sequence_length,
        seed=1,
        vocab_size=vocab_size,
        epochs=None,
        tokens=num_sequences * args.sequence_length + 1,
    )


class TimedWriter(SnapshotWriter):
    """Measures the seconds from the decision to write a snapshot to its end, so that gathering the
    weights is included."""

    started = seconds = 0.0

    def is_saved(self, step: int) -> bool:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.started = time.perf_counter()
        return super().is_saved(step)

    def save(self, model: Any, weights: Any, step: int, tokens: int) -> None:
        super().save(model, weights, step, tokens)
        self.seconds += time.perf_counter() - self.started


def ours(
    model: Any,
    dataset: PackedDataset,
    config: TrainConfig,
    folder: Path,
    snapshots: SnapshotWriter | None = None,
) -> None:
    checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint_every, "ours")
    train_model(
        model,
        dataset,
        config,
        seed=1,
        csv_path=folder / "train.csv",
        what="ours",
        checkpoints=checkpoints,
        snapshots=snapshots,
    )


def trainer(model: Any, dataset: PackedDataset, config: TrainConfig, folder: Path) -> None:
    """Trainer for a user who sets only the batch size, the learning rate and the precision."""
    from transformers import Trainer, TrainingArguments

    steps = len(dataset) // config.batch_size
    batches = [dataset.batch(step, config.batch_size) for step in range(steps)]
    inputs_RL = np.concatenate([inputs for inputs, _ in batches])
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(inputs_RL)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        bf16=config.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=config.activation_checkpointing,
        torch_compile=config.compile,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=examples).train()  # pyright: ignore


def minimal_loop(model: Any, dataset: PackedDataset, config: TrainConfig, _: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    model.train()
    device = model.device.type
    order = generator(1, "minimal").permutation(len(dataset) // config.batch_size)
    for step in order:
        inputs_BL, labels_BL = (
            torch.from_numpy(array).to(device) for array in dataset.batch(step, config.batch_size)
        )
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits_BLV = model(input_ids=inputs_BL, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits_BLV.flatten(0, 1).float(), labels_BL.flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def measure_side(args: argparse.Namespace) -> dict[str, float]:
    """Train one side twice in this process; three steps of warm-up and then the measured run."""
    if args.side in ("ours", "snapshots"):  # as the stages do
        checkpoint.keep_freed_memory()
    config, device = train_config(args), checkpoint.default_device()
    sides = {"ours": ours, "trainer": trainer, "minimal_loop": minimal_loop, "snapshots": ours}
    train = sides[args.side]
    seconds = 0.0
    options: dict[str, Any] = {}
    model: Any = None
    for is_warm_up in (True, False):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = None  # frees the memory of the warm-up's model
            model = load_model(args)
            dataset = make_dataset(args, folder, model.config.vocab_size)
            length = dataset.sequence_length
            if is_warm_up:
                count = 3 * args.batch_size
                tokens = dataset.tokens[: count * length + 1]
                dataset = PackedDataset(tokens, length, np.arange(count), "warm-up")
            if args.side == "snapshots":
                options["snapshots"] = TimedWriter(
                    folder / "snapshots",
                    SnapshotConfig(every=args.snapshot_every, precision="bfloat16"),
                    tokenizer=folder if args.random else args.model,
                    raw_tokens=lambda steps: steps,
                )
            started = time.perf_counter()
            train(model, dataset, config, folder, **options)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    tokens_per_second = args.steps * args.batch_size * length / seconds
    peak = hardware.peak_flops(device, getattr(torch, args.precision))
    return {
        "snapshot_time_fraction": sum(side.seconds for side in options.values()) / seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * training_flops_per_token(model, length) / peak,
        "memory_mib": hardware.peak_memory_mib(device),
        "peak_tflops": peak / 1e12,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_paths(
        parser,
        params="params.yaml",
        model="models/base",
        chunks="data/chunks/em",
        data="data/latents/em1",
    )
    parser.add_argument(
        "--random", choices=tuple(RANDOM_MODELS), help="a Llama of this size with random weights"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a step")
    parser.add_argument("--micro-batch-size", type=int, default=None)
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--snapshot-every", type=int, default=100, help="steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name in SIDES:
            result = measured("--side", name)
            print(name, json.dumps(result), flush=True)
            if name not in best or result["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = result
    speeds = {name: result["tokens_per_second"] for name, result in best.items()}
    summary = {
        "cores": os.cpu_count(),
        "precision": args.precision,
        **{f"tokens_per_second_{name}": speed for name, speed in speeds.items()},
        **{f"mfu_{name}": result["mfu"] for name, result in best.items()},
        **{f"memory_mib_{name}": result["memory_mib"] for name, result in best.items()},
        "snapshot_time_fraction": best["snapshots"]["snapshot_time_fraction"],
        "ratio_vs_trainer": speeds["ours"] / speeds["trainer"],
        "ratio_vs_minimal_loop": speeds["ours"] / speeds["minimal_loop"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

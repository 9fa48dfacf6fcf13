"""Time and memory of the E-step as the corpus grows.

    python benchmarks/growth.py --documents 300 3000 30000

Each size runs in its own process: `split`, then `latents`, with the params and the model of the
laptop run. Time is that of sampling and scoring; memory is the increase of the process's peak over
its peak after a first shard, in MiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from boltlm.corpus.chunker import Chunker  # noqa: E402
from boltlm.corpus.split import SplitSettings, split_corpora  # noqa: E402
from boltlm.estep.config import EStepSettings  # noqa: E402
from boltlm.estep.run import run_estep  # noqa: E402
from boltlm.estep.shard_worker import ShardTask, ShardWorker  # noqa: E402
from boltlm.params import build_settings, load  # noqa: E402
from boltlm.records import shard_paths  # noqa: E402
from boltlm.tokens import TextCoder, chunk_token_budget  # noqa: E402


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_settings(path: Path, documents: int) -> tuple[SplitSettings, EStepSettings]:
    """The settings of the two stages for a corpus of this size, in one process."""
    params = load(path)
    params["corpora"] = {
        "em": {"documents": documents, "source": {}},
        "heldout": params["corpora"]["heldout"] | {"documents": 1},
    }
    params["evaluate"] |= {"corpus": "heldout", "extra_corpora": []}
    params["latents"] = {"em1": params["latents"]["em1"] | {"corpus": "em"}}
    params["questions"]["count"] = 0
    params["sampling"] |= {"executor": "local", "workers": 1}
    settings = build_settings(SplitSettings, params)
    return settings, build_settings(EStepSettings, params, name="em1")


def measure_size(args: argparse.Namespace) -> dict[str, Any]:
    """One size, in this process."""
    split_settings, settings = read_settings(args.params, args.documents[0])
    coder = TextCoder(args.model)
    token_budget = chunk_token_budget(coder.context_length, settings.max_latent_tokens)
    chunker = Chunker(split_settings.chunks, coder, token_budget, settings.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split_corpora(
            split_settings,
            chunker,
            work=folder / "work",
            split_dir=folder / "split",
            chunks_dir=folder / "chunks",
        )
        task = ShardTask(
            settings=settings,
            purpose="em1",
            model=args.model,
            chunks=folder / "chunks" / "em",
            folder=folder / "first",
            variant="first",
            num_samples=settings.k_samples,
        )
        ShardWorker(task)(shard_paths(task.chunks)[0].name)
        first_peak, start = peak_mib(), time.perf_counter()
        metrics, timing = run_estep(
            settings,
            model=args.model,
            split=folder / "split" / "em",
            chunks=task.chunks,
            previous=task.chunks,
            previous_model=args.model,
            work=folder / "work",
            out=folder / "out",
            histogram_path=folder / "histogram.csv",
        )
        seconds = time.perf_counter() - start
    return {
        "documents": args.documents[0],
        "chunks": metrics["chunks"],
        "ms_per_chunk": 1000 * timing["seconds"] / metrics["chunks"],
        "ms_per_chunk_with_tables": 1000 * seconds / metrics["chunks"],
        "grown_mib": peak_mib() - first_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[300, 3000, 30000])
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "em1")
    args = parser.parse_args()
    if len(args.documents) == 1:
        print(json.dumps(measure_size(args)))
        return
    sizes: list[dict[str, Any]] = []
    for documents in args.documents:
        command = [sys.executable, __file__, "--documents", str(documents)]
        command += ["--params", str(args.params), "--model", str(args.model)]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        sizes.append(json.loads(process.stdout.splitlines()[-1]))
        print(json.dumps(sizes[-1]), flush=True)
    first, last = sizes[0], sizes[-1]
    facts = {
        "sizes": sizes,
        "ratio_time_per_chunk": first["ms_per_chunk"] / last["ms_per_chunk"],
        "grown_mib": last["grown_mib"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

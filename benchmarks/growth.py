"""Seconds and memory of the E-step as the corpus grows.

    python benchmarks/growth.py --documents 300 3000 30000

Each size is a process of its own: split, then the stage `latents`, with the laptop's params and
model. Seconds are those of drawing and scoring; memory is the peak of the process beyond its peak
when the model had drawn for a first shard, in MiB.
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

from boltlm.corpus.chunks import Chunker, Chunking  # noqa: E402
from boltlm.corpus.split import split  # noqa: E402
from boltlm.params import build, load, section  # noqa: E402
from boltlm.records import shards as shard_files  # noqa: E402
from boltlm.sampling import shards  # noqa: E402
from boltlm.tokens import TextCoder, most_chunk_tokens  # noqa: E402


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One size, in this process."""
    params = load(args.params)
    params["corpora"] = {"em": {"documents": args.documents[0], "source": {}}}
    params["questions"]["count"] = 0
    params["sampling"] |= {"engine": "local", "workers": 1}
    coder = TextCoder(args.model)
    most = most_chunk_tokens(coder.window, section(params, "max_latent_tokens"))
    chunker = Chunker(build(Chunking, params["chunks"], "chunks"), coder, most, params["seed"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split(params, chunker, folder / "split", folder / "chunks")
        task = shards.Task(
            params=params,
            name="em1",
            model=args.model,
            chunks=folder / "chunks" / "em",
            folder=folder / "warm",
            draws=section(params, "k_samples"),
        )
        shards.Maker(task)(shard_files(task.chunks)[0].name)
        before, started = peak_mib(), time.perf_counter()
        measured = shards.run(
            params,
            "em1",
            model=args.model,
            split=folder / "split" / "em",
            chunks=task.chunks,
            work=folder / "work",
            out=folder / "out",
            histogram_path=folder / "histogram.csv",
        )
        whole = time.perf_counter() - started
    return {
        "documents": args.documents[0],
        "chunks": measured["chunks"],
        "ms_per_chunk": 1000 * measured["seconds"] / measured["chunks"],
        "ms_per_chunk_with_tables": 1000 * whole / measured["chunks"],
        "grown_mib": peak_mib() - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, nargs="+", default=[300, 3000, 30000])
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "em1")
    args = parser.parse_args()
    if len(args.documents) == 1:
        print(json.dumps(one(args)))
        return
    found: list[dict[str, Any]] = []
    for documents in args.documents:
        command = [sys.executable, __file__, "--documents", str(documents)]
        command += ["--params", str(args.params), "--model", str(args.model)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    first, last = found[0], found[-1]
    facts = {
        "sizes": found,
        "ratio_time_per_chunk": first["ms_per_chunk"] / last["ms_per_chunk"],
        "grown_mib": last["grown_mib"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

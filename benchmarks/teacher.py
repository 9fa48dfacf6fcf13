"""Requests a second and memory of the stage `teacher` over chat completions.

    python benchmarks/teacher.py --requests 10000 --concurrency 64

Against `asyncio.gather` over the same client, the same requests and the same test server on this
machine, as many under way at once; it keeps nothing on the disk and all answers in memory. Each
side is a process of its own, in turns. Memory is the peak of the process, in MiB.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from boltlm.latents.teachers import teacher  # noqa: E402
from tests.latents.house import House, Server  # noqa: E402
from tests.latents.server import KEY  # noqa: E402

ROUNDS, NEW_CHUNKS = 3, 5  # a page; of its six chunks all but the first are like no other page's


def gather(house: House, concurrency: int) -> int:
    """The plain way: every request a task, a semaphore, all answers in a list."""
    import openai

    config: Any = teacher(house.params, "t")

    async def run() -> int:
        client = openai.AsyncOpenAI(api_key=KEY, base_url=config.base_url)
        gate = asyncio.Semaphore(concurrency)

        async def one(body: dict[str, Any]) -> str | None:
            async with gate:
                found = await client.chat.completions.create(**body)
            return found.choices[0].message.content

        requests = {request.key: request for request in house.requests()}
        answers = await asyncio.gather(*(one(config.body(r)) for r in requests.values()))
        return len(answers)

    return asyncio.run(run())


def side(args: argparse.Namespace) -> None:
    """One side, in this process: its JSON line."""
    documents = args.requests // NEW_CHUNKS
    house = House(args.folder, args.base, documents=documents, rounds=ROUNDS)
    changes = {"concurrency": args.concurrency, "max_cost_usd": 1e6}
    house.teach("openai", None, base_url=args.url, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    count = (
        int(house.write()["answers"]) if args.side == "ours" else gather(house, args.concurrency)
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {
        "requests": count,
        "seconds": seconds,
        "requests_per_second": count / seconds,
        "peak_mib": peak / 1024,
        "before_mib": before / 1024,
    }
    print(json.dumps(facts))


def base(folder: Path) -> Path:
    """A tokenizer's folder for the chunks; the model plays no part here."""
    from boltlm.model.base import without_phantom_space
    from tests import tiny

    folder.mkdir(parents=True)
    tokenizer = tiny.byte_level()
    without_phantom_space(tokenizer)
    return tiny.coder_folder(tokenizer, folder)


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one side against a fresh server."""
    state = folder / f"{name}-server"
    state.mkdir()
    server = Server(state).start()
    command = [sys.executable, __file__, "--side", name, "--url", server.url]
    command += ["--folder", str(folder / name), "--base", str(folder / "base")]
    command += ["--requests", str(args.requests), "--concurrency", str(args.concurrency)]
    try:
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": KEY},
        )
    finally:
        server.stop()
    facts = json.loads(done.stdout.splitlines()[-1])
    print(name, facts, flush=True)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--side", choices=("ours", "gather"), help=argparse.SUPPRESS)
    for flag in ("--folder", "--base"):
        parser.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base(folder / "base")
        found = {name: measure(name, args, folder) for name in ("gather", "ours")}
    ours, plain = found["ours"], found["gather"]
    facts = {
        "requests": ours["requests"],
        "concurrency": args.concurrency,
        "requests_per_second": ours["requests_per_second"],
        "requests_per_second_gather": plain["requests_per_second"],
        "ratio_vs_gather": ours["requests_per_second"] / plain["requests_per_second"],
        "peak_mib": ours["peak_mib"],
        "peak_mib_gather": plain["peak_mib"],
        "grown_mib": ours["peak_mib"] - ours["before_mib"],
        "grown_mib_gather": plain["peak_mib"] - plain["before_mib"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

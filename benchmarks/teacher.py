"""Measures the speed and memory of the stage `teacher` with chat completions.

    python benchmarks/teacher.py --requests 10000 --concurrency 64
    python benchmarks/teacher.py --requests 500 --delay 2.5 --requests-per-minute 500

The baseline is `asyncio.gather` over the same client, requests and concurrency; it saves nothing
and holds all responses in memory. Both use a mock server on this machine, and each runs in a
process of its own, one after the other. Memory is the peak of the process, in MiB. The server takes
--delay seconds for a response. With --requests-per-minute it refuses more, with the headers of
OpenAI, and there is no baseline: the rate is compared with the limit, from the first request to the
last response, less what the server accepts at once (--burst) and the time of one response.
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

from boltlm.teachers.model_config import OpenAIChatConfig  # noqa: E402
from tests.teachers.server import KEY  # noqa: E402
from tests.teachers.stage_harness import ServerProcess, TeacherStage  # noqa: E402

CHUNKS_PER_DOCUMENT = 2  # about; a chunk that occurs twice is asked once
VARIANTS = ("gather", "stage")


def run_gather(stage: TeacherStage, concurrency: int) -> int:
    """The baseline: every request is a task, a semaphore limits them. Returns their number."""
    import openai

    config = stage.config
    assert isinstance(config, OpenAIChatConfig)

    async def send_all() -> int:
        client = openai.AsyncOpenAI(api_key=KEY, base_url=config.base_url)
        semaphore = asyncio.Semaphore(concurrency)

        async def send(body: dict[str, Any]) -> str | None:
            async with semaphore:
                completion = await client.chat.completions.create(**body)
            return completion.choices[0].message.content

        requests = {request.key: request for request in stage.requests()}
        bodies = [config.request_body(request) for request in requests.values()]
        return len(await asyncio.gather(*map(send, bodies)))

    return asyncio.run(send_all())


def run_variant(args: argparse.Namespace) -> None:
    """Run one variant in this process and print its measurements as a line of JSON."""
    documents = args.requests // CHUNKS_PER_DOCUMENT
    stage = TeacherStage(args.folder, args.base, documents=documents)
    changes = {"concurrency": args.concurrency, "max_cost_usd": 1e6}
    changes |= {"max_retries": 0, "max_outage_seconds": 60.0}
    stage.configure("openai", None, base_url=args.url, **changes)
    start_mib = peak_memory_mib()
    start = time.perf_counter()
    if args.variant == "stage":
        count = int(stage.run_in_process()["answers"])
    else:
        count = run_gather(stage, args.concurrency)
    seconds = time.perf_counter() - start
    facts = {
        "requests": count,
        "seconds": seconds,
        "requests_per_second": count / seconds,
        "peak_mib": peak_memory_mib(),
        "start_mib": start_mib,
    }
    print(json.dumps(facts))


def peak_memory_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def create_tokenizer(folder: Path) -> Path:
    """A tokenizer for the chunks; no model is needed."""
    from boltlm.training.tokenizer import remove_leading_space
    from tests import tiny

    folder.mkdir(parents=True)
    tokenizer = tiny.byte_level()
    remove_leading_space(tokenizer)
    return tiny.coder_folder(tokenizer, folder)


def measure(variant: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one variant in a new process against a new server."""
    server = ServerProcess(
        folder / f"{variant}-server",
        delay=args.delay,
        requests_per_minute=args.requests_per_minute,
        burst=args.burst,
    ).start()
    command = [sys.executable, __file__, "--variant", variant, "--url", server.url]
    command += ["--folder", str(folder / variant), "--base", str(folder / "base")]
    command += ["--requests", str(args.requests), "--concurrency", str(args.concurrency)]
    try:
        process = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": KEY},
        )
    finally:
        server.stop()
    facts = json.loads(process.stdout.splitlines()[-1])
    print(variant, facts, flush=True)
    return facts


def limited_facts(stage: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """How fast the stage was under a limit, relative to the limit."""
    seconds = stage["seconds"] - args.delay
    per_minute = (stage["requests"] - args.burst) / seconds * 60
    return {
        "requests": stage["requests"],
        "concurrency": args.concurrency,
        "delay_seconds": args.delay,
        "limit_per_minute": args.requests_per_minute,
        "requests_per_minute": per_minute,
        "ratio_vs_limit": per_minute / args.requests_per_minute,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay", type=float, default=0.0, help="of a response, seconds")
    parser.add_argument("--requests-per-minute", type=float, help="the server's limit")
    parser.add_argument("--burst", type=float, default=10.0, help="requests accepted at once")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    for flag in ("--folder", "--base"):
        parser.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        create_tokenizer(folder / "base")
        if args.requests_per_minute is not None:
            print(json.dumps(limited_facts(measure("stage", args, folder), args)))
            return
        gather, stage = (measure(variant, args, folder) for variant in VARIANTS)
    facts = {
        "requests": stage["requests"],
        "concurrency": args.concurrency,
        "delay_seconds": args.delay,
        "requests_per_second": stage["requests_per_second"],
        "requests_per_second_gather": gather["requests_per_second"],
        "ratio_vs_gather": stage["requests_per_second"] / gather["requests_per_second"],
        "peak_mib": stage["peak_mib"],
        "peak_mib_gather": gather["peak_mib"],
        "added_mib": stage["peak_mib"] - stage["start_mib"],
        "added_mib_gather": gather["peak_mib"] - gather["start_mib"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

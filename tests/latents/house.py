"""A small corpus, a test server, and the stage `teacher` run as its user runs it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from boltlm.corpus.chunks import Chunker, Chunking
from boltlm.corpus.split import split
from boltlm.latents.tasks import Asker, Request
from boltlm.latents.teachers import teacher, write
from boltlm.params import load
from boltlm.records import Chunk, Document, read_shard, shards
from boltlm.tokens import TextCoder
from tests import tiny
from tests.latents.server import KEY, digest

PRICES = {"input_usd": 0.15, "output_usd": 0.6, "batch_factor": 0.5, "as_of": "2025-01-01"}
ASKED = {
    "kind": "openai",
    "corpus": "em",
    "task": "latent",
    "paraphrases": 0,
    "seed": 1,
    "model": "gpt-4o-mini-2024-07-18",
    "temperature": 0.7,
    "max_output_tokens": 64,
    "attempts": 3,
    "max_failed_fraction": 0.0,
    "base_url": None,
    "retries": 4,
    "timeout_seconds": 20.0,
    "expected_output_tokens": 20,
    "characters_per_token": 4.0,
    "max_cost_usd": 1.0,
    "prices": PRICES,
}
KINDS = {
    "openai": {"concurrency": 4},
    "openai_batch": {
        "batch_requests": 10,
        "batch_bytes": 1_000_000,
        "batches_in_flight": 2,
        "poll_seconds": 0.05,
    },
    "vllm": {"window": 2048, "memory_fraction": 0.5, "requests_at_once": 64},
}
PAID = (
    "base_url",
    "retries",
    "timeout_seconds",
    "expected_output_tokens",
    "characters_per_token",
    "max_cost_usd",
    "prices",
)
STOPPED_SERVER_WAIT = 20.0  # seconds


@dataclass
class Server:
    """The test server as a process of its own, which can die and come back on its port."""

    state: Path
    delay: float = 0.0
    idempotent: bool = False
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Server":
        (self.state / "port").unlink(missing_ok=True)
        script = Path(__file__).with_name("server.py")
        command = [sys.executable, str(script), "--state", str(self.state)]
        command += ["--port", str(self.port), "--delay", str(self.delay)]
        command += ["--idempotent"] if self.idempotent else []
        self.process = subprocess.Popen(command)
        until = time.monotonic() + STOPPED_SERVER_WAIT
        while not (self.state / "port").exists():
            assert time.monotonic() < until, "the test server does not start"
            time.sleep(0.02)
        self.port = int((self.state / "port").read_text())
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, place: str, *faults: str) -> None:
        with sqlite3.connect(self.state / "state.sqlite", timeout=20) as db:
            db.executemany("insert into faults values (?, ?)", ((place, f) for f in faults))

    def batches(self) -> int:
        with sqlite3.connect(self.state / "state.sqlite", timeout=20) as db:
            return db.execute("select count(*) from batches").fetchone()[0]

    def answered(self) -> dict[str, int]:
        """How often each request was answered, by the digest of its messages."""
        with sqlite3.connect(self.state / "state.sqlite", timeout=20) as db:
            return dict(db.execute("select digest, count from answered"))


@dataclass
class House:
    """A corpus in two shards and a place for params, journal and output."""

    folder: Path
    base: Path
    documents: int = 16
    rounds: int = 1
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.params = load(tiny.ROOT / "params.yaml")
        self.params["corpora"] = {"em": {"documents": self.documents, "source": {}}}
        self.params["corpus"] |= {"least_rounds": self.rounds, "most_rounds": self.rounds}
        self.params["questions"]["count"] = 0
        self.params["split"]["shard_documents"] = -(-self.documents // 2)
        self.params["max_latent_tokens"] = 100
        lengths = Chunking(mean_sentences=1, least_sentences=1, most_sentences=1)
        chunker = Chunker(lengths, TextCoder(self.base), 100, seed=1)
        split(self.params, chunker, self.folder / "split", self.folder / "chunks")

    def teach(self, kind: str, server: Server | None, **changes: Any) -> "House":
        url = server.url if server is not None else None
        entry = {**ASKED, "kind": kind, "base_url": url, **KINDS[kind], **changes}
        if kind == "vllm":
            entry = {name: value for name, value in entry.items() if name not in PAID}
        self.params["teachers"] = {"t": entry}
        return self

    @property
    def paths(self) -> dict[str, Path]:
        return {
            "split": self.folder / "split" / "em",
            "chunks": self.folder / "chunks" / "em",
            "out": self.folder / "out",
            "journal": self.folder / "journal" / "answers.sqlite",
        }

    def write(self) -> dict[str, int | float]:
        """The stage's work, in this process."""
        return write(self.params, "t", TextCoder(self.base), **self.paths)

    def start(self, **environment: str | None) -> subprocess.Popen[str]:
        """The stage as a process."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))
        flags = {**self.paths, "params": self.folder / "params.yaml", "base": self.base}
        flags["metrics"] = self.folder / "metrics.json"
        command = [sys.executable, str(tiny.ROOT / "stages" / "teacher.py"), "--name", "t"]
        for name, path in flags.items():
            command += [f"--{name}", str(path)]
        env = {**os.environ, "PYTHONPATH": str(tiny.ROOT / "src"), "OPENAI_API_KEY": KEY}
        env |= {name: value for name, value in environment.items() if value is not None}
        for name, value in environment.items():
            if value is None:
                env.pop(name, None)
        env.pop("DVC_ROOT", None)
        return subprocess.Popen(
            command,
            env=env,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, **environment: str | None) -> tuple[int, str]:
        """(exit code, everything that it said)."""
        process = self.start(**environment)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def killed_after(self, seconds: float) -> bool:
        """Run and kill with SIGKILL; whether it had finished by then."""
        process = self.start()
        try:
            process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return False
        assert process.returncode == 0
        return True

    def killed_with_a_batch(self, server: Server) -> None:
        """Run, and kill with SIGKILL when the journal knows a batch that the server has."""
        process = self.start()
        until = time.monotonic() + 60
        while not (server.batches() and self.batches()):
            assert process.poll() is None
            assert time.monotonic() < until, "no batch was submitted"
            time.sleep(0.05)
        process.kill()
        process.communicate()

    def batches(self) -> int:
        """How many batches the journal holds an id of."""
        with sqlite3.connect(self.paths["journal"], timeout=20) as db:
            return db.execute("select count(*) from batches where batch <> ''").fetchone()[0]

    def requests(self) -> list[Request]:
        config: Any = teacher(self.params, "t")
        asker = Asker(
            task=config.task,
            settings=config.settings,
            context_chunks=self.params["context_chunks"],
            paraphrases=config.paraphrases,
            seed=config.seed,
        )
        found: list[Request] = []
        for path in shards(self.paths["chunks"]):
            documents = read_shard(self.paths["split"] / path.name, Document)
            found += asker.requests(documents, read_shard(path, Chunk))
        return found

    def digests(self) -> dict[str, str]:
        """How the server calls each request, by the journal's key."""
        model = self.params["teachers"]["t"]["model"]
        return {
            r.key: digest({"model": model, "messages": list(r.messages)}) for r in self.requests()
        }

    def known(self) -> set[str]:
        """Keys that the journal has an answer to."""
        if not self.paths["journal"].exists():
            return set()
        with sqlite3.connect(self.paths["journal"], timeout=20) as db:
            return {key for (key,) in db.execute("select distinct key from answers")}

    def output(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.paths["out"].iterdir())}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text("utf-8"))

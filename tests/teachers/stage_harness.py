"""A small corpus, a mock API in a process of its own, and the stage `teacher`, run in this process
or as its user runs it."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from boltlm.corpus.chunker import Chunker
from boltlm.corpus.split import SplitSettings, split_corpora
from boltlm.params import build_settings, load
from boltlm.records import Chunk, Document, read_shard, shard_paths
from boltlm.teachers.config import TeacherSettings
from boltlm.teachers.job import ModelTeacher
from boltlm.teachers.prompts import RequestBuilder, TeacherRequest
from boltlm.teachers.run import run_teacher
from boltlm.tokens import TextCoder
from tests import tiny
from tests.teachers.server import KEY, digest

PRICES = {"input_usd": 0.15, "output_usd": 0.6, "batch_factor": 0.5, "as_of": "2025-01-01"}
COMMON_KEYS = {
    "corpus": "em",
    "task": "latent",
    "paraphrases": 0,
    "seed": 1,
    "model": "gpt-4o-mini-2024-07-18",
    "temperature": 0.7,
    "max_output_tokens": 64,
    "max_attempts": 3,
    "max_failed_fraction": 0.0,
    "checks": {"max_copied_fraction": None, "min_tokens": 0, "language": None},
}
API_KEYS = {
    "base_url": None,
    "api_key_env": "OPENAI_API_KEY",
    "top_p": None,
    "sampling_seed": None,
    "reasoning_effort": None,
    "extra_body": {},
    "max_retries": 4,
    "retry_failed": False,
    "timeout_seconds": 20.0,
    "expected_output_tokens": 20,
    "characters_per_token": 4.0,
    "max_cost_usd": 1.0,
    "prices": PRICES,
}
KEYS_BY_KIND: dict[str, dict[str, Any]] = {
    "openai": {**API_KEYS, "concurrency": 4, "max_outage_seconds": 60.0},
    "openai_batch": {
        **API_KEYS,
        "max_requests_per_batch": 10,
        "max_bytes_per_batch": 1_000_000,
        "max_concurrent_batches": 2,
        "poll_interval_seconds": 0.05,
        "max_outage_seconds": 60.0,
        "pilot_requests": 0,
        "min_pilot_usable": 0.8,
        "max_pilot_cost_ratio": 1.5,
        "keep_files": False,
    },
    "vllm": {"context_length": 2048, "gpu_memory_utilization": 0.5, "request_batch_size": 64},
}
POLL_SECONDS = 0.01  # how often an event is checked
PRELOADED_MODULES = [
    "tests.teachers.stage_harness",
    "boltlm.teachers.openai_chat",
    "boltlm.teachers.openai_batch",
]


@dataclass
class ServerProcess:
    """The mock API as a process, which can be killed and started again on the same port."""

    state: Path
    delay: float = 0.0
    idempotent: bool = False
    requests_per_minute: float | None = None
    burst: float = 1.0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "ServerProcess":
        """Start the server and wait until it listens."""
        self.state.mkdir(exist_ok=True)
        port_file = self.state / "port"
        port_file.unlink(missing_ok=True)
        script = Path(__file__).with_name("server.py")
        command = [sys.executable, str(script), "--state", str(self.state)]
        command += ["--port", str(self.port), "--delay", str(self.delay)]
        command += ["--idempotent"] if self.idempotent else []
        if self.requests_per_minute is not None:
            command += ["--requests-per-minute", str(self.requests_per_minute)]
            command += ["--burst", str(self.burst)]
        self.process = subprocess.Popen(command)
        while not port_file.exists():
            assert self.process.poll() is None, "the mock server did not start"
            time.sleep(POLL_SECONDS)
        self.port = int(port_file.read_text())
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, endpoint: str, *faults: str) -> None:
        """Let the next requests to an endpoint fail, each in one of these ways."""
        with self._connect() as db:
            db.executemany("insert into faults values (?, ?)", ((endpoint, f) for f in faults))

    def fail_always(self, digest: str, fault: str | None) -> None:
        """Let every attempt at the request with this digest fail in this way; None ends that."""
        with self._connect() as db:
            db.execute("delete from always where digest = ?", (digest,))
            if fault is not None:
                db.execute("insert into always values (?, ?)", (digest, fault))

    def clear_faults(self) -> None:
        with self._connect() as db:
            db.execute("delete from faults")

    def accept_key(self, key: str) -> None:
        """Accept this API key too."""
        with self._connect() as db:
            db.execute("insert into keys values (?)", (key,))

    def last_body(self) -> dict[str, Any]:
        """The last chat completion request that was answered."""
        with self._connect() as db:
            return json.loads(db.execute("select body from last").fetchone()[0])

    def num_batches(self) -> int:
        with self._connect() as db:
            return db.execute("select count(*) from batches").fetchone()[0]

    def batch_ids(self) -> list[str]:
        with self._connect() as db:
            return [batch_id for (batch_id,) in db.execute("select id from batches")]

    def batch_statuses(self) -> list[str]:
        """The statuses of all batches, in the order of their creation."""
        with self._connect() as db:
            rows = db.execute("select facts from batches order by rowid")
            return [json.loads(facts)["status"] for (facts,) in rows]

    def batch_sizes(self) -> list[int]:
        """The numbers of requests of all batches that have ended, in the order of creation."""
        with self._connect() as db:
            rows = db.execute("select facts from batches order by rowid")
            return [json.loads(facts)["request_counts"]["total"] for (facts,) in rows]

    def end_slow_batches(self) -> None:
        """Let batches with the fault `slow` end like others."""
        with self._connect() as db:
            db.execute("update batches set fault = ''")

    def num_files(self) -> int:
        with self._connect() as db:
            return db.execute("select count(*) from files").fetchone()[0]

    def num_events(self) -> int:
        """How many requests were received plus how many were processed, over all endpoints."""
        with self._connect() as db:
            return db.execute("select count(*) from events").fetchone()[0]

    def hold_responses_from(self, num_events: int | None) -> None:
        """Hold back all responses from this number of events on; None sends them again."""
        with self._connect() as db:
            db.execute("delete from hold")
            if num_events is not None:
                db.execute("insert into hold values (?)", (num_events,))

    def answered(self) -> dict[str, int]:
        """How often each request was answered and charged, by the digest of its messages."""
        with self._connect() as db:
            return dict(db.execute("select digest, count from answered"))

    def forget_batches(self) -> None:
        with self._connect() as db:
            db.execute("delete from batches")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.state / "state.sqlite", timeout=60)


@dataclass
class TeacherStage:
    """A corpus in two shards, the stage's params, and its paths."""

    folder: Path
    base: Path
    documents: int = 16
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.params = tiny.without_entries(load(tiny.ROOT / "params.yaml"))
        self.params["corpora"] = {
            "base": {"documents": 1, "source": {"pages": "primer"}},
            "em": {"documents": self.documents, "source": {}},
            "heldout": {"documents": 1, "source": {"problems": "held_out"}},
        }
        self.params["questions"]["count"] = 0
        self.params["split"]["shard_documents"] = -(-self.documents // 2)
        self.params["chunks"] = {
            "mean_sentences": 1,
            "min_sentences": 1,
            "max_sentences": 1,
            "from_source": [],
        }
        self.params["max_latent_tokens"] = 100
        settings = build_settings(SplitSettings, self.params)
        chunker = Chunker(settings.chunks, TextCoder(self.base), 100, seed=1)
        split_corpora(
            settings,
            chunker,
            work=self.folder / "work",
            split_dir=self.folder / "split",
            chunks_dir=self.folder / "chunks",
        )

    def configure(self, kind: str, server: ServerProcess | None, **changes: Any) -> "TeacherStage":
        """Set the entry of `teachers` to a teacher of this kind; `changes` replace its keys."""
        entry = {"kind": kind, **COMMON_KEYS, **KEYS_BY_KIND[kind]}
        if server is not None:
            entry["base_url"] = server.url
        entry |= changes
        self.params["teachers"] = {"t": entry}
        self.params["inputs"] = {"teacher": entry["model"]} if kind == "vllm" else {}
        return self

    @property
    def settings(self) -> TeacherSettings:
        return build_settings(TeacherSettings, self.params, name="t")

    @property
    def config(self) -> ModelTeacher:
        """The teacher's own settings."""
        teacher = self.settings.teacher
        assert isinstance(teacher, ModelTeacher)
        return teacher

    @property
    def paths(self) -> dict[str, Path]:
        """The stage's paths by the names of its flags."""
        return {
            "split": self.folder / "split" / "em",
            "chunks": self.folder / "chunks" / "em",
            "out": self.folder / "out",
            "cache": self.folder / "cache" / "responses.sqlite",
            "prompts": tiny.TEMPLATES,
        }

    def run_in_process(self) -> dict[str, int | float]:
        """The stage's work in this process; returns the metrics."""
        return run_teacher(self.settings, TextCoder(self.base), **self.paths)

    def start(self, **environment: str | None) -> subprocess.Popen[str]:
        """Start the stage's script. None removes a variable from the environment."""
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params))
        flags = {**self.paths, "params": self.folder / "params.yaml", "base": self.base}
        flags["metrics"] = self.folder / "metrics.json"
        command = [sys.executable, str(tiny.ROOT / "stages" / "teacher.py"), "--name", "t"]
        for name, path in flags.items():
            command += [f"--{name}", str(path)]
        changes = {
            "PYTHONPATH": str(tiny.ROOT / "src"),
            "OPENAI_API_KEY": KEY,
            "DVC_ROOT": None,
            **environment,
        }
        env = {name: value for name, value in os.environ.items() if name not in changes}
        env |= {name: value for name, value in changes.items() if value is not None}
        return subprocess.Popen(
            command,
            env=env,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, **environment: str | None) -> tuple[int, str]:
        """Run the stage's script; returns (exit code, all that it printed)."""
        return wait(self.start(**environment))

    def kill_when(self, condition: Callable[[], bool]) -> bool:
        """Run the stage's work in a new process and kill it with SIGKILL when the condition holds.
        Returns whether it was killed; False means that it had finished before, without an error."""
        # A fork of a process with the imports is ready at once, also on a busy machine.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED_MODULES)
        process = context.Process(target=_run_stage, args=(self,))
        process.start()
        try:
            while not condition():
                if not process.is_alive():
                    assert process.exitcode == 0
                    return False
                time.sleep(POLL_SECONDS)
            return True
        finally:
            process.kill()
            process.join()
            process.close()

    def kill_with_pending_batch(self, server: ServerProcess) -> None:
        """Run the stage's work and kill it when the id of a batch at the server is saved."""
        assert self.kill_when(lambda: bool(server.num_batches() and self.num_saved_batch_ids()))

    def num_saved_batch_ids(self) -> int:
        """How many pending batches with an id the response cache holds."""
        with sqlite3.connect(self.paths["cache"], timeout=60) as db:
            return db.execute("select count(*) from batches where batch <> ''").fetchone()[0]

    def requests(self) -> list[TeacherRequest]:
        """All requests of the corpus in order."""
        builder = RequestBuilder(
            task=self.config.task,
            templates=tiny.TEMPLATES,
            sampling_facts=self.config.sampling_facts,
            context_chunks=self.params["context_chunks"],
            paraphrases=self.config.paraphrases,
            seed=self.config.seed,
        )
        requests: list[TeacherRequest] = []
        for path in shard_paths(self.paths["chunks"]):
            documents = read_shard(self.paths["split"] / path.name, Document)
            requests += builder.requests(documents, read_shard(path, Chunk))
        return requests

    def digests(self) -> dict[str, str]:
        """The server's digest of each request, by the request's key."""
        model = self.config.model
        return {
            r.key: digest({"model": model, "messages": list(r.messages)}) for r in self.requests()
        }

    def saved_keys(self) -> set[str]:
        """The keys of all requests that have a response in the cache."""
        if not self.paths["cache"].exists():
            return set()
        with sqlite3.connect(self.paths["cache"], timeout=60) as db:
            if not db.execute("select 1 from sqlite_master where name = 'answers'").fetchone():
                return set()
            return {key for (key,) in db.execute("select distinct key from answers")}

    def output(self) -> dict[str, bytes]:
        """The contents of the output files by name."""
        return {path.name: path.read_bytes() for path in sorted(self.paths["out"].iterdir())}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text("utf-8"))


def _run_stage(stage: TeacherStage) -> None:
    os.environ["OPENAI_API_KEY"] = KEY
    stage.run_in_process()


def wait(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, all that it printed); the process is killed if the test is stopped meanwhile."""
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
    return process.returncode, output

"""A mock of OpenAI's API: chat completions, Files and Batches as its documentation describes them.

    python tests/teachers/server.py --state DIR [--port N] [--delay SECONDS] [--idempotent]
        [--requests-per-minute N] [--burst N]

It writes the port on which it listens to DIR/port. Its state (files, batches, how often each
request was answered) is in DIR/state.sqlite, so it can be killed and started again. With
--idempotent it honours Idempotency-Key: a key that it has answered gets the same response again.
The table `faults` lists, for each endpoint, what goes wrong with the next requests to it; each row
is used once; `always` lists faults of single requests, by their digest, that are not used up. With
--requests-per-minute chat completions are limited as OpenAI limits them, with its headers; an idle
server accepts --burst requests at once. The table `events` counts received requests and responses;
from the number in `hold` on, requests are processed but their responses are held back. The response
to a request is a function of its messages.
"""

import argparse
import asyncio
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

KEY = "sk-test-key"
POLLS = 2  # how often a batch must be looked up until it ends
TABLES = """
create table if not exists files (id text primary key, content blob, name text);
create table if not exists batches (id text primary key, facts text, polls integer, fault text);
create table if not exists answered (digest text primary key, count integer);
create table if not exists faults (endpoint text, fault text);
create table if not exists always (digest text primary key, fault text);
create table if not exists replies (idempotency_key text primary key, body text);
create table if not exists events (event text);
create table if not exists keys (key text);
create table if not exists last (body text);
create table if not exists hold (num_events integer);
"""
USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
USAGES: dict[str, Any] = {
    "no usage": None,
    "infinite usage": {"prompt_tokens": math.inf, "completion_tokens": math.nan},
    "negative usage": {**USAGE, "completion_tokens": -1},
    "huge usage": {"prompt_tokens": 10**30, "completion_tokens": -1},
    "long": {**USAGE, "completion_tokens": 64},
    "very long": {**USAGE, "completion_tokens": 200},
}


def digest(body: dict[str, Any]) -> str:
    """A digest of a request's model and messages."""
    text = json.dumps({name: body[name] for name in ("model", "messages")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def completion(body: dict[str, Any], fault: str = "") -> dict[str, Any]:
    """A chat completion; some faults make it unusable, others are oddities of some servers."""
    text = f"The passage rests on fact {digest(body)[:12]}. It follows."
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    finish_reasons = {"length": "length", "foreign": "eos_token", "abort": "abort"}
    contents = {
        "empty": "  ",
        "apology": "I'm sorry, but I can't help with that.",
        "surrogate": f"{text} \ud83d",
        "separator": f"{text} One\u2028two\x85three.",
        "special": f"{text} <|latent|>",
    }
    if fault == "copy":
        message["content"] = body["messages"][-1]["content"]
    if fault == "parts":
        message["content"] = [{"type": "text", "text": part} for part in (text[:9], text[9:])]
    if fault == "refused":
        message |= {"content": None, "refusal": "I will not."}
    elif fault in contents:
        message["content"] = contents[fault]
    if fault == "no completion":
        return {"object": "chat.completion", "choices": []}
    choice = {"index": 0, "message": message, "finish_reason": finish_reasons.get(fault, "stop")}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{**choice, "logprobs": None}],
        "usage": USAGES.get(fault, USAGE),
        "service_tier": "on_demand" if fault == "foreign" else "default",
    }


def error_response(
    status: int, message: str, code: str | None = None, **headers: str
) -> web.Response:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


class RateLimit:
    """A token bucket of requests, as OpenAI reports it in headers."""

    def __init__(self, per_minute: float, burst: float) -> None:
        self.rate, self.burst = per_minute / 60, burst
        self.level, self.at = burst, time.monotonic()

    def admit(self) -> tuple[bool, dict[str, str]]:
        """Whether the next request is accepted, and the headers of its response."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + self.rate * (now - self.at))
        self.at = now
        accepted = self.level >= 1
        self.level -= accepted
        headers = {
            "x-ratelimit-limit-requests": f"{self.burst:.0f}",
            "x-ratelimit-remaining-requests": f"{int(self.level)}",
            "x-ratelimit-reset-requests": f"{(self.burst - self.level) / self.rate * 1000:.0f}ms",
        }
        if not accepted:
            headers["retry-after-ms"] = f"{(1 - self.level) / self.rate * 1000:.0f}"
        return accepted, headers


def file_object(file_id: str, content: bytes, name: str = "f") -> dict[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": len(content),
        "created_at": 1,
        "filename": name,
        "purpose": "batch",
        "status": "processed",
    }


def page_of(objects: list[dict[str, Any]], request: web.Request) -> dict[str, Any]:
    """A page of a list, as the query of a request asks for it."""
    if after := request.query.get("after"):
        ids = [facts["id"] for facts in objects]
        objects = objects[ids.index(after) + 1 :]
    limit = int(request.query.get("limit", 20))
    page = objects[:limit]
    return {
        "object": "list",
        "data": page,
        "has_more": len(objects) > limit,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


class MockAPI:
    """The state and the endpoints."""

    def __init__(
        self, state: Path, delay: float, idempotent: bool, rate_limit: RateLimit | None = None
    ) -> None:
        self.delay, self.idempotent, self.rate_limit = delay, idempotent, rate_limit
        self.db = sqlite3.connect(state / "state.sqlite", timeout=60, isolation_level=None)
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = off")
        self.db.executescript(TABLES)
        self.models = {"gpt-4o-mini-2024-07-18"}
        self.in_progress: set[str] = set()  # by Idempotency-Key

    def application(self) -> web.Application:
        app = web.Application(client_max_size=300_000_000, middlewares=[self._middleware()])
        app.add_routes(
            [
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/files", self.upload),
                web.get("/v1/files", self.list_files),
                web.get("/v1/files/{id}", self.file_facts),
                web.delete("/v1/files/{id}", self.delete_file),
                web.get("/v1/files/{id}/content", self.content),
                web.post("/v1/batches", self.create),
                web.get("/v1/batches", self.list_batches),
                web.get("/v1/batches/{id}", self.retrieve),
                web.post("/v1/batches/{id}/cancel", self.cancel),
            ]
        )
        return app

    def _middleware(self) -> Middleware:
        @web.middleware
        async def record_and_authenticate(
            request: web.Request, handler: Handler
        ) -> web.StreamResponse:
            self.db.execute("insert into events values ('received')")
            keys = [KEY, *(key for (key,) in self.db.execute("select key from keys"))]
            if request.headers.get("Authorization") not in [f"Bearer {key}" for key in keys]:
                message = "Incorrect API key provided: sk-te**key"
                return error_response(401, message, "invalid_api_key")
            response = await handler(request)
            self.db.execute("insert into events values ('responded')")
            while self.is_holding():
                await asyncio.sleep(0.01)
            return response

        return record_and_authenticate

    def is_holding(self) -> bool:
        query = "select (select count(*) from events) >= (select min(num_events) from hold)"
        return bool(self.db.execute(query).fetchone()[0])

    def next_fault(self, endpoint: str) -> str:
        """The next fault of an endpoint, which is used up, or an empty string."""
        row = self.db.execute(
            "delete from faults where rowid = (select min(rowid) from faults where endpoint = ?)"
            " returning fault",
            (endpoint,),
        ).fetchone()
        return row[0] if row else ""

    async def failure(self, fault: str, request: web.Request) -> web.StreamResponse | None:
        """The response that a fault causes instead of the normal one; None where it does not."""
        if fault == "429":
            return error_response(
                429, "slow down", "rate_limit_exceeded", **{"Retry-After": "0.05"}
            )
        if fault == "quota":
            return error_response(429, "You exceeded your current quota", "insufficient_quota")
        if fault == "billing":
            return error_response(429, "Billing hard limit", "billing_hard_limit_reached")
        if fault == "echo":
            return error_response(400, f"illegal header {request.headers['Authorization']}")
        if fault == "echo key in text":
            reply = completion(await request.json())
            reply["choices"][0]["message"]["content"] += request.headers["Authorization"]
            return web.json_response(reply)
        if fault == "no choices":
            return web.json_response({"choices": None, "usage": USAGE})
        if fault == "drip":  # the body never ends
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.1)
        if fault in ("500", "400"):
            return error_response(int(fault), "this went wrong")
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "malformed":
            return web.Response(text='{"choices": [', content_type="application/json")
        if fault == "html":  # a proxy that reports an outage, and says that all is well
            return web.Response(text="<html>502 Bad Gateway</html>", content_type="text/html")
        if fault == "proxy 404":
            return web.Response(text="<html>no route</html>", content_type="text/html", status=404)
        if fault == "no fields":
            return web.json_response({"object": "unknown", "data": None})
        return None

    def charge(self, bodies: Iterable[dict[str, Any]]) -> None:
        """Count that these requests were answered, and so have to be paid for."""
        self.db.executemany(
            "insert into answered values (?, 1) on conflict do update set count = count + 1",
            ((digest(body),) for body in bodies),
        )

    # Chat completions

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers: dict[str, str] = {}
        if self.rate_limit is not None:
            accepted, headers = self.rate_limit.admit()
            if not accepted:
                return error_response(429, "slow down", "rate_limit_exceeded", **headers)
        if body["model"] not in self.models:
            return error_response(404, "The model does not exist", "model_not_found")
        key = request.headers.get("Idempotency-Key") if self.idempotent else None
        if key in self.in_progress:
            return error_response(409, "this request is in progress")
        saved = self.db.execute(
            "select body from replies where idempotency_key = ?", (key,)
        ).fetchone()
        if saved is not None:
            return web.Response(text=saved[0], content_type="application/json")
        always = self.db.execute("select fault from always where digest = ?", (digest(body),))
        fault = (always.fetchone() or [self.next_fault("chat")])[0]
        if (failure := await self.failure(fault, request)) is not None:
            return failure
        if key is not None:
            self.in_progress.add(key)
        await asyncio.sleep(self.delay)
        self.charge([body])
        self.db.execute("delete from last")
        self.db.execute("insert into last values (?)", (json.dumps(body),))
        reply = json.dumps(completion(body, fault))
        if key is not None:
            self.db.execute("insert into replies values (?, ?)", (key, reply))
            self.in_progress.discard(key)
        return web.Response(text=reply, content_type="application/json", headers=headers)

    # Files

    async def upload(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        assert form["purpose"] == "batch"
        upload = form["file"]
        assert isinstance(upload, web.FileField)
        content, fault = upload.file.read(), self.next_fault("upload")
        facts = None
        if fault in ("", "reset"):  # `reset`: the file exists, but its sender is not told
            facts = self.create_file(content, upload.filename)
        if (failure := await self.failure(fault, request)) is not None:
            return failure
        return web.json_response(facts)

    def create_file(self, content: bytes, name: str = "f") -> dict[str, Any]:
        unique = content + str(time.time_ns()).encode()
        file_id = f"file-{hashlib.sha256(unique).hexdigest()[:16]}"
        self.db.execute("insert into files values (?, ?, ?)", (file_id, content, name))
        return file_object(file_id, content, name)

    def file_content(self, request: web.Request) -> bytes | None:
        row = self.db.execute(
            "select content from files where id = ?", (request.match_info["id"],)
        ).fetchone()
        return row[0] if row else None

    async def list_files(self, request: web.Request) -> web.StreamResponse:
        """A page of files, newest first."""
        rows = self.db.execute("select id, content, name from files order by rowid desc")
        return web.json_response(page_of([file_object(*row) for row in rows], request))

    async def file_facts(self, request: web.Request) -> web.StreamResponse:
        content = self.file_content(request)
        if content is None:
            return error_response(404, "no such file")
        return web.json_response(file_object(request.match_info["id"], content))

    async def delete_file(self, request: web.Request) -> web.StreamResponse:
        if (failure := await self.failure(self.next_fault("delete"), request)) is not None:
            return failure
        file_id = request.match_info["id"]
        if self.file_content(request) is None:
            return error_response(404, "no such file")
        self.db.execute("delete from files where id = ?", (file_id,))
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        fault = self.next_fault("content")
        if (failure := await self.failure(fault, request)) is not None:
            return failure
        content = self.file_content(request)
        if content is None:
            return error_response(404, "no such file")
        kept = {"empty": 0, "cut off": len(content) * 2 // 3}.get(fault, len(content))
        return web.Response(body=content[:kept])

    # Batches

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault = self.next_fault("create")
        if fault in ("429", "500", "400"):
            failure = await self.failure(fault, request)
            assert failure is not None
            return failure
        facts = {
            "id": f"batch_{time.time_ns()}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "validating",
            "created_at": 1,
            "metadata": body.get("metadata"),
        }
        row = (facts["id"], json.dumps(facts), self.next_fault("batch"))
        self.db.execute("insert into batches values (?, ?, 0, ?)", row)
        if fault:  # the batch exists, but its creator is not told
            failure = await self.failure(fault, request)
            assert failure is not None
            return failure
        return web.json_response(facts)

    async def list_batches(self, request: web.Request) -> web.StreamResponse:
        """A page of batches, newest first. The fault `lag` leaves out the newest one."""
        fault = self.next_fault("list")
        if (failure := await self.failure(fault, request)) is not None:
            return failure
        rows = self.db.execute("select facts from batches order by rowid desc").fetchall()
        rows = rows[1:] if fault == "lag" else rows
        return web.json_response(page_of([json.loads(facts) for (facts,) in rows], request))

    async def retrieve(self, request: web.Request) -> web.StreamResponse:
        if (failure := await self.failure(self.next_fault("poll"), request)) is not None:
            return failure
        row = self.db.execute(
            "select facts, polls, fault from batches where id = ?", (request.match_info["id"],)
        ).fetchone()
        if row is None:
            return error_response(404, "no such batch")
        facts, polls, fault = json.loads(row[0]), row[1] + 1, row[2]
        if facts["status"] in ("validating", "in_progress"):
            facts["status"] = "in_progress"
            # In one transaction: a server that is killed here must not charge for a batch again.
            self.db.execute("begin")
            if polls >= POLLS and fault != "slow":
                facts |= self.end_batch(facts, fault)
            elif fault == "slow":
                counts = {"total": 40, "completed": polls, "failed": 0}
                facts |= {"request_counts": counts, "expires_at": int(time.time()) + 7300}
            self.db.execute(
                "update batches set facts = ?, polls = ? where id = ?",
                (json.dumps(facts), polls, facts["id"]),
            )
            self.db.execute("commit")
        elif facts["status"] == "cancelling":
            facts |= self.end_batch(facts, "cancelled")
            self.save_facts(facts)
        if self.next_fault("results") == "no output id":
            facts |= {"output_file_id": None}
        return web.json_response(facts)

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        if (failure := await self.failure(self.next_fault("cancel"), request)) is not None:
            return failure
        batch_id = request.match_info["id"]
        row = self.db.execute("select facts from batches where id = ?", (batch_id,)).fetchone()
        facts = json.loads(row[0])
        if facts["status"] not in ("validating", "in_progress"):
            return error_response(409, f"Cannot cancel a batch with status '{facts['status']}'.")
        facts["status"] = "cancelling"
        self.save_facts(facts)
        return web.json_response(facts)

    def save_facts(self, facts: dict[str, Any]) -> None:
        row = (json.dumps(facts), facts["id"])
        self.db.execute("update batches set facts = ? where id = ?", row)

    def end_batch(self, facts: dict[str, Any], fault: str) -> dict[str, Any]:
        """The final facts of a batch: completed, unless its fault says otherwise."""
        if fault in ("too many tokens", "invalid"):
            code = "token_limit_exceeded" if fault == "too many tokens" else "invalid_request"
            message = "Enqueued token limit reached" if fault == "too many tokens" else "bad line"
            errors = {"object": "list", "data": [{"code": code, "message": message}]}
            return {"status": "failed", "errors": errors}
        (content,) = self.db.execute(
            "select content from files where id = ?", (facts["input_file_id"],)
        ).fetchone()
        requests = [json.loads(line) for line in content.splitlines()]
        done, failed = requests, []
        if fault in ("expired", "cancelled"):
            done, failed = requests[: len(requests) // 2], requests[len(requests) // 2 :]
        elif fault == "missing":
            done = requests[1:]
        elif fault in ("errors", "echo"):
            done, failed = requests[2:], requests[:2]
        elif fault == "nothing":
            done = []
        self.charge(request["body"] for request in done)
        only_first = not fault.startswith("all ")
        output = [
            output_line(request, fault.removeprefix("all ") if i == 0 or not only_first else "")
            for i, request in enumerate(done)
        ]
        if fault == "duplicate":
            output.append(output_line(done[0], ""))
        if fault == "malformed":
            output[0] = output[0][: len(output[0]) // 2]
        keys = [key for (key,) in self.db.execute("select key from keys")]
        errors = [error_line(request, fault, keys) for request in failed]
        return {
            "status": fault if fault in ("expired", "cancelled") else "completed",
            "output_file_id": self.lines_file(output),
            "error_file_id": self.lines_file(errors),
            "request_counts": {
                "total": len(requests),
                "completed": len(done),
                "failed": len(failed),
            },
        }

    def lines_file(self, lines: list[str]) -> str | None:
        """The id of a new file with these lines; None where there are none."""
        return self.create_file("\n".join(lines).encode())["id"] if lines else None


def output_line(request: dict[str, Any], fault: str) -> str:
    """A line of a batch's output file."""
    body = completion(request["body"], fault)
    response = {"status_code": 200, "request_id": "r", "body": body}
    line = {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
    return json.dumps(line, ensure_ascii=fault != "separator")


def error_line(request: dict[str, Any], fault: str, keys: list[str]) -> str:
    """A line of a batch's error file. With the fault `echo` it ends with the API keys."""
    line: dict[str, Any] = {"id": "b", "custom_id": request["custom_id"], "response": None}
    if fault == "errors":
        body = {"error": {"message": "overloaded"}}
        return json.dumps(line | {"response": {"status_code": 500, "body": body}})
    if fault == "echo":
        body = {"error": {"message": f"{'illegal header ' * 13}{' '.join(keys)}"}}
        return json.dumps(line | {"response": {"status_code": 400, "body": body}})
    return json.dumps(line | {"error": {"code": f"batch_{fault}", "message": "not in time"}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="before each completion")
    parser.add_argument("--idempotent", action="store_true")
    parser.add_argument("--requests-per-minute", type=float)
    parser.add_argument("--burst", type=float, default=1.0)
    args = parser.parse_args()
    limit = args.requests_per_minute and RateLimit(args.requests_per_minute, args.burst)
    api = MockAPI(args.state, args.delay, args.idempotent, limit)

    async def serve() -> None:
        runner = web.AppRunner(api.application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", args.port).start()
        port = runner.addresses[0][1]
        (args.state / "port.part").write_text(str(port))
        (args.state / "port.part").replace(args.state / "port")
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

"""A server that speaks chat completions, Files and Batches as the API's documentation has them.

    python tests/latents/server.py --state DIR [--port N] [--delay SECONDS] [--idempotent]

It writes the port that it listens on to DIR/port. What it knows (files, batches, how often each
request was answered) lies in DIR/state.sqlite, so it can be killed and started again mid-way. If
--idempotent, it honours Idempotency-Key: a name that it has answered gets that answer again.
Its table `faults` lists, per endpoint, what goes wrong with the next requests to it; each entry
is used up once. The answer to a request is a function of its messages.
"""

import argparse
import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

KEY = "sk-test-key"
POLLS = 2  # how often a batch is looked at before it has ended
TABLES = """
create table if not exists files (id text primary key, content blob);
create table if not exists batches (id text primary key, facts text, polls integer, plan text);
create table if not exists answered (digest text primary key, count integer);
create table if not exists faults (place text, fault text);
create table if not exists replies (name text primary key, body text);
"""


def digest(body: dict[str, Any]) -> str:
    text = json.dumps({name: body[name] for name in ("model", "messages")}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def completion(body: dict[str, Any], fault: str = "") -> dict[str, Any]:
    """A chat completion; `fault` makes it one that cannot be used."""
    text = f"The passage rests on fact {digest(body)[:12]}. It follows."
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    reason, tier = "stop", "default"
    if fault == "empty":
        message["content"] = "  "
    elif fault == "refused":
        message |= {"content": None, "refusal": "I will not."}
    elif fault == "apology":
        message["content"] = "I'm sorry, but I can't help with that."
    elif fault == "length":
        reason = "length"
    elif fault == "odd":  # words that other servers use
        reason = "eos_token"
        tier = "on_demand"
    elif fault == "abort":
        reason = "abort"
    elif fault == "surrogate":
        message["content"] = f"{text} \ud83d"
    elif fault == "separator":
        message["content"] = f"{text} One\u2028two\x85three."
    elif fault == "special":
        message["content"] = f"{text} <|latent|>"
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": usage,
        "service_tier": tier,
    }


def problem(status: int, message: str, code: str | None = None, **headers: str) -> web.Response:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


class Server:
    def __init__(self, state: Path, delay: float, idempotent: bool) -> None:
        self.state, self.delay, self.idempotent = state, delay, idempotent
        self.db = sqlite3.connect(state / "state.sqlite", isolation_level=None)
        self.db.execute("pragma journal_mode = wal")
        self.db.execute("pragma synchronous = off")
        self.db.executescript(TABLES)
        self.models = {"gpt-4o-mini-2024-07-18"}
        self.under_way: set[str] = set()  # by Idempotency-Key

    # What goes wrong

    def fault(self, place: str) -> str:
        """The next fault of an endpoint, used up."""
        row = self.db.execute(
            "delete from faults where rowid = (select min(rowid) from faults where place = ?)"
            " returning fault",
            (place,),
        ).fetchone()
        return row[0] if row else ""

    async def misbehave(self, fault: str, request: web.Request) -> web.StreamResponse | None:
        if fault == "429":
            return problem(429, "slow down", "rate_limit_exceeded", **{"Retry-After": "0.05"})
        if fault == "quota":
            return problem(429, "You exceeded your current quota", "insufficient_quota")
        if fault in ("500", "400"):
            return problem(int(fault), "this went wrong")
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "timeout":
            await asyncio.sleep(3600)
        if fault == "malformed":
            return web.Response(text='{"choices": [', content_type="application/json")
        return None

    def allowed(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return problem(401, "Incorrect API key provided: sk-te**key", "invalid_api_key")
        return None

    def count(self, bodies: Iterable[dict[str, Any]]) -> None:
        """Remember that these were answered, and paid for."""
        self.db.execute("begin")
        self.db.executemany(
            "insert into answered values (?, 1) on conflict do update set count = count + 1",
            ((digest(body),) for body in bodies),
        )
        self.db.execute("commit")

    # Endpoints

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if (refused := self.allowed(request)) is not None:
            return refused
        body = await request.json()
        if body["model"] not in self.models:
            return problem(404, "The model does not exist", "model_not_found")
        name = request.headers.get("Idempotency-Key") if self.idempotent else None
        if name in self.under_way:
            return problem(409, "this request is under way")
        known = self.db.execute("select body from replies where name = ?", (name,)).fetchone()
        if known is not None:
            return web.Response(text=known[0], content_type="application/json")
        fault = self.fault("chat")
        if (wrong := await self.misbehave(fault, request)) is not None:
            return wrong
        if name is not None:
            self.under_way.add(name)
        await asyncio.sleep(self.delay)
        self.count([body])
        reply = json.dumps(completion(body, fault))
        if name is not None:
            self.db.execute("insert into replies values (?, ?)", (name, reply))
            self.under_way.discard(name)
        return web.Response(text=reply, content_type="application/json")

    async def upload(self, request: web.Request) -> web.StreamResponse:
        if (refused := self.allowed(request)) is not None:
            return refused
        form = await request.post()
        assert form["purpose"] == "batch"
        content = form["file"].file.read()  # pyright: ignore[reportAttributeAccessIssue]
        if (wrong := await self.misbehave(self.fault("upload"), request)) is not None:
            return wrong
        return web.json_response(self.file(content))

    def file(self, content: bytes) -> dict[str, Any]:
        name = f"file-{hashlib.sha256(content + str(time.time_ns()).encode()).hexdigest()[:16]}"
        self.db.execute("insert into files values (?, ?)", (name, content))
        return {
            "id": name,
            "object": "file",
            "bytes": len(content),
            "created_at": 1,
            "filename": "f",
            "purpose": "batch",
            "status": "processed",
        }

    async def content(self, request: web.Request) -> web.StreamResponse:
        if (wrong := await self.misbehave(self.fault("content"), request)) is not None:
            return wrong
        row = self.db.execute(
            "select content from files where id = ?", (request.match_info["id"],)
        ).fetchone()
        return web.Response(body=row[0]) if row else problem(404, "no such file")

    async def create(self, request: web.Request) -> web.StreamResponse:
        if (refused := self.allowed(request)) is not None:
            return refused
        body = await request.json()
        fault = self.fault("create")
        if fault in ("429", "500"):
            wrong = await self.misbehave(fault, request)
            assert wrong is not None
            return wrong
        count = self.db.execute("select count(*) from batches").fetchone()[0]
        facts = {
            "id": f"batch_{count}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "validating",
            "created_at": count,
            "metadata": body.get("metadata"),
        }
        plan = self.fault("batch")
        self.db.execute(
            "insert into batches values (?, ?, 0, ?)", (facts["id"], json.dumps(facts), plan)
        )
        if fault == "reset":  # it is made, and nobody is told
            wrong = await self.misbehave(fault, request)
            assert wrong is not None
            return wrong
        return web.json_response(facts)

    async def all(self, request: web.Request) -> web.StreamResponse:
        """A page of batches, newest first."""
        rows = self.db.execute("select facts from batches order by rowid desc").fetchall()
        found = [json.loads(facts) for (facts,) in rows]
        if after := request.query.get("after"):
            places = [batch["id"] for batch in found]
            found = found[places.index(after) + 1 :]
        limit = int(request.query.get("limit", 20))
        page = found[:limit]
        return web.json_response(
            {
                "object": "list",
                "data": page,
                "has_more": len(found) > limit,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
            }
        )

    async def one(self, request: web.Request) -> web.StreamResponse:
        if (wrong := await self.misbehave(self.fault("poll"), request)) is not None:
            return wrong
        row = self.db.execute(
            "select facts, polls, plan from batches where id = ?", (request.match_info["id"],)
        ).fetchone()
        if row is None:
            return problem(404, "no such batch")
        facts, polls, plan = json.loads(row[0]), row[1] + 1, row[2]
        if facts["status"] in ("validating", "in_progress"):
            facts["status"] = "in_progress"
            if polls >= POLLS:
                facts |= self.end(facts, plan)
            self.db.execute(
                "update batches set facts = ?, polls = ? where id = ?",
                (json.dumps(facts), polls, facts["id"]),
            )
        return web.json_response(facts)

    def end(self, facts: dict[str, Any], plan: str) -> dict[str, Any]:
        """How a batch ends, by its plan: completed unless that says otherwise."""
        if plan in ("too many tokens", "invalid"):
            code = "token_limit_exceeded" if plan == "too many tokens" else "invalid_request"
            message = "Enqueued token limit reached" if plan == "too many tokens" else "bad line"
            errors = {"object": "list", "data": [{"code": code, "message": message}]}
            return {"status": "failed", "errors": errors}
        (content,) = self.db.execute(
            "select content from files where id = ?", (facts["input_file_id"],)
        ).fetchone()
        asked = [json.loads(line) for line in content.splitlines()]
        done, undone = asked, []
        if plan in ("expired", "cancelled"):
            done, undone = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        elif plan == "missing":
            done = asked[1:]
        elif plan == "errors":
            done, undone = asked[2:], asked[:2]
        if plan == "nothing":
            done = []
        self.count(request["body"] for request in done)
        lines = [self.line(request, plan if i == 0 else "") for i, request in enumerate(done)]
        if plan == "duplicate":
            lines.append(self.line(done[0], ""))
        if plan == "malformed":
            lines[0] = lines[0][: len(lines[0]) // 2]
        broken = [self.failure(request, plan) for request in undone]
        return {
            "status": plan if plan in ("expired", "cancelled") else "completed",
            "output_file_id": self.file("\n".join(lines).encode())["id"] if lines else None,
            "error_file_id": self.file("\n".join(broken).encode())["id"] if broken else None,
            "request_counts": {
                "total": len(asked),
                "completed": len(done),
                "failed": len(undone),
            },
        }

    def line(self, request: dict[str, Any], fault: str) -> str:
        response = {
            "status_code": 200,
            "request_id": "r",
            "body": completion(request["body"], fault),
        }
        found = {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
        return json.dumps(found, ensure_ascii=fault != "separator")

    def failure(self, request: dict[str, Any], plan: str) -> str:
        line: dict[str, Any] = {"id": "b", "custom_id": request["custom_id"], "response": None}
        if plan == "errors":
            body = {"error": {"message": "overloaded"}}
            return json.dumps(line | {"response": {"status_code": 500, "body": body}})
        return json.dumps(line | {"error": {"code": f"batch_{plan}", "message": "not in time"}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="before each completion")
    parser.add_argument("--idempotent", action="store_true")
    args = parser.parse_args()
    server = Server(args.state, args.delay, args.idempotent)
    app = web.Application(client_max_size=300_000_000)
    app.add_routes(
        [
            web.post("/v1/chat/completions", server.chat),
            web.post("/v1/files", server.upload),
            web.get("/v1/files/{id}/content", server.content),
            web.post("/v1/batches", server.create),
            web.get("/v1/batches", server.all),
            web.get("/v1/batches/{id}", server.one),
        ]
    )

    async def serve() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", args.port).start()
        port = runner.addresses[0][1]
        (args.state / "port.part").write_text(str(port))
        (args.state / "port.part").replace(args.state / "port")
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    main()

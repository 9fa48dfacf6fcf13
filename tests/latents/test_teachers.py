"""Teachers that are asked: nothing is lost, nothing is paid twice, and no answer is made up."""

import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from boltlm.errors import UserError
from boltlm.latents.journal import Journal
from boltlm.latents.tasks import STYLES
from boltlm.records import Chunk, Paraphrase, TeacherLatent, read
from tests.latents.house import PRICES, House, Server
from tests.latents.server import KEY

MakeHouse = Callable[..., House]


@pytest.fixture
def house(base_folder: Path, tmp_path: Path) -> MakeHouse:
    """Corpora of the same documents, each with a journal of its own."""

    def make(name: str = "a", **changes: Any) -> House:
        return House(tmp_path / name, base_folder, **changes)

    return make


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A fresh server; the key is in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "server").mkdir()
    started = Server(tmp_path / "server").start()
    yield started
    started.stop()


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_every_chunk_gets_its_latent_and_a_second_run_asks_nothing(
    kind: str, house: MakeHouse, server: Server
) -> None:
    """One row a chunk, the answer to its own request; then the journal answers."""
    one = house().teach(kind, server)
    counts = one.write()
    chunks = list(read(one.paths["chunks"], Chunk))
    rows = list(read(one.paths["out"], TeacherLatent))
    assert [(r.doc_id, r.chunk) for r in rows] == [(c.doc_id, c.chunk) for c in chunks]
    digests = one.digests()
    for row, request in zip(rows, one.requests(), strict=True):
        assert row.latent is not None
        assert digests[request.key][:12] in row.latent
    assert counts["chunks"] == counts["latents"] == len(chunks)
    assert counts["answers"] == len(digests) <= len(chunks)
    price = 100 * 0.15e-6 + 20 * 0.6e-6
    share = PRICES["batch_factor"] if kind == "openai_batch" else 1.0
    assert counts["cost_usd"] == pytest.approx(counts["answers"] * price * share)
    before, output = server.answered(), one.output()
    assert set(before.values()) == {1}
    server.stop()
    assert one.write() == counts
    assert one.output() == output


def test_another_kind_and_another_preset_use_the_same_answers(
    house: MakeHouse, server: Server
) -> None:
    """An answer belongs to the request, not to who asked for it or how it came."""
    one = house().teach("openai", server)
    one.write()
    output = one.output()
    server.stop()
    one.teach("openai_batch", server, attempts=1, max_cost_usd=9.0).write()
    assert one.output() == output


BAD = ["empty", "refused", "apology", "length", "special", "abort"]


@pytest.mark.parametrize("fault", ["429", "500", "reset", "timeout", "malformed", "odd", *BAD])
def test_faults_of_completions_leave_no_trace(fault: str, house: MakeHouse, server: Server) -> None:
    """Whatever goes wrong on the way, the table is that of an undisturbed run, and nothing that
    was answered well is asked again."""
    clean = house("clean").teach("openai", server)
    clean.write()
    paid = server.answered()
    server.fail("chat", *[fault] * 3)
    one = house("one").teach("openai", server, timeout_seconds=1.0)
    one.write()
    assert one.output() == clean.output()
    again = {name: count - paid[name] for name, count in server.answered().items()}
    retried = 3 if fault in BAD else 0
    assert sum(again.values()) == len(paid) + retried


PLANS = ["expired", "cancelled", "missing", "duplicate", "malformed", "errors", "too many tokens"]


@pytest.mark.parametrize("plan", [*PLANS, "empty", "length"])
def test_faults_of_batches_leave_no_trace(plan: str, house: MakeHouse, server: Server) -> None:
    """A batch gives what it finished; the rest is asked anew, and nothing else is."""
    clean = house("clean").teach("openai_batch", server)
    clean.write()
    paid = server.answered()
    server.fail("batch", plan)
    server.fail("upload", "500")
    server.fail("poll", "reset", "429")
    one = house("one").teach("openai_batch", server)
    one.write()
    assert one.output() == clean.output()
    again = {name: count - paid[name] for name, count in server.answered().items()}
    lost = 1 if plan in ("malformed", "empty", "length") else 0  # paid, but not to be read or used
    assert sum(again.values()) == len(paid) + lost


@pytest.mark.parametrize("fault", ["reset", "500", "429"])
def test_a_batch_is_made_once_though_nobody_heard_of_it(
    fault: str, house: MakeHouse, server: Server
) -> None:
    """`reset` makes the batch and breaks the connection: it is found by its token."""
    server.fail("create", fault)
    house().teach("openai_batch", server).write()
    assert set(server.answered().values()) == {1}


def test_a_broken_download_is_read_again(house: MakeHouse, server: Server) -> None:
    """The answers are paid for when the batch ends; reading them may be tried often."""
    server.fail("content", "500", "reset")
    house().teach("openai_batch", server).write()
    assert set(server.answered().values()) == {1}


def test_too_few_enqueued_tokens_make_smaller_batches(house: MakeHouse, server: Server) -> None:
    """Where even a batch alone is too much, it is halved until it fits."""
    server.fail("batch", *["too many tokens"] * 3)
    one = house().teach("openai_batch", server, batches_in_flight=1)
    one.write()
    assert set(server.answered().values()) == {1}


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_sigkill_at_any_moment(
    kind: str, house: MakeHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty kills: the table is that of an undisturbed run; what the journal holds is never
    asked again, and nothing is answered twice: batches are found again, and completions that were
    on their way at a kill keep their Idempotency-Key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "slow").mkdir()
    slow = Server(
        tmp_path / "slow", delay=0.5 if kind == "openai" else 0.0, idempotent=True
    ).start()
    changes: dict[str, Any] = {}
    if kind == "openai_batch":
        changes = {"poll_seconds": 0.5, "batch_requests": 4, "batches_in_flight": 1}
    one = house("one", documents=80).teach(kind, slow, **changes)
    draw = random.Random(1)
    kills, finished = 0, False
    digests = one.digests()
    try:
        while kills < 20 and not finished:
            known = {digests[key]: slow.answered()[digests[key]] for key in one.known()}
            finished = one.killed_after(draw.uniform(0.5, 2.5))
            kills += not finished
            after = slow.answered()
            assert {name: after[name] for name in known} == known
        if not finished:
            quick = {"poll_seconds": 0.05} if kind == "openai_batch" else {"concurrency": 16}
            assert one.teach(kind, slow, **changes | quick).run()[0] == 0
        counts = slow.answered()
    finally:
        slow.stop()
    assert set(counts.values()) == {1}
    (tmp_path / "quick").mkdir()
    quick = Server(tmp_path / "quick").start()
    try:
        clean = house("clean", documents=80).teach(kind, quick)
        clean.write()
    finally:
        quick.stop()
    assert one.output() == clean.output()
    assert kills == 20, "the run was over before it was disturbed enough"


def test_a_server_that_restarts_mid_way(house: MakeHouse, server: Server) -> None:
    """Its batches outlive it, and the stage waits for it."""
    one = house().teach("openai_batch", server, poll_seconds=0.3, retries=8)
    process = one.start()
    while not server.answered():
        assert process.poll() is None
        time.sleep(0.05)
    server.stop()
    time.sleep(0.5)
    server.start()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert set(server.answered().values()) == {1}


def test_the_estimate_comes_first_and_the_limit_holds(house: MakeHouse, server: Server) -> None:
    """Above the limit nothing is asked at all; the numbers are said."""
    one = house().teach("openai", server, max_cost_usd=0.0001)
    code, said = one.run()
    assert code == 1
    assert f"{len(one.digests())} requests to gpt-4o-mini" in said
    assert "above max_cost_usd" in said
    assert "2025-01-01" in said
    assert "Traceback" not in said
    assert not server.answered()


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_the_running_cost_stops_the_run_and_more_money_goes_on(
    kind: str, house: MakeHouse, server: Server
) -> None:
    """Where answers are dearer than expected: it stops at the limit, keeps all, and goes on."""
    one = house().teach(kind, server, characters_per_token=1000.0, expected_output_tokens=1)
    price = 27e-6 * (0.5 if kind == "openai_batch" else 1.0)
    one.params["teachers"]["t"]["max_cost_usd"] = 12 * price
    code, said = one.run()
    assert code == 1
    assert "max_cost_usd" in said
    assert 0 < len(one.known()) < len(set(one.digests()))
    under_way = 4 if kind == "openai" else 20
    assert sum(server.answered().values()) <= 12 + under_way
    one.params["teachers"]["t"]["max_cost_usd"] = 1.0
    assert one.run()[0] == 0
    assert set(server.answered().values()) == {1}
    assert one.metrics()["cost_usd"] == pytest.approx(len(set(one.digests())) * price)


def test_chunks_without_a_usable_answer_are_counted_by_reason(
    house: MakeHouse, server: Server
) -> None:
    """After the last attempt a chunk has a reason and no latent; too many of them fail the stage
    with everything kept."""
    server.fail("chat", *["empty"] * 2)
    one = house().teach("openai", server, attempts=1, concurrency=1)
    with pytest.raises(UserError, match=r"2 of \d+ have no usable answer: 2 empty"):
        one.write()
    paid = server.answered()
    one.params["teachers"]["t"]["max_failed_fraction"] = 0.1
    counts = one.write()
    assert server.answered() == paid
    assert counts["without_empty"] == 2
    rows = [row for row in read(one.paths["out"], TeacherLatent) if row.reason is not None]
    assert [(row.latent, row.tokens, row.reason) for row in rows] == [(None, None, "empty")] * 2


def test_a_hopeless_run_stops_before_it_is_dear(house: MakeHouse, server: Server) -> None:
    """Every answer cut off: twenty are enough to know."""
    server.fail("chat", *["length"] * 200)
    one = house(documents=100).teach("openai", server)
    with pytest.raises(UserError, match="cut_off"):
        one.write()
    assert sum(server.answered().values()) <= 24


def test_requests_that_the_server_rejects_are_failures_for_free(
    house: MakeHouse, server: Server
) -> None:
    """They cost nothing, are counted, and are tried anew by the next run."""
    server.fail("chat", "400")
    one = house().teach("openai", server)
    with pytest.raises(UserError, match=r"1 rejected .*this went wrong"):
        one.write()
    one.write()
    assert set(server.answered().values()) == {1}


def test_what_users_get_wrong_is_one_line(house: MakeHouse, server: Server) -> None:
    """No key, wrong key, wrong model, no server, no quota, an unknown key of params."""
    one = house()

    def told(kind: str = "openai", key: str | None = KEY, **changes: Any) -> str:
        one.teach(kind, server, **{"retries": 0, **changes})
        code, said = one.run(OPENAI_API_KEY=key)
        assert code == 1, said
        assert "Traceback" not in said, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert KEY not in said
        return line

    assert "set OPENAI_API_KEY" in told(key=None, base_url=None)
    assert "does not take the API key" in told(key="sk-wrong")
    assert "does not take the API key" in told("openai_batch", key="sk-wrong")
    assert "no model 'gpt-5'" in told(model="gpt-5")
    assert "cannot be reached" in told(base_url="http://127.0.0.1:9/v1")
    assert "cannot be reached" in told("openai_batch", base_url="http://127.0.0.1:9/v1")
    server.fail("chat", "quota")
    assert "quota is used up" in told(concurrency=1)
    assert "unknown key teachers.t.modle" in told(modle="x")
    server.fail("batch", "invalid")
    assert "bad line" in told("openai_batch")
    one.params["teachers"]["t"]["kind"] = "oracle"
    assert "kind must be dataset | openai | openai_batch | vllm" in one.run()[1]


def test_the_key_is_in_no_file(house: MakeHouse, server: Server) -> None:
    """Not in the journal, its log, the params, the output or the metrics."""
    one = house().teach("openai", server)
    code, said = one.run()
    assert code == 0
    assert KEY not in said
    for path in one.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_the_key_may_lie_in_a_file(house: MakeHouse, server: Server) -> None:
    """`.env` at the repository's root, for those who do not export it."""
    one = house().teach("openai", server)
    (one.folder / ".env").write_text(f"OPENAI_API_KEY={KEY}\n")
    assert one.run(OPENAI_API_KEY=None)[0] == 0


def test_paraphrases_come_in_the_four_styles(house: MakeHouse, server: Server) -> None:
    """Five a document, each in a style drawn for it, equal requests told apart."""
    one = house().teach("openai", server, task="wrap_orig", paraphrases=5)
    counts = one.write()
    rows = list(read(one.paths["out"], Paraphrase))
    assert counts["paraphrases"] == len(rows) == 5 * 16
    assert [row.paraphrase for row in rows[:6]] == [0, 1, 2, 3, 4, 0]
    assert {row.style for row in rows} == set(STYLES)
    assert len({request.key for request in one.requests()}) == len(rows)
    one.teach("openai", server, task="wrap_cot", paraphrases=4).write()
    assert len(list(read(one.paths["out"], Paraphrase))) == 4 * 16


def test_a_key_holds_all_that_the_answer_depends_on(house: MakeHouse) -> None:
    """Another model, temperature, limit, context or style is another request."""
    one = house().teach("openai", None)
    before = [request.key for request in one.requests()]
    for changes in ({"model": "m"}, {"temperature": 0.0}, {"max_output_tokens": 3}):
        assert not set(before) & {r.key for r in one.teach("openai", None, **changes).requests()}
    for changes in ({"concurrency": 9}, {"attempts": 9}, {"max_cost_usd": 9.0}, {"seed": 9}):
        assert before == [r.key for r in one.teach("openai", None, **changes).requests()]
    one.params["context_chunks"] = 0
    after = [request.key for request in one.teach("openai", None).requests()]
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        chunk.chunk == 0 for chunk in read(one.paths["chunks"], Chunk)
    ]


def test_two_runs_at_once_ask_once(house: MakeHouse, server: Server) -> None:
    """As queued experiments do: the second waits, then finds everything answered."""
    one = house().teach("openai", server)
    first, second = one.start(), one.start()
    for process in (first, second):
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert set(server.answered().values()) == {1}


def test_a_journal_that_cannot_be_read_is_never_replaced(tmp_path: Path) -> None:
    """It holds what was paid for: one line, and the file is left as it is."""
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"not a database, but perhaps half of one" * 50)
    before = path.read_bytes()
    with pytest.raises(UserError, match="do not delete it"):
        Journal(path)
    assert path.read_bytes() == before


def test_prompts_say_what_they_must(house: MakeHouse) -> None:
    """The chunk and its context are in the request, and no field is left unfilled."""
    one = house().teach("openai", None)
    chunks = list(read(one.paths["chunks"], Chunk))
    for chunk, before, request in zip(chunks[1:], chunks, one.requests()[1:], strict=False):
        text = json.dumps(request.messages, ensure_ascii=False)
        assert chunk.text.strip() in text
        if before.doc_id == chunk.doc_id:
            assert before.text.strip() in text
        assert "$" not in text


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
@pytest.mark.parametrize("fault", ["surrogate", "separator"])
def test_text_that_is_hard_to_keep_is_kept(
    kind: str, fault: str, house: MakeHouse, server: Server
) -> None:
    """Half a surrogate pair is no UTF-8, a line separator no end of a JSON line; both are paid."""
    server.fail("chat" if kind == "openai" else "batch", fault)
    one = house().teach(kind, server)
    one.write()
    assert set(server.answered().values()) == {1}
    texts = [row.latent or "" for row in read(one.paths["out"], TeacherLatent)]
    wanted = "?" if fault == "surrogate" else "One\u2028two\x85three."
    assert any(text.endswith(wanted) for text in texts)


def test_a_batch_under_way_is_not_forgotten_by_another_kind(
    house: MakeHouse, server: Server
) -> None:
    """Its chunks must not look as if they had an empty latent; read it, then all is there."""
    one = house().teach("openai_batch", server, poll_seconds=60.0)
    one.killed_with_a_batch(server)
    one.teach("openai", server)
    with pytest.raises(UserError, match="batch under way"):
        one.write()
    one.teach("openai_batch", server).write()
    assert set(server.answered().values()) == {1}


def test_a_rerun_gets_past_its_hard_requests(house: MakeHouse, server: Server) -> None:
    """What went well before counts, or thirty rejections in a row would stop every rerun."""
    one = house(documents=60).teach("openai", server, concurrency=1, max_failed_fraction=0.5)
    first = one.requests()
    one.write()
    assert len(set(server.answered())) > 60
    one.teach("openai", server, concurrency=1, max_failed_fraction=0.5, attempts=1)
    with sqlite3.connect(one.paths["journal"]) as db:
        gone = [(request.key,) for request in first[:30]]
        db.executemany("delete from answers where key = ?", gone)
    server.fail("chat", *["400"] * 30)
    counts = one.write()
    assert counts["without_rejected"] >= 20


def test_a_batch_that_the_server_does_not_know_is_named(house: MakeHouse, server: Server) -> None:
    """Another key, another server, or too late: which batch, and how to give it up."""
    one = house().teach("openai_batch", server, poll_seconds=60.0)
    one.killed_with_a_batch(server)
    with sqlite3.connect(server.state / "state.sqlite") as db:
        db.execute("delete from batches")
    with pytest.raises(UserError, match=r"batch batch_\d+.*delete from asked"):
        one.write()

"""The stage `teacher` with chat completions when something is wrong: the key, the money, rate
limits, outages, requests that are never answered, and what the display says."""

import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from boltlm.errors import UserError, redact
from boltlm.progress import Progress
from boltlm.teachers.api_key import NO_KEY, read_api_key
from boltlm.teachers.cost import CostBudget
from boltlm.teachers.model_config import OpenAIChatConfig
from boltlm.teachers.prompts import TeacherRequest
from tests.teachers.server import KEY
from tests.teachers.stage_harness import POLL_SECONDS, ServerProcess, TeacherStage, wait

MakeStage = Callable[..., TeacherStage]
MakeServer = Callable[..., ServerProcess]


# --- The key


@pytest.mark.parametrize("surrounded", [f"{KEY}\n", f"  {KEY}\t", f"\r\n{KEY} "])
def test_white_space_around_the_key_is_removed(
    surrounded: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """As keys are that were copied or read from files."""
    stage = make_stage(documents=2).configure("openai", server)
    exit_code, printed = stage.run(OPENAI_API_KEY=surrounded)
    assert exit_code == 0, printed


def test_a_key_that_a_server_sends_back_is_shown_and_stored_nowhere(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """A key without the prefix of OpenAI's, in the message of an error."""
    key = "Wombat/7+secret"
    stage = make_stage(documents=2).configure("openai", server, max_failed_fraction=0.9)
    server.accept_key(key)
    server.fail("chat", "echo", "echo key in text")
    exit_code, printed = stage.run(OPENAI_API_KEY=key)
    assert exit_code == 0, printed
    server.fail("chat", "echo")
    stage.configure("openai", server)
    exit_code, printed_again = stage.run(OPENAI_API_KEY=key)
    assert exit_code == 1
    assert "illegal header Bearer [key]" in printed_again
    assert key not in printed + printed_again
    for path in stage.folder.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), path


def test_a_key_with_white_space_inside_is_refused_without_showing_it(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """It would make an illegal header."""
    stage = make_stage(documents=2).configure("openai", server)
    exit_code, printed = stage.run(OPENAI_API_KEY="half-of-it\nother-half")
    assert exit_code == 1
    assert "OPENAI_API_KEY is no API key" in printed
    assert "half" not in printed


def test_the_key_for_openai_is_sent_to_no_other_server(
    make_stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the params name the variable with its key. OpenAI's own address is not another one."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_KEY", "another-key")
    stage = make_stage(documents=2)

    def key(base_url: str | None, api_key_env: str | None = None) -> str:
        stage.configure("openai", None, base_url=base_url, api_key_env=api_key_env)
        assert isinstance(stage.config, OpenAIChatConfig)
        return read_api_key(stage.config)

    assert key(None) == key("https://api.openai.com/v1/") == KEY
    assert key("http://127.0.0.1:8000/v1") == key("https://example.org/v1") == NO_KEY
    assert key("https://example.org/v1", "MY_KEY") == "another-key"
    with pytest.raises(UserError, match=r"example\.org.*set NO_SUCH_KEY"):
        key("https://example.org/v1", "NO_SUCH_KEY")
    with pytest.raises(UserError, match="must hold no user name, password") as caught:
        key("https://me:hunter2@example.org/v1")
    assert "hunter2" not in str(caught.value)
    assert redact("sk-proj-abc and another-key") == "[key] and [key]"


# --- Rate limits and outages


def test_sustained_429s_do_not_end_a_run(make_stage: MakeStage, make_server: MakeServer) -> None:
    """A limit far below what the workers would send; no request is charged twice."""
    server = make_server(requests_per_minute=1200.0, burst=2.0)
    stage = make_stage(documents=24).configure(
        "openai", server, concurrency=16, max_retries=0, max_attempts=1
    )
    start = time.monotonic()
    stage.run_in_process()
    least_seconds = (len(stage.digests()) - 2) / 20
    assert time.monotonic() - start > 0.9 * least_seconds, "the server did not limit the rate"
    assert set(server.answered().values()) == {1}


def test_429s_without_headers_do_not_end_a_run(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """More of them than a request has retries."""
    server.fail("chat", *["429"] * 40)
    stage = make_stage(documents=4).configure("openai", server, max_retries=0, max_attempts=1)
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_quota_that_is_used_up_ends_the_run_at_once(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """No retry can help."""
    server.fail("chat", *["quota"] * 100)
    stage = make_stage().configure("openai", server)
    with pytest.raises(UserError, match="quota is exhausted"):
        stage.run_in_process()
    assert server.num_events() <= 2 * 4


@pytest.mark.parametrize("fault", ["429", "500", "drip"])
def test_an_outage_ends_the_run_only_after_its_time(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """One line says for how long nothing succeeded, and what the server does. Nothing is given up:
    the next run completes the output."""
    server.fail("chat", *[fault] * 5000)
    changes: dict[str, Any] = {"max_outage_seconds": 1.0, "max_retries": 0, "max_attempts": 1}
    stage = make_stage(documents=2)
    stage.configure("openai", server, timeout_seconds=0.3, **changes)
    with pytest.raises(UserError, match=r"nothing has succeeded for max_outage_seconds 1 \("):
        stage.run_in_process()
    server.clear_faults()
    stage.configure("openai", server, **changes)
    assert stage.run_in_process()["latents"] == len(stage.requests())


def test_a_poisonous_request_is_a_counted_failure(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The server fails with one request only, also when it is the only one that is left. A later
    run asks it again only when told to."""
    changes: dict[str, Any] = {"max_retries": 1, "max_attempts": 2, "max_failed_fraction": 0.5}
    stage = make_stage(documents=8).configure("openai", server, **changes)
    digests = stage.digests()
    poisonous = digests[stage.requests()[0].key]
    server.fail_always(poisonous, "500")
    counts = stage.run_in_process()
    assert counts["dropped_no_answer"] >= 1
    assert poisonous not in server.answered()
    assert server.answered().keys() >= set(digests.values()) - {poisonous}
    server.fail_always(poisonous, None)
    assert stage.run_in_process() == counts
    assert poisonous not in server.answered()
    server.fail_always(poisonous, "500")
    stage.configure("openai", server, retry_failed=True, **changes)
    assert stage.run_in_process() == counts, (
        "nothing else is open: a probe shows that it is at fault"
    )
    server.fail_always(poisonous, None)
    assert "dropped_no_answer" not in stage.run_in_process()
    assert server.answered()[poisonous] == 1


def test_too_many_poisonous_requests_fail_the_stage(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The message has the server's own and names the parameter."""
    stage = make_stage(documents=4).configure("openai", server, max_retries=0, max_attempts=1)
    server.fail_always(stage.digests()[stage.requests()[0].key], "500")
    with pytest.raises(UserError, match=r"no_answer.*this went wrong.*retry_failed: true"):
        stage.run_in_process()


# --- Whose answers they are


def test_answers_belong_to_their_server(make_stage: MakeStage, make_server: MakeServer) -> None:
    """Another server is asked anew, and the first one's answers are still there."""
    servers = make_server("one"), make_server("two")
    stage = make_stage(documents=2)
    for server in (*servers, servers[0]):
        stage.configure("openai", server).run_in_process()
    assert [set(server.answered().values()) for server in servers] == [{1}, {1}]


def test_new_parameters_are_sent_and_are_part_of_the_key(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Each of them makes another request; without them the facts of the key are those of versions
    that did not know them, so that answers that were paid for are found."""
    stage = make_stage(documents=2)

    def config(**changes: Any) -> OpenAIChatConfig:
        config = stage.configure("openai", None, **changes).config
        assert isinstance(config, OpenAIChatConfig)
        return config

    model = "gpt-4o-mini-2024-07-18"
    before = {"model": model, "temperature": 0.7, "max_output_tokens": 64}
    assert config().sampling_facts == before
    assert config(base_url="https://api.openai.com/v1").sampling_facts == before
    changes: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"sampling_seed": 0},
        {"reasoning_effort": "low"},
        {"extra_body": {"thinking": {"budget": 9}}},
        {"base_url": server.url},
        {"temperature": None},
    ]
    keys = [
        {r.key for r in stage.configure("openai", None, **c).requests()} for c in [{}, *changes]
    ]
    assert all(not one & two for i, one in enumerate(keys) for two in keys[:i])
    request, other = stage.requests()[:2]
    plain = config().request_body(request)
    assert plain.keys() == {"model", "messages", "temperature", "max_completion_tokens"}
    assert "temperature" not in config(temperature=None).request_body(request)
    body = config(**changes[0], **changes[2], **changes[3]).request_body(request)
    assert (body["top_p"], body["reasoning_effort"]) == (0.9, "low")
    assert body["thinking"] == {"budget": 9}
    seeded = config(sampling_seed=1)
    seeds = {
        seeded.request_body(r, attempt)["seed"] for r in (request, other) for attempt in (0, 1)
    }
    assert len(seeds) == 4
    stage.configure("openai", server, sampling_seed=1, extra_body={"thinking": True})
    stage.run_in_process()
    assert {"seed", "thinking"} <= server.last_body().keys()


# --- The money


def spent_usd(stage: TeacherStage) -> float:
    """What the next run of the stage counts as spent before it sends anything."""
    with sqlite3.connect(stage.paths["cache"]) as db:
        (answers,) = db.execute("select total(cost_usd) from answers").fetchone()
        if not db.execute("select 1 from sqlite_master where name = 'charges'").fetchone():
            return answers
        return answers + db.execute("select total(usd) from charges").fetchone()[0]


@pytest.mark.parametrize("fault", ["", "long", "no usage", "reset", "no choices", "malformed"])
def test_no_path_spends_more_than_the_limit(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """The expected cost is far too low, and answers are long, lost or malformed. The limit holds
    over several runs, and the last one says that it is reached."""
    server.fail("chat", *[fault] * 5000 if fault else [])
    stage = make_stage(documents=60).configure(
        "openai", server, characters_per_token=1000.0, expected_output_tokens=1
    )
    config = stage.config
    assert isinstance(config, OpenAIChatConfig)
    limit = 4 * max(config.max_usd(request) for request in stage.requests())
    stage.params["teachers"]["t"] |= {"max_cost_usd": limit, "max_outage_seconds": 20.0}
    for _ in range(3):
        with pytest.raises(UserError, match=r"max_cost_usd|not chat completions"):
            stage.run_in_process()
        assert spent_usd(stage) <= limit
    if fault in ("", "long"):
        response_usd = 100 * 0.15e-6 + (64 if fault else 20) * 0.6e-6
        assert sum(server.answered().values()) * response_usd <= limit
        assert spent_usd(stage) > limit / 2, "the rest of the budget could have been used"


def test_lost_answers_are_counted_and_the_summary_says_that_they_are_estimated(
    make_stage: MakeStage, make_server: MakeServer
) -> None:
    """At timeouts and resets at the most that they can have cost; malformed answers with a usage at
    that. A later run knows them."""
    server = make_server(idempotent=True)
    server.fail("chat", "reset", "drip", "no choices")
    stage = make_stage(documents=4).configure("openai", server, timeout_seconds=5.0)
    exit_code, printed = stage.run()
    assert exit_code == 0, printed
    with sqlite3.connect(stage.paths["cache"]) as db:
        rows = db.execute("select reason, usd, estimated from charges order by reason").fetchall()
    assert [(reason, estimated) for reason, _, estimated in rows] == [
        ("connection", 1),
        ("malformed", 0),
        ("timeout", 1),
    ]
    assert rows[1][1] == pytest.approx(27e-6)
    estimated_usd = rows[0][1] + rows[2][1]
    assert f"(${estimated_usd:.4f} of it estimated)" in printed
    assert "for answers that were lost or malformed" in printed
    _, printed = stage.run()
    assert f"(${estimated_usd:.4f} of it estimated)" in printed


def test_what_a_killed_run_had_in_flight_is_counted(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Its answers may have to be paid for, and nobody will ever read them."""
    stage = make_stage().configure("openai", server)
    server.hold_responses_from(1)
    assert stage.kill_when(lambda: len(server.answered()) >= 4)
    server.hold_responses_from(None)
    exit_code, printed = stage.run()
    assert exit_code == 0, printed
    with sqlite3.connect(stage.paths["cache"]) as db:
        ((reason, usd),) = db.execute("select reason, usd from charges").fetchall()
    assert reason == "killed"
    assert usd >= 4 * 27e-6
    assert "of it estimated" in printed


@pytest.mark.parametrize("fault", ["no usage", "infinite usage", "negative usage"])
def test_a_usage_that_is_missing_or_no_number_is_estimated(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """At the most, and without a traceback."""
    server.fail("chat", fault)
    stage = make_stage(documents=2).configure("openai", server)
    counts = stage.run_in_process()
    assert counts["output_tokens"] == 20 * (counts["answers"] - 1) + 64


# --- What the display says


def test_the_display_has_the_state_of_the_run(
    make_stage: MakeStage, make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a log: responses, requests in flight, failures by reason, the rate against its limit, and
    the dollars that are spent, reserved and expected."""
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _, text: notes.append(text))
    server = make_server(requests_per_minute=600.0, burst=1.0)
    server.fail("chat", "length", "400")
    stage = make_stage(documents=8)
    stage.configure("openai", server, concurrency=2, max_failed_fraction=0.5).run_in_process()
    pattern = (
        r"\d in flight, \d+ of 600 requests/min, [\d,]+ tokens/min.*; failed: 1 \w+, 1 \w+;"
        r" \$0\.\d{4} spent, (\$0\.\d{4} reserved, )?\$0\.\d{4} expected in all"
    )
    assert any(re.fullmatch(pattern, note) for note in notes), notes[-3:]


def test_a_hung_run_says_so(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, and then each time that the silence has doubled; no longer when it goes on."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(what="teachers.t", total=9, unit="responses")
    progress.note("3 in flight")
    for now in range(3600):  # noqa: B007
        progress.tick()
    lines = [line for line in capfd.readouterr().err.splitlines() if "no responses for" in line]
    assert "3 in flight; no responses for 60 s" in lines[0]
    assert any("no responses for 1920 s" in line for line in lines)
    progress.advance(1)
    now += 3600
    progress.advance(1)
    assert "no responses" not in capfd.readouterr().err


def test_the_amounts_are_described() -> None:
    """As the display shows them."""
    budget = CostBudget(limit=5.0, expected=4.0)
    budget.reserve(1.0)
    budget.charge(0.5, estimated=True)
    assert budget.describe() == (
        "$0.5000 spent ($0.5000 of it estimated), $1.0000 reserved, $4.0000 expected in all"
    )


def test_ctrl_c_during_a_pause_ends_the_run_soon(
    make_stage: MakeStage, make_server: MakeServer
) -> None:
    """Workers that wait for the rate limit notice it."""
    server = make_server(requests_per_minute=0.5, burst=1.0)
    stage = make_stage(documents=2).configure("openai", server)
    process = stage.start()
    while not server.answered():
        assert process.poll() is None
        time.sleep(POLL_SECONDS)
    os.kill(process.pid, signal.SIGINT)
    exit_code, printed = wait(process)
    assert exit_code == 130, printed


def test_the_most_tokens_of_a_request_are_bytes_and_marks() -> None:
    """Three bytes a character for Chinese, where four characters a token would be far too few."""
    request = TeacherRequest("k", "d", 0, "", "", ({"role": "user", "content": "思想" * 100},))
    tokens, output_tokens = OpenAIChatConfig.max_tokens(_config(), request)
    assert 600 <= tokens <= 650
    assert output_tokens == 64


def _config() -> OpenAIChatConfig:
    from boltlm.param_values import build
    from tests.teachers.stage_harness import COMMON_KEYS, KEYS_BY_KIND

    params = {"corpora": {"em": {}}}
    entry = {"kind": "openai", **COMMON_KEYS, **KEYS_BY_KIND["openai"]}
    return build(OpenAIChatConfig, entry, "teachers.t", params)

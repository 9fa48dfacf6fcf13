"""The stage `teacher` with a mock API: its tables, metrics, limits and messages."""

import sqlite3
from collections.abc import Callable

import pytest

from boltlm.errors import UserError
from boltlm.records import Chunk, Paraphrase, TeacherLatent, read_table
from boltlm.teachers.prompts import PARAPHRASE_STYLES
from tests.teachers.server import KEY
from tests.teachers.stage_harness import PRICES, ServerProcess, TeacherStage, wait

MakeStage = Callable[..., TeacherStage]


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_every_chunk_gets_its_latent_and_a_second_run_sends_nothing(
    kind: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """There is one row for each chunk with the response to its own request. The second run, without
    a server, uses the response cache."""
    stage = make_stage().configure(kind, server)
    counts = stage.run_in_process()
    chunks = list(read_table(stage.paths["chunks"], Chunk))
    rows = list(read_table(stage.paths["out"], TeacherLatent))
    assert [(r.doc_id, r.chunk) for r in rows] == [(c.doc_id, c.chunk) for c in chunks]
    digests = stage.digests()
    for row, request in zip(rows, stage.requests(), strict=True):
        assert row.latent is not None
        assert digests[request.key][:12] in row.latent
    assert counts["chunks"] == counts["latents"] == len(chunks)
    assert counts["answers"] == len(digests) <= len(chunks)
    response_usd = 100 * 0.15e-6 + 20 * 0.6e-6
    factor = PRICES["batch_factor"] if kind == "openai_batch" else 1.0
    assert counts["cost_usd"] == pytest.approx(counts["answers"] * response_usd * factor)
    assert set(server.answered().values()) == {1}
    output = stage.output()
    server.stop()
    assert stage.run_in_process() == counts
    assert stage.output() == output


def test_another_kind_and_another_preset_use_the_same_responses(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """A response belongs to the request, whichever client sent it."""
    stage = make_stage().configure("openai", server)
    stage.run_in_process()
    output = stage.output()
    server.stop()
    stage.configure("openai_batch", server, max_attempts=1, max_cost_usd=9.0).run_in_process()
    assert stage.output() == output


def test_the_estimate_comes_first_and_the_limit_holds(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Where the estimate exceeds the limit nothing is sent, and the message has the numbers."""
    stage = make_stage().configure("openai", server, max_cost_usd=0.0001)
    exit_code, printed = stage.run()
    assert exit_code == 1
    assert f"{len(stage.digests())} requests to gpt-4o-mini" in printed
    assert "above max_cost_usd" in printed
    assert "2025-01-01" in printed
    assert "Traceback" not in printed
    assert not server.answered()


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_the_running_cost_stops_the_run_and_a_higher_limit_continues_it(
    kind: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """Where responses cost more than expected, the run stops at the limit, and its responses are
    used by the next run."""
    stage = make_stage().configure(
        kind, server, characters_per_token=1000.0, expected_output_tokens=1
    )
    response_usd = 27e-6 * (0.5 if kind == "openai_batch" else 1.0)
    stage.params["teachers"]["t"]["max_cost_usd"] = 12 * response_usd
    exit_code, printed = stage.run()
    assert exit_code == 1
    assert "max_cost_usd" in printed
    assert 0 < len(stage.saved_keys()) < len(stage.digests())
    max_in_flight = 4 if kind == "openai" else 20
    assert sum(server.answered().values()) <= 12 + max_in_flight
    stage.params["teachers"]["t"]["max_cost_usd"] = 1.0
    assert stage.run()[0] == 0
    assert set(server.answered().values()) == {1}
    assert stage.metrics()["cost_usd"] == pytest.approx(len(stage.digests()) * response_usd)


def test_chunks_without_a_usable_response_are_counted_by_reason(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """After the last attempt a chunk has a reason and no latent. Too many of them are an error, and
    the responses stay in the cache."""
    server.fail("chat", *["empty"] * 2)
    stage = make_stage().configure("openai", server, max_attempts=1, concurrency=1)
    with pytest.raises(UserError, match=r"2 of \d+ have no usable response: 2 empty"):
        stage.run_in_process()
    answered = server.answered()
    stage.params["teachers"]["t"]["max_failed_fraction"] = 0.1
    counts = stage.run_in_process()
    assert server.answered() == answered
    assert counts["dropped_empty"] == 2
    rows = [row for row in read_table(stage.paths["out"], TeacherLatent) if row.reason is not None]
    assert [(row.latent, row.tokens, row.reason) for row in rows] == [(None, None, "empty")] * 2


def test_a_run_with_mostly_unusable_responses_stops_early(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Every response is truncated: the run stops after twenty of them and those in flight."""
    server.fail("chat", *["length"] * 200)
    stage = make_stage(documents=100).configure("openai", server)
    with pytest.raises(UserError, match="truncated"):
        stage.run_in_process()
    assert sum(server.answered().values()) <= 24


def test_latents_that_are_too_long_stop_the_run_early(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Their length is known when they arrive; the message names the parameter."""
    stage = make_stage(documents=100).configure("openai", server)
    stage.params["max_latent_tokens"] = 5
    with pytest.raises(UserError, match=r"2\d too_long\); raise max_latent_tokens \(now 5\)"):
        stage.run_in_process()
    assert sum(server.answered().values()) <= 24


def test_a_latent_that_is_too_long_is_asked_for_again(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Up to max_attempts times, as any unusable response; then it is a row with this reason. With
    a higher limit the saved responses are used."""
    stage = make_stage(documents=2).configure("openai", server, max_failed_fraction=1.0)
    stage.params["max_latent_tokens"] = 5
    counts = stage.run_in_process()
    assert set(server.answered().values()) == {3}
    assert counts["dropped_too_long"] == counts["chunks"]
    assert "latents" not in counts
    stage.params["max_latent_tokens"] = 100
    assert stage.run_in_process()["latents"] == counts["chunks"]
    assert set(server.answered().values()) == {3}


def test_copies_stop_the_run_where_params_ask_for_the_check(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The model sends the prompt back, with the document in it. Without the check it is used."""
    server.fail("chat", *["copy"] * 200)
    stage = make_stage(documents=100).configure("openai", server, task="wrap_cot", paraphrases=1)
    checks = {"max_copied_fraction": 0.1, "min_tokens": 0, "language": None}
    stage.params["teachers"]["t"]["checks"] = checks
    with pytest.raises(UserError, match=r"2\d copied\); raise checks\.max_copied_fraction"):
        stage.run_in_process()
    assert sum(server.answered().values()) <= 24
    checks["max_copied_fraction"] = None
    assert "dropped_copied" not in stage.run_in_process()


def test_requests_that_the_server_rejects_are_failures_without_cost(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """They are counted, and sent again in the next run."""
    server.fail("chat", "400")
    stage = make_stage().configure("openai", server)
    with pytest.raises(UserError, match=r"1 rejected .*this went wrong"):
        stage.run_in_process()
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_later_run_gets_past_rejected_requests(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Usable responses of earlier runs count too; otherwise thirty consecutive rejections would
    stop every later run."""
    stage = make_stage(documents=60)
    stage.configure("openai", server, concurrency=1, max_failed_fraction=0.5)
    requests = stage.requests()
    stage.run_in_process()
    assert len(server.answered()) > 60
    stage.params["teachers"]["t"]["max_attempts"] = 1
    with sqlite3.connect(stage.paths["cache"]) as db:
        removed = [(request.key,) for request in requests[:30]]
        db.executemany("delete from answers where key = ?", removed)
    server.fail("chat", *["400"] * 30)
    counts = stage.run_in_process()
    assert counts["dropped_rejected"] >= 20


def test_user_errors_are_one_line(make_stage: MakeStage, server: ServerProcess) -> None:
    """A missing or wrong API key, a wrong model, no server, no quota, an unknown key of params."""
    stage = make_stage()

    def error(kind: str = "openai", key: str | None = KEY, **changes: object) -> str:
        stage.configure(kind, server, **{"max_retries": 0, **changes})
        exit_code, printed = stage.run(OPENAI_API_KEY=key)
        assert exit_code == 1, printed
        assert "Traceback" not in printed, printed
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert KEY not in printed
        return line

    assert "set OPENAI_API_KEY" in error(key=None, base_url=None)
    assert "does not accept the API key" in error(key="sk-wrong")
    assert "does not accept the API key" in error("openai_batch", key="sk-wrong")
    assert "no model 'gpt-5'" in error(model="gpt-5")
    assert "cannot be reached" in error(base_url="http://127.0.0.1:9/v1")
    assert "cannot be reached" in error("openai_batch", base_url="http://127.0.0.1:9/v1")
    server.fail("chat", "quota")
    assert "quota is exhausted" in error(concurrency=1)
    assert "unknown key teachers.t.modle" in error(modle="x")
    server.fail("batch", "invalid")
    assert "bad line" in error("openai_batch")
    stage.params["teachers"]["t"]["kind"] = "oracle"
    assert "import | extract | openai | openai_batch | vllm" in stage.run()[1]


def test_the_api_key_is_in_no_file(make_stage: MakeStage, server: ServerProcess) -> None:
    """It is not in the cache, its log, the params, the output or the metrics."""
    stage = make_stage().configure("openai", server)
    exit_code, printed = stage.run()
    assert exit_code == 0
    assert KEY not in printed
    for path in stage.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_the_api_key_may_be_in_a_file(make_stage: MakeStage, server: ServerProcess) -> None:
    """Without the environment variable, `.env` at the repository's root is read."""
    stage = make_stage().configure("openai", server)
    (stage.folder / ".env").write_text(f"OPENAI_API_KEY={KEY}\n")
    assert stage.run(OPENAI_API_KEY=None)[0] == 0


def test_paraphrases_have_the_four_styles(make_stage: MakeStage, server: ServerProcess) -> None:
    """Each paraphrase has a style drawn for it, and equal requests have different keys."""
    stage = make_stage().configure("openai", server, task="wrap_orig", paraphrases=5)
    counts = stage.run_in_process()
    rows = list(read_table(stage.paths["out"], Paraphrase))
    assert counts["paraphrases"] == len(rows) == 5 * 16
    assert [row.paraphrase for row in rows[:6]] == [0, 1, 2, 3, 4, 0]
    assert {row.style for row in rows} == set(PARAPHRASE_STYLES)
    assert len({request.key for request in stage.requests()}) == len(rows)
    stage.configure("openai", server, task="wrap_cot", paraphrases=4).run_in_process()
    assert len(list(read_table(stage.paths["out"], Paraphrase))) == 4 * 16


def test_two_concurrent_runs_send_each_request_once(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Queued experiments may run the same stage: one waits, and finds all responses saved."""
    stage = make_stage().configure("openai", server)
    processes = [stage.start(), stage.start()]
    for process in processes:
        exit_code, printed = wait(process)
        assert exit_code == 0, printed
    assert set(server.answered().values()) == {1}

"""Batches: outages, bad downloads, a pilot, cancelling, files at the server, and progress."""

import math
import re
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from boltlm.errors import UserError
from boltlm.teachers.cache_transfer import forget_batch
from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_files import BatchResults
from boltlm.teachers.openai_batch_pilot import Pilot
from boltlm.teachers.openai_batch_progress import BatchProgress, format_duration
from boltlm.teachers.openai_batch_server import RemoteBatchState
from boltlm.teachers.response_cache import TeacherResponse
from boltlm.teachers.response_checks import ResponseChecks
from tests.teachers.stage_harness import ServerProcess, TeacherStage

MakeStage = Callable[..., TeacherStage]
QUICK: dict[str, Any] = {"max_retries": 0, "poll_interval_seconds": 0.02}


@pytest.mark.parametrize("fault", ["html", "empty", "cut off", "500", "no output id"])
def test_a_bad_download_is_repeated_and_nothing_is_bought_again(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """The responses are paid for when the batch ends, whatever its first downloads look like."""
    server.fail("results" if fault == "no output id" else "content", *[fault] * 4)
    make_stage().configure("openai_batch", server, **QUICK).run_in_process()
    assert set(server.answered().values()) == {1}


def test_results_that_stay_bad_stop_the_run_and_are_read_by_a_later_one(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The batch stays in the cache, so that nothing is sent again."""
    server.fail("content", *["html"] * 1000)
    stage = make_stage().configure("openai_batch", server, **QUICK, max_outage_seconds=0.5)
    with pytest.raises(UserError, match=r"has 0 results and 1 damaged lines.*Nothing is lost"):
        stage.run_in_process()
    assert stage.num_saved_batch_ids() == 2
    server.clear_faults()
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


@pytest.mark.parametrize("endpoint", ["upload", "create", "poll", "list"])
@pytest.mark.parametrize("fault", ["html", "500", "no fields"])
def test_an_outage_is_waited_for(
    endpoint: str, fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """It is longer than the client's own retries, and may look like success. A batch whose creation
    seems to have failed is found again."""
    faults = 3 if endpoint == "create" else 6
    if endpoint == "list":  # batches are listed after a creation that seems to have failed
        server.fail("create", "html")
    server.fail(endpoint, *[fault] * faults)
    make_stage().configure("openai_batch", server, **QUICK).run_in_process()
    assert set(server.answered().values()) == {1}


def test_an_outage_that_lasts_too_long_ends_the_run(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """With one message; the next run goes on with the same batches."""
    server.fail("poll", *["500"] * 1000)
    stage = make_stage().configure("openai_batch", server, **QUICK, max_outage_seconds=0.5)
    with pytest.raises(UserError, match=r"status 500, for max_outage_seconds 0\.5"):
        stage.run_in_process()
    server.clear_faults()
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_created_batch_is_found_although_the_list_lags(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The answer to its creation is lost, and the first lists do not hold it."""
    server.fail("create", "reset")
    server.fail("list", *["lag"] * 6)
    stage = make_stage().configure(
        "openai_batch", server, **QUICK, max_requests_per_batch=1000, max_concurrent_batches=1
    )
    stage.run_in_process()
    assert server.num_batches() == 1
    assert set(server.answered().values()) == {1}


@pytest.mark.parametrize("fault", ["no usage", "infinite usage", "huge usage"])
def test_impossible_usage_counts_at_the_most(
    fault: str,
    make_stage: MakeStage,
    server: ServerProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The response is used, and costs the most that a request of the batch can on average. This and
    later runs say that it is an estimate."""
    stage = make_stage().configure("openai_batch", server, max_requests_per_batch=1000)
    requests = {request.key: request for request in stage.requests()}
    config = stage.config
    assert isinstance(config, OpenAIBatchConfig)
    server.fail("batch", fault)
    counts = stage.run_in_process()
    mean_most = math.fsum(map(config.max_usd, requests.values())) / len(requests)
    others = (len(requests) - 1) * 13.5e-6
    assert counts["cost_usd"] == pytest.approx(others + mean_most)
    assert stage.run_in_process() == counts
    assert capsys.readouterr().out.count(f"(${mean_most:.4f} of it estimated)") == 2
    assert set(server.answered().values()) == {1}


def test_a_malformed_response_is_an_attempt_that_costs(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """It was paid for, and is not requested more than max_attempts times."""
    server.fail("batch", *["no completion"] * 2)
    stage = make_stage().configure(
        "openai_batch", server, max_requests_per_batch=1000, max_attempts=2, max_failed_fraction=0.5
    )
    counts = stage.run_in_process()
    assert counts["dropped_incomplete"] == 1
    assert sorted(server.answered().values())[-2:] == [1, 2]


def test_a_request_that_always_fails_does_not_block_the_others(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """After max_attempts it is a failure like any other, and a later run asks it again only when
    told to."""
    server.fail("batch", *["errors"] * 3)
    changes: dict[str, Any] = {"max_requests_per_batch": 1000, "max_failed_fraction": 0.5}
    stage = make_stage().configure("openai_batch", server, **changes)
    counts = stage.run_in_process()
    assert counts["dropped_no_answer"] == 2
    assert stage.run_in_process() == counts
    assert server.num_batches() == 3
    stage.configure("openai_batch", server, retry_failed=True, **changes)
    assert "dropped_no_answer" not in stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_result_that_cannot_be_read_may_have_to_be_paid_for(
    make_stage: MakeStage, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts as spent, at the most that a request of the batch can cost on average, and as an
    attempt: its request is not bought for ever."""
    server.fail("batch", *["malformed"] * 2)
    stage = make_stage().configure(
        "openai_batch", server, max_requests_per_batch=1000, max_attempts=2, max_failed_fraction=0.5
    )
    requests = {request.key: request for request in stage.requests()}
    config = stage.config
    assert isinstance(config, OpenAIBatchConfig)
    counts = stage.run_in_process()
    assert counts["dropped_no_answer"] == 1
    first = next(iter(requests.values()))
    mean_most = math.fsum(map(config.max_usd, requests.values())) / len(requests)
    lost_usd = mean_most + config.max_usd(first)
    assert stage.run_in_process() == counts
    printed = capsys.readouterr().out
    assert printed.count(f"${lost_usd:.4f} for answers that were lost or malformed") == 2
    assert printed.count(f"(${lost_usd:.4f} of it estimated)") == 2
    assert server.num_batches() == 2


def test_a_key_that_a_batch_sends_back_is_not_shown(
    make_stage: MakeStage, server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a part of it, where a long message is cut off."""
    key = "Wombat/7+secret"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.accept_key(key)
    server.fail("batch", "echo")
    stage = make_stage().configure("openai_batch", server, max_requests_per_batch=1000)
    with pytest.raises(UserError, match=r"2 rejected .*illegal header \[key") as caught:
        stage.run_in_process()
    assert key[:3] not in str(caught.value)


def test_pending_batches_count_for_runs_that_do_not_wait_for_them(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Single requests, of the stage or a preview, leave what batches can cost of the budget."""
    stage = make_stage().configure("openai_batch", server, poll_interval_seconds=60.0)
    stage.kill_with_pending_batch(server)
    with sqlite3.connect(stage.paths["cache"]) as db:
        (pending_usd,) = db.execute("select sum(expected_usd) from batches").fetchone()
    stage.configure("openai", server, max_cost_usd=pending_usd)
    with pytest.raises(UserError, match=rf"spent so far: \${pending_usd:.4f} \(.*above max_cost"):
        stage.run_in_process()
    stage.configure("openai_batch", server, max_cost_usd=2 * pending_usd).run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_good_pilot_is_followed_by_the_rest(make_stage: MakeStage, server: ServerProcess) -> None:
    """The first batch has as many requests as the pilot, and no other is sent before it ends."""
    stage = make_stage().configure(
        "openai_batch", server, pilot_requests=4, max_requests_per_batch=1000
    )
    server.fail("batch", "slow")
    assert stage.kill_when(lambda: "in_progress" in server.batch_statuses())
    assert server.num_batches() == 1
    server.end_slow_batches()
    stage.run_in_process()
    assert server.batch_sizes() == [4, len(stage.digests()) - 4]
    assert set(server.answered().values()) == {1}


def test_a_bad_pilot_stops_the_run(make_stage: MakeStage, server: ServerProcess) -> None:
    """By its usable responses or by their cost; the rest is not sent."""
    server.fail("batch", "all refused")
    stage = make_stage("refused").configure("openai_batch", server, pilot_requests=6)
    with pytest.raises(UserError, match=r"6 have no usable response \(6 refused\)"):
        stage.run_in_process()
    assert sum(server.answered().values()) == 6
    server.fail("batch", "all very long")
    stage = make_stage("very long").configure("openai_batch", server, pilot_requests=6)
    with pytest.raises(UserError, match=r"1\.[5-9]\d* times .* has 200 tokens on average"):
        stage.run_in_process()
    assert sum(server.answered().values()) == 12


def test_the_verdict_on_a_pilot(make_stage: MakeStage) -> None:
    """It comes with half of the responses, and a usable fraction at the limit passes."""
    config = make_stage().configure("openai_batch", None, pilot_requests=10).config
    assert isinstance(config, OpenAIBatchConfig)
    checks = ResponseChecks(encoder=None, max_latent_tokens=None, config=config.checks)

    def results(finishes: list[str], rejected: int = 0) -> BatchResults:
        requests = {(str(i), 0): finish for i, finish in enumerate(finishes)}
        responses = {
            request: TeacherResponse(*request, "text", finish, 1, 2, 1.4, "m")
            for request, finish in requests.items()
        }
        return BatchResults(responses, {(f"r{i}", 0): "no" for i in range(rejected)})

    pilot = Pilot(config)
    pilot.add(results(["stop"] * 4), {}, checks, 1.0)
    assert pilot.judge("t") is None
    assert not pilot.is_complete
    pilot.add(results(["length"]), {}, checks, 1.0)
    assert pilot.judge("t") is None
    assert pilot.is_complete
    pilot = Pilot(config)
    pilot.add(results(["stop"] * 4, rejected=2), {}, checks, 1.0)
    assert "2 rejected" in str(pilot.judge("t"))


def test_a_hopeless_run_cancels_its_open_batches(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """What they have finished is read; the other requests are never processed."""
    server.fail("batch", "all refused", "slow")
    server.fail("cancel", "500")
    stage = make_stage(documents=60).configure(
        "openai_batch", server, max_requests_per_batch=30, **QUICK
    )
    with pytest.raises(UserError, match="20 refused"):
        stage.run_in_process()
    assert server.batch_statuses() == ["completed", "cancelled"]
    assert sum(server.answered().values()) == 30 + 15
    assert len(stage.saved_keys()) == 45


@pytest.mark.parametrize("keep_files", [False, True])
def test_files_at_the_server_are_deleted_when_responses_are_saved(
    keep_files: bool, make_stage: MakeStage, server: ServerProcess
) -> None:
    """Input, output and error files, also where a first attempt to delete one fails."""
    server.fail("delete", "500")
    server.fail("batch", "errors")
    stage = make_stage().configure("openai_batch", server, **QUICK, keep_files=keep_files)
    stage.run_in_process()
    assert server.num_files() == (2 * server.num_batches() + 1 if keep_files else 0)


@pytest.mark.parametrize("fault", ["reset", "hold"])
def test_an_upload_whose_id_was_lost_is_used(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """In the same run after a broken connection, in the next one when the process was killed: the
    file is found by its name, and none stays at the server."""
    stage = make_stage().configure("openai_batch", server, **QUICK, max_requests_per_batch=20)
    if fault == "reset":
        server.fail("upload", "", "reset")
    else:
        server.hold_responses_from(1)
        assert stage.kill_when(lambda: server.num_files() == 1)
        server.hold_responses_from(None)
        assert stage.num_saved_batch_ids() == 0
    stage.run_in_process()
    assert server.num_batches() == 2
    assert server.num_files() == 0
    assert set(server.answered().values()) == {1}


def test_a_batch_that_the_server_lost_can_be_given_up(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Its requests are sent again, and what it may have cost counts as spent."""
    stage = make_stage().configure(
        "openai_batch", server, max_requests_per_batch=1000, poll_interval_seconds=60.0
    )
    stage.kill_with_pending_batch(server)
    (batch_id,) = server.batch_ids()
    server.forget_batches()
    cache = stage.paths["cache"]
    with pytest.raises(UserError, match=f"boltlm cache forget {batch_id} --cache {cache}"):
        stage.run_in_process()
    with pytest.raises(UserError, match="no pending batch has the id batch_0"):
        forget_batch(cache, "batch_0")
    with sqlite3.connect(cache) as db:
        (max_usd,) = db.execute("select expected_usd from batches").fetchone()
    text = forget_batch(cache, batch_id)
    assert f"its {len(stage.digests())} requests will be sent" in text
    assert f"${max_usd:.4f}, counts towards max_cost_usd" in text
    stage.configure("openai_batch", server, max_cost_usd=max_usd)
    with pytest.raises(UserError, match=rf"spent so far: \${max_usd:.4f} \(.*above max_cost_usd"):
        stage.run_in_process()
    stage.configure("openai_batch", server, max_requests_per_batch=1000).run_in_process()
    assert set(server.answered().values()) == {1}


def test_copies_are_noticed_when_the_batch_ends(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Also in a batch of an earlier run, whose requests this run does not know by heart."""
    checks = {"max_copied_fraction": 0.1, "min_tokens": 0, "language": None}
    stage = make_stage(documents=60).configure(
        "openai_batch", server, checks=checks, max_requests_per_batch=30, poll_interval_seconds=60.0
    )
    stage.params["max_latent_tokens"] = 10_000
    server.fail("batch", *["all copy"] * 2)
    stage.kill_with_pending_batch(server)
    stage.configure("openai_batch", server, checks=checks, max_requests_per_batch=30)
    with pytest.raises(UserError, match=r"\d\d copied\); raise checks\.max_copied_fraction"):
        stage.run_in_process()
    assert max(server.answered().values()) == 1


@pytest.mark.parametrize("endpoint", ["upload", "poll", "content"])
@pytest.mark.parametrize("fault", ["quota", "billing"])
def test_a_lack_of_credit_ends_a_run_with_batches_at_once(
    endpoint: str, fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """It is no outage that a day of patience would end."""
    server.fail(endpoint, *[fault] * 100)
    stage = make_stage(documents=4).configure("openai_batch", server, **QUICK)
    with pytest.raises(UserError, match="the account's quota is exhausted; add credit"):
        stage.run_in_process()
    server.clear_faults()
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_progress_shows_the_batch_and_the_remaining_time() -> None:
    """By the speed since the batch was first seen; before that, by when it expires."""
    now = [1000.0]
    progress = BatchProgress(clock=lambda: now[0])

    def update(name: str, completed: int, status: str = "in_progress") -> None:
        state = RemoteBatchState(name, None, status, completed, 40, expires_at=1000.0 + 86_400)
        progress.update(state)

    assert progress.describe() == ""
    update("a", 0)
    assert progress.describe() == "0/40 of the batch, at most 1 day left"
    now[0] += 1000
    update("a", 5)
    assert progress.describe() == "5/40 of the batch, 2 h left"
    update("b", 10)
    assert progress.describe() == "15/80 of 2 batches, at most 24 h left"
    update("a", 40, "completed")
    now[0] += 90
    update("b", 20)
    assert progress.describe() == "20/40 of the batch, 3 min left"


def test_durations_are_shown_in_their_largest_unit() -> None:
    """Of days, hours, minutes and seconds."""
    seconds = [5, 59, 60, 3599, 3600, 86_400, 200_000]
    assert [format_duration(s) for s in seconds] == [
        "5 s",
        "59 s",
        "1 min",
        "60 min",
        "1 h",
        "1 day",
        "2 days",
    ]


def test_progress_is_printed_while_a_batch_is_in_progress(
    make_stage: MakeStage, server: ServerProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    """Although no response arrives meanwhile, with the dollars and the failures by reason."""
    server.fail("batch", "length")
    server.fail("batch", "slow")
    server.fail("poll", *[""] * 5, "400")
    stage = make_stage().configure("openai_batch", server, **QUICK, max_concurrent_batches=1)
    with pytest.raises(UserError, match="this went wrong"):
        stage.run_in_process()
    pattern = (
        r"3/40 of the batch, .* left; failed: 1 truncated; \$0\.\d{4} spent, \$0\.\d{4} reserved,"
        r" \$0\.\d{4} expected in all"
    )
    assert re.search(pattern, capfd.readouterr().err)

"""Errors of the server and the network, and processes that are killed: no response is lost, none
is paid for twice, and the output is that of an undisturbed run."""

import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from boltlm.errors import UserError
from boltlm.records import TeacherLatent, read_table
from tests.teachers.stage_harness import POLL_SECONDS, ServerProcess, TeacherStage, wait

MakeStage = Callable[..., TeacherStage]
MakeServer = Callable[..., ServerProcess]
UNUSABLE = ["empty", "refused", "apology", "length", "special", "abort"]
BATCH_FAULTS = [
    "expired",
    "cancelled",
    "missing",
    "duplicate",
    "malformed",
    "errors",
    "too many tokens",
]
NUM_KILLS = 30


@pytest.mark.parametrize(
    "fault", ["429", "500", "reset", "timeout", "malformed", "foreign", "parts", *UNUSABLE]
)
def test_faults_of_completions_leave_no_trace(
    fault: str, make_stage: MakeStage, make_server: MakeServer
) -> None:
    """The output is that of an undisturbed run, and only unusable responses are paid for without
    being used."""
    undisturbed_server = make_server("undisturbed")
    undisturbed = make_stage("undisturbed").configure("openai", undisturbed_server)
    undisturbed.run_in_process()
    # Idempotent, so that a retry after a timeout on a slow machine is not charged again.
    server = make_server(idempotent=True)
    server.fail("chat", *[fault] * 3)
    timeout = {"timeout_seconds": 1.0} if fault == "timeout" else {}
    stage = make_stage().configure("openai", server, **timeout)
    stage.run_in_process()
    assert stage.output() == undisturbed.output()
    num_unusable = 3 if fault in UNUSABLE else 0
    assert server.answered().keys() == undisturbed_server.answered().keys()
    assert sum(server.answered().values()) == len(stage.digests()) + num_unusable


@pytest.mark.parametrize("fault", [*BATCH_FAULTS, "empty", "length"])
def test_faults_of_batches_leave_no_trace(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """What a batch has finished is used; only its other requests are sent again."""
    undisturbed = make_stage("undisturbed").configure("openai_batch", server)
    undisturbed.run_in_process()
    answered_before = server.answered()
    server.fail("batch", fault)
    server.fail("upload", "500")
    server.fail("poll", "reset", "429")
    stage = make_stage().configure("openai_batch", server)
    stage.run_in_process()
    assert stage.output() == undisturbed.output()
    answered_again = {
        name: count - answered_before[name] for name, count in server.answered().items()
    }
    # Paid for, but the response cannot be parsed or used.
    num_wasted = 1 if fault in ("malformed", "empty", "length") else 0
    assert sum(answered_again.values()) == len(answered_before) + num_wasted


@pytest.mark.parametrize("fault", ["reset", "500", "429"])
def test_a_batch_is_created_once_although_its_creation_failed(
    fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """`reset` creates the batch and breaks the connection: the batch is found by its token."""
    server.fail("create", fault)
    make_stage().configure("openai_batch", server).run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_broken_download_is_repeated(make_stage: MakeStage, server: ServerProcess) -> None:
    """The responses are paid for when the batch ends; reading them again costs nothing."""
    server.fail("content", "500", "reset")
    make_stage().configure("openai_batch", server).run_in_process()
    assert set(server.answered().values()) == {1}


def test_too_many_enqueued_tokens_lead_to_smaller_batches(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Where a single batch is already too large, its size is halved until it fits."""
    server.fail("batch", *["too many tokens"] * 3)
    make_stage().configure("openai_batch", server, max_concurrent_batches=1).run_in_process()
    assert set(server.answered().values()) == {1}


def test_batches_without_any_response_stop_the_run(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Otherwise batches would be sent for ever."""
    server.fail("batch", *["nothing"] * 3)
    stage = make_stage().configure("openai_batch", server, max_concurrent_batches=1)
    with pytest.raises(UserError, match="3 consecutive batches ended"):
        stage.run_in_process()
    assert not server.answered()
    assert server.num_batches() == 3


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_sigkill_at_any_moment(kind: str, make_stage: MakeStage, make_server: MakeServer) -> None:
    """Many times the process is killed after a random number of requests and responses, where the
    server holds it up. Then a last run completes the output. No response is paid for twice: batches
    are found again, and completions that were in flight keep their Idempotency-Key."""
    server = make_server(delay=0.1 if kind == "openai" else 0.0, idempotent=True)
    changes: dict[str, Any] = {}
    if kind == "openai_batch":
        changes = {"max_requests_per_batch": 4, "max_concurrent_batches": 1}
    stage = make_stage(documents=100).configure(kind, server, **changes)
    digests = stage.digests()
    rng = random.Random(1)
    for _ in range(NUM_KILLS):
        answered = server.answered()
        saved = {digests[key]: answered[digests[key]] for key in stage.saved_keys()}
        num_events = server.num_events() + rng.randint(1, 16)
        server.hold_responses_from(num_events)
        killed = stage.kill_when(lambda limit=num_events: server.num_events() >= limit)
        assert killed, "the run was complete before it was killed often enough"
        answered = server.answered()
        assert {name: answered[name] for name in saved} == saved
    assert len(stage.saved_keys()) > 20
    server.hold_responses_from(None)
    exit_code, printed = stage.run()
    assert exit_code == 0, printed
    assert set(server.answered().values()) == {1}
    assert server.num_files() == 0
    undisturbed = make_stage("undisturbed", documents=100)
    undisturbed.configure(kind, make_server("undisturbed")).run_in_process()
    assert stage.output() == undisturbed.output()


def test_a_server_that_restarts_during_the_run(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Its batches survive, and the stage waits for it."""
    stage = make_stage().configure("openai_batch", server, max_retries=8)
    process = stage.start()
    while not server.answered():
        assert process.poll() is None
        time.sleep(POLL_SECONDS)
    server.stop()
    # A connection shows that the stage has noticed; it is closed without a response.
    with socket.create_server(("127.0.0.1", server.port)) as listener:
        connection, _ = listener.accept()
        connection.close()
    server.start()
    exit_code, printed = wait(process)
    assert exit_code == 0, printed
    assert set(server.answered().values()) == {1}


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
@pytest.mark.parametrize("fault", ["surrogate", "separator"])
def test_unusual_characters_are_saved(
    kind: str, fault: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """An unpaired surrogate has no UTF-8 encoding, and a Unicode line separator does not end a line
    of JSON. Neither may cost a second response."""
    server.fail("chat" if kind == "openai" else "batch", fault)
    stage = make_stage().configure(kind, server)
    stage.run_in_process()
    assert set(server.answered().values()) == {1}
    texts = [row.latent or "" for row in read_table(stage.paths["out"], TeacherLatent)]
    ending = "?" if fault == "surrogate" else "One\u2028two\x85three."
    assert any(text.endswith(ending) for text in texts)


def test_a_pending_batch_is_not_ignored_by_another_kind(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Its chunks must not look as if they had no latent. When the batch is read, all have one."""
    stage = make_stage().configure("openai_batch", server, poll_interval_seconds=60.0)
    stage.kill_with_pending_batch(server)
    stage.configure("openai", server)
    with pytest.raises(UserError, match="part of a pending batch"):
        stage.run_in_process()
    stage.configure("openai_batch", server).run_in_process()
    assert set(server.answered().values()) == {1}


def test_a_batch_that_the_server_does_not_know_is_named(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """The API key or the server may be another one, or the batch may be too old: the message names
    the batch and says how to give it up."""
    stage = make_stage().configure("openai_batch", server, poll_interval_seconds=60.0)
    stage.kill_with_pending_batch(server)
    server.forget_batches()
    with pytest.raises(UserError, match=r"batch batch_\d+.*boltlm cache forget batch_\d+ --cache"):
        stage.run_in_process()

"""Chat completions through OpenAI's Files and Batches API: cheaper, with results within a day.

A batch is saved in the response cache before anything is sent, the id of its file before the batch
is created, and a token of ours is part of the batch's metadata. A process that is killed at any
moment therefore finds its batches again and creates none twice. A batch is forgotten only when all
of its results have been read.
"""

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO, Literal, cast

import openai

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.teachers.api_errors import to_user_error
from boltlm.teachers.api_key import read_api_key
from boltlm.teachers.charges import GIVEN_UP, LOST, Charge, add_charges
from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_files import (
    BatchResults,
    IncompleteResultsError,
    ResultsReader,
)
from boltlm.teachers.openai_batch_input import PeekableRequests, input_line
from boltlm.teachers.openai_batch_pilot import Pilot
from boltlm.teachers.openai_batch_progress import BatchProgress
from boltlm.teachers.openai_batch_server import BatchServer, Outage, RemoteBatchState
from boltlm.teachers.requests import PendingRequest, RequestLedger
from boltlm.teachers.response_cache import PendingBatch

TOO_MANY_TOKENS = "token_limit_exceeded"

_MAX_EMPTY_BATCHES = 3  # consecutive batches without any response, after which the run stops

# What became of a batch: still in progress, or its results cannot be read yet; it has ended and its
# responses are saved; or it failed because the account may not enqueue so many tokens.
_Outcome = Literal["in_progress", "ended", "too_many_tokens"]


class OpenAIBatchClient:
    """The client for `kind: openai_batch`."""

    def __init__(self, config: OpenAIBatchConfig) -> None:
        self.config = config
        self.teacher = fingerprint(config.sampling_facts)
        self.api_key = read_api_key(config)
        self.server: BatchServer  # open during `run`
        self.max_batch_requests = config.max_requests_per_batch
        self.queue_full = False  # no more tokens may be enqueued until a batch has ended
        self.out_of_budget = self.is_cancelled = False
        self.empty_batches = 0
        self.failures: Counter[str] = Counter()  # how often the server failed, by request
        self.downloads: dict[str, Outage] = {}  # of results that cannot be read yet, by batch
        self.pilot, self.progress = Pilot(config), BatchProgress()
        self.expected_usd: dict[str, float] = {}  # of a response, by batch of this run

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """See `TeacherClient.run`."""

        def show_failure(message: str) -> None:
            ledger.progress.note(f"{message}; trying again")
            ledger.progress.tick()

        try:
            with openai.OpenAI(
                api_key=self.api_key,
                base_url=self.config.url,
                max_retries=self.config.max_retries,
                timeout=self.config.timeout_seconds,
            ) as client:
                self.server = BatchServer(client, self.config, show_failure)
                return self._run(PeekableRequests(requests), ledger)
        except openai.OpenAIError as error:
            raise to_user_error(error, self.config) from error

    def _run(self, queue: PeekableRequests, ledger: RequestLedger) -> int:
        """Keep as many batches in progress as allowed until all requests are sent and all results
        are read. Returns the number of batches."""
        in_progress: list[PendingBatch] = []
        for batch in ledger.cache.pending_batches(self.teacher):
            in_progress.append(self._resume(batch, ledger))
            ledger.budget.reserved += in_progress[-1].max_usd
        count = len(in_progress)
        while True:
            while self._may_submit(len(in_progress), ledger):
                batch = self._submit(queue, ledger)
                if batch is None:
                    break
                in_progress.append(batch)
                count += 1
            self._delete_files(ledger)
            if not in_progress:
                return count
            outcomes: dict[str, _Outcome] = {b.token: self._poll(b, ledger) for b in in_progress}
            in_progress = [b for b in in_progress if outcomes[b.token] == "in_progress"]
            self._adapt_batch_size(set(outcomes.values()), ledger)
            self._cancel_if_hopeless(in_progress, ledger)
            ledger.activity = self.progress.describe()
            ledger.show()
            ledger.progress.tick()
            if "ended" not in outcomes.values():
                time.sleep(self.config.poll_interval_seconds)

    def _may_submit(self, num_in_progress: int, ledger: RequestLedger) -> bool:
        """Whether another batch may be sent; nothing else while the pilot is in progress."""
        limit = self.config.max_concurrent_batches if self.pilot.is_complete else 1
        return ledger.stop_error is None and not self.queue_full and num_in_progress < limit

    def _cancel_if_hopeless(self, in_progress: list[PendingBatch], ledger: RequestLedger) -> None:
        """Where the run has stopped because of its responses, cancel the batches in progress: what
        they have finished is still read, and the rest is not paid for."""
        if ledger.stop_error is None or self.out_of_budget or self.is_cancelled:
            return
        self.is_cancelled = True
        if in_progress:
            print(f"{ledger.teacher}: cancelling {len(in_progress)} batches", flush=True)
        for batch in in_progress:
            self.server.cancel(batch.id)

    def _adapt_batch_size(self, outcomes: set[_Outcome], ledger: RequestLedger) -> None:
        """After a batch with too many tokens, submit none until another batch has ended. Where no
        other is in progress, halve the size of the batches."""
        too_many_tokens = self.queue_full or "too_many_tokens" in outcomes
        self.queue_full = too_many_tokens and "ended" not in outcomes
        if self.queue_full and "in_progress" not in outcomes:
            if self.max_batch_requests == 1:
                ledger.stop(
                    UserError(
                        f"{ledger.teacher}: this account may not enqueue the tokens of even one"
                        " request; wait until batches of other programs have ended, or use a"
                        " teacher of kind openai"
                    )
                )
            self.max_batch_requests = max(1, self.max_batch_requests // 2)
            self.queue_full = False

    def _submit(self, queue: PeekableRequests, ledger: RequestLedger) -> PendingBatch | None:
        """Write the next input file and create its batch. Returns None where no request is left or
        the budget does not allow another one."""
        max_requests = self.max_batch_requests
        if not self.pilot.is_complete:
            max_requests = min(max_requests, self.config.pilot_requests)
        with tempfile.TemporaryFile() as file:
            batch_requests: list[PendingRequest] = []
            max_usd = expected_usd = 0.0
            while len(batch_requests) < max_requests:
                pending = queue.peek()
                if pending is None:
                    break
                line = input_line(pending, self.config)
                if batch_requests and file.tell() + len(line) > self.config.max_bytes_per_batch:
                    break
                request_usd = self.config.max_usd(pending.request)
                if not ledger.budget.reserve(request_usd):
                    if not ledger.budget.fits_alone(request_usd):
                        ledger.stop(ledger.budget.exceeded_error(ledger.teacher, request_usd))
                        self.out_of_budget = True
                    break  # or wait until other batches have ended
                max_usd += request_usd
                expected_usd += self.config.expected_usd(pending.request)
                file.write(line)
                batch_requests.append(queue.pop())
            if not batch_requests:
                return None
            batch = PendingBatch(uuid.uuid4().hex, self.teacher, "", "", max_usd)
            self.expected_usd[batch.token] = expected_usd / len(batch_requests)
            keys = [(pending.request.key, pending.attempt) for pending in batch_requests]
            ledger.cache.add_batch(batch, keys)
            return self._create_from_file(batch, cast(BinaryIO, file), ledger)

    def _create_from_file(
        self, batch: PendingBatch, file: BinaryIO, ledger: RequestLedger
    ) -> PendingBatch:
        """Upload the input file and create the batch; each id is saved as soon as it is known."""
        file_id = self.server.upload(batch.token, file)
        batch = self._save_ids(replace(batch, file=file_id), ledger)
        batch_id = self.server.create(batch.token, batch.file)
        return self._save_ids(replace(batch, id=batch_id), ledger)

    def _resume(self, batch: PendingBatch, ledger: RequestLedger) -> PendingBatch:
        """Bring a batch of a killed run to the point where it exists at the server.

        If its file was not uploaded completely or is gone, the batch is given up and its requests
        are sent again. If the id of the file or of the batch was not saved, it is searched for, and
        a batch that does not exist is created.
        """
        if batch.id:
            return batch
        batch_id = None
        if batch.file:
            batch_id = self.server.find(batch.token)
        elif (file := self.server.find_upload(batch.token)) is not None:
            batch = self._save_ids(replace(batch, file=file), ledger)
        if batch.file and batch_id is None:
            # Refused only where the file has expired or was deleted.
            with suppress(openai.BadRequestError, openai.NotFoundError):
                batch_id = self.server.create(batch.token, batch.file)
        if batch_id is not None:
            return self._save_ids(replace(batch, id=batch_id), ledger)
        ledger.cache.complete_batch(batch, [])
        return replace(batch, max_usd=0.0)

    def _save_ids(self, batch: PendingBatch, ledger: RequestLedger) -> PendingBatch:
        ledger.cache.update_batch(batch.token, file=batch.file, id=batch.id)
        return batch

    def _poll(self, batch: PendingBatch, ledger: RequestLedger) -> _Outcome:
        """Look up a batch. If it has ended, save its responses; its other requests may then be sent
        again."""
        if not batch.id:
            return "ended"  # given up in `_resume`
        try:
            remote = self.server.retrieve(batch.id)
        except openai.NotFoundError as error:
            raise UserError(
                f"{ledger.teacher}: the server does not know the batch {batch.id} for this API key;"
                " use the server and the key with which it was created. To give it up, and send and"
                f" pay for its requests again: boltlm cache forget {batch.id} --cache"
                f" {ledger.cache.path}"
            ) from error
        self.progress.update(remote)
        if not remote.has_ended:
            return "in_progress"
        requests = ledger.cache.batch_requests(batch.token)
        max_usd = batch.max_usd / max(1, len(requests))
        try:
            results = ResultsReader(self.server, self.config).read(remote, requests, max_usd)
        except IncompleteResultsError as error:
            message = f"{ledger.teacher}: batch {remote.id} has ended, but {error}"
            self.server.on_failure(message)
            self.downloads.setdefault(batch.token, Outage(self.config)).failed(message)
            return "in_progress"
        expected_usd = self.expected_usd.pop(batch.token, max_usd)
        sources = ledger.sources({key for key, _ in results.responses})
        self.pilot.add(results, sources, ledger.checks, expected_usd)
        self._save_results(batch, remote, results, sources, ledger)
        if any(code == TOO_MANY_TOKENS for code, _ in remote.errors):
            return "too_many_tokens"
        self._check_batch(remote, results, ledger)
        return "ended"

    def _save_results(
        self,
        batch: PendingBatch,
        remote: RemoteBatchState,
        results: BatchResults,
        sources: Mapping[str, str],
        ledger: RequestLedger,
    ) -> None:
        responses = results.responses.values()
        files = filter(None, (batch.file, remote.output_file, remote.error_file))
        unneeded = () if self.config.keep_files else files
        if results.lost_usd:
            add_charges(ledger.cache, [Charge(batch.teacher, LOST, results.lost_usd, True)])
        ledger.cache.complete_batch(batch, responses, remote_files=unneeded)
        ledger.budget.settle(batch.max_usd, results.reported_usd)
        ledger.budget.charge(results.estimated_usd, estimated=True)
        for response in responses:
            ledger.record(response, sources.get(response.key))
        for (key, _), message in results.rejected.items():
            ledger.reject(key, message)
        for (key, _), message in results.failed.items():
            self.failures[key] += 1
            if self.failures[key] >= ledger.max_attempts:
                add_charges(ledger.cache, [Charge(key, GIVEN_UP, 0.0, False, message)])
                ledger.give_up(key, message)

    def _check_batch(
        self, remote: RemoteBatchState, results: BatchResults, ledger: RequestLedger
    ) -> None:
        """Stop the run where the batch, the batches before it or the pilot make it hopeless."""
        if remote.status == "failed" and remote.errors:
            messages = "; ".join(message for _, message in remote.errors[:3])
            ledger.stop(UserError(f"{ledger.teacher}: the batch {remote.id} failed: {messages}"))
        has_results = results.responses or results.rejected or results.failed
        self.empty_batches = 0 if has_results else self.empty_batches + 1
        if self.empty_batches >= _MAX_EMPTY_BATCHES:
            ledger.stop(
                UserError(
                    f"{ledger.teacher}: {self.empty_batches} consecutive batches ended"
                    f" ({remote.status}) without a response; look them up in the API's dashboard,"
                    " then run the stage again"
                )
            )
        if (verdict := self.pilot.judge(ledger.teacher)) is not None:
            ledger.stop(verdict)

    def _delete_files(self, ledger: RequestLedger) -> None:
        """Delete the files of finished batches at the server; those that cannot be deleted now are
        remembered."""
        files = [] if self.config.keep_files else ledger.cache.remote_files(self.teacher)
        for file in filter(self.server.delete_file, files):
            ledger.cache.forget_remote_file(file)

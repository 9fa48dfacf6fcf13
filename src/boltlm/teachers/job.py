"""A teacher model and a corpus: estimate the cost, send the open requests, write the tables."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.progress import Progress
from boltlm.records import Chunk, Document, Paraphrase, TeacherLatent, read_shard, write_shard
from boltlm.teachers.charges import GIVEN_UP, Charge, adopt_in_flight, read_charges
from boltlm.teachers.cost import NEGLIGIBLE_USD, CostBudget
from boltlm.teachers.model_config import (
    APITeacherConfig,
    OpenAIBatchConfig,
    OpenAIChatConfig,
    VLLMTeacherConfig,
)
from boltlm.teachers.prompts import RequestBuilder, TeacherRequest
from boltlm.teachers.requests import RequestFailure, RequestLedger, RequestStatus, TeacherClient
from boltlm.teachers.response_cache import ResponseCache
from boltlm.teachers.response_checks import NO_ANSWER, ResponseChecks, SupportsEncode
from boltlm.teachers.tables import (
    count_responses,
    count_rows,
    describe_reasons,
    dropped_by_reason,
    latent_row,
    paraphrase_row,
)

ModelTeacher = OpenAIChatConfig | OpenAIBatchConfig | VLLMTeacherConfig


class TeacherJob:
    """The requests of one teacher for one corpus.

    `teacher`: the teacher's key in params, for messages. `split`: the folder of the corpus's
    documents. `chunk_paths`: the shards of its chunks. `checks`: which responses are usable.
    """

    def __init__(
        self,
        teacher: str,
        config: ModelTeacher,
        builder: RequestBuilder,
        checks: ResponseChecks,
        *,
        split: Path,
        chunk_paths: list[Path],
    ) -> None:
        self.teacher, self.config, self.builder = teacher, config, builder
        self.checks = checks
        self.split, self.chunk_paths = split, chunk_paths

    def run(
        self, cache: ResponseCache, encoder: SupportsEncode, out: Path
    ) -> dict[str, int | float]:
        """Send the requests that have no usable response in the cache, then write the tables to
        `out` from it, with token ids by `encoder`. Returns the stage's metrics.

        Runs that use the same model with the same settings wait for each other, so that none of
        them sends a request whose response another one is about to save. Raises UserError where
        the limit on cost or on failures is exceeded, and for errors of the server.
        """
        with self._lock(cache):
            ledger = self._send_requests(cache)
        return self._write_tables(cache, ledger, encoder, out)

    def send_sample(
        self, cache: ResponseCache, sample: Sequence[TeacherRequest]
    ) -> Mapping[str, RequestFailure]:
        """Send those of the requests in `sample` that have no usable response in the cache.
        Returns the requests that have failed, by key. Raises UserError as `run` does; the limit on
        cost is that of the whole corpus."""
        with self._lock(cache):
            return self._send_requests(cache, sample).failed

    def shard_requests(self, path: Path) -> Iterator[TeacherRequest]:
        """The requests about a shard of chunks, given by its path."""
        documents = read_shard(self.split / path.name, Document)
        return self.builder.requests(documents, read_shard(path, Chunk))

    def _all_requests(self) -> Iterator[TeacherRequest]:
        for path in self.chunk_paths:
            yield from self.shard_requests(path)

    def _lock(self, cache: ResponseCache) -> AcquireReturnProxy:
        lock = FileLock(cache.path.with_name(f"{fingerprint(self.config.sampling_facts)}.lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.teacher}: waiting for another run that uses this teacher", flush=True)
            return lock.acquire()

    def _send_requests(
        self, cache: ResponseCache, sample: Sequence[TeacherRequest] | None = None
    ) -> RequestLedger:
        """Send requests, all or those of a sample, until none is open. Returns the ledger. Raises
        what stopped the run."""
        limit = self.config.max_cost_usd if isinstance(self.config, APITeacherConfig) else 0.0
        with Progress(what=self.teacher, total=None, unit="responses") as progress:
            ledger = RequestLedger(
                self.teacher,
                self._all_requests if sample is None else lambda: sample,
                cache,
                self.config.max_attempts,
                self.checks,
                CostBudget(limit),
                progress,
            )
            num_open = self._estimate(ledger, sample)
            if num_open == 0:
                return ledger
            progress.set_total(num_open)
            client = self._client()
            # Repeated, because a request with an unusable response is open again.
            num_sent = 1
            while num_sent and ledger.stop_error is None:
                num_sent = client.run(ledger.pending(), ledger)
        if ledger.stop_error is not None:
            cache.log(str(ledger.stop_error) or f"{self.teacher}: interrupted")
            raise ledger.stop_error
        return ledger

    def _read_charges(self, ledger: RequestLedger) -> dict[str, list[Charge]]:
        """The charges of earlier runs by key. Enters those that belong to no single request into
        the ledger, and what pending batches can cost that this run does not wait for."""
        teacher = fingerprint(self.config.sampling_facts)
        adopt_in_flight(ledger.cache, teacher)
        charges = read_charges(ledger.cache)
        self._enter_charges(ledger, charges.get(teacher, ()))
        if not isinstance(self.config, OpenAIBatchConfig):
            for batch in ledger.cache.pending_batches(teacher):
                ledger.budget.charge(batch.max_usd, estimated=True)
        return charges

    def _enter_charges(self, ledger: RequestLedger, charges: Iterable[Charge]) -> None:
        """Enter into the ledger what charges cost, and which requests were given up."""
        for charge in charges:
            ledger.budget.charge(charge.usd, estimated=charge.estimated)
            retry = isinstance(self.config, APITeacherConfig) and self.config.retry_failed
            if charge.reason == GIVEN_UP and not retry:
                ledger.failed[charge.key] = RequestFailure(NO_ANSWER, charge.message)

    def _client(self) -> TeacherClient:
        # The libraries of other kinds are not imported: they are large or may not be installed.
        match self.config:
            case OpenAIChatConfig():
                from boltlm.teachers.openai_chat import OpenAIChatClient

                return OpenAIChatClient(self.config)
            case OpenAIBatchConfig():
                from boltlm.teachers.openai_batch import OpenAIBatchClient

                return OpenAIBatchClient(self.config)
            case VLLMTeacherConfig():
                from boltlm.teachers.vllm_local import VLLMClient

                return VLLMClient(self.config)

    def _estimate(
        self, ledger: RequestLedger, sample: Sequence[TeacherRequest] | None = None
    ) -> int:
        """Print how many requests, of all or of a sample, are open and what they are expected to
        cost. Returns their number. Enters what the cache holds into the ledger. Raises UserError
        where the expected cost exceeds the limit."""
        keys = None if sample is None else {request.key for request in sample}
        num_final, num_open, input_tokens, output_tokens = 0, 0, 0.0, 0.0
        charges = self._read_charges(ledger)
        ledger.cache.reset_occurrences()
        for request in self._all_requests():
            if not ledger.cache.is_first_occurrence(request.key):
                continue
            self._enter_charges(ledger, charges.get(request.key, ()))
            status = ledger.status(request)
            for response in status.responses:
                ledger.budget.charge(response.cost_usd, estimated=response.is_estimated)
            if keys is not None and request.key not in keys:
                continue
            ledger.usable += status.response is not None
            if status.next_attempt is None:
                num_final += 1
                continue
            num_open += 1
            if isinstance(self.config, APITeacherConfig):
                request_tokens = self.config.expected_tokens(request)
                input_tokens += request_tokens[0]
                output_tokens += request_tokens[1]
        text = (
            f"{self.teacher}: {num_open:,} requests to {self.config.model},"
            f" {num_final:,} others are in the response cache"
        )
        self._check_estimate(ledger, text, num_open, input_tokens, output_tokens)
        return num_open

    def _check_estimate(
        self,
        ledger: RequestLedger,
        text: str,
        num_open: int,
        input_tokens: float,
        output_tokens: float,
    ) -> None:
        """Print `text` and what the open requests are expected to cost. Raises UserError where that
        exceeds the limit."""
        if isinstance(self.config, APITeacherConfig) and num_open:
            prices, budget = self.config.prices, ledger.budget
            batch = self.config.kind == "openai_batch"
            cost_usd = prices.cost(input_tokens, output_tokens, batch=batch)
            budget.expected = budget.spent + cost_usd
            text += (
                f"; expected: {input_tokens:,.0f} input tokens, {output_tokens:,.0f} output tokens,"
                f" ${cost_usd:.4f} at the prices of {prices.as_of}; spent so far:"
                f" ${budget.spent:.4f}{budget.describe_estimated()}, limit: ${budget.limit:.4f}"
            )
            if budget.spent + cost_usd > budget.limit:
                ledger.cache.log(f"{text}; refused")
                raise UserError(
                    f"{text}. This is above max_cost_usd, so nothing was sent; raise max_cost_usd"
                    " or use a smaller corpus"
                )
        print(text, flush=True)
        ledger.cache.log(text)

    def _write_tables(
        self, cache: ResponseCache, sent: RequestLedger, encoder: SupportsEncode, out: Path
    ) -> dict[str, int | float]:
        """Write one shard for each shard of chunks. `sent`: the ledger of the requests that were
        sent. Returns the metrics. Raises UserError where too many requests have no usable
        response."""
        counts: Counter[str] = Counter()
        cost_usd = 0.0
        with Progress(what=f"{self.teacher} tables", total=None, unit="requests") as progress:
            ledger = RequestLedger(
                self.teacher,
                self._all_requests,
                cache,
                self.config.max_attempts,
                self.checks,
                CostBudget(0.0),
                progress,
                sent.failed,
            )
            cache.reset_occurrences()
            for path in self.chunk_paths:
                latents: list[TeacherLatent] = []
                paraphrases: list[Paraphrase] = []
                for request in self.shard_requests(path):
                    status = self._final_status(ledger, request)
                    if cache.is_first_occurrence(request.key):
                        count_responses(status, counts)
                        cost_usd += sum(response.cost_usd for response in status.responses)
                    if self.config.task == "latent":
                        latents.append(latent_row(request, status, encoder))
                    else:
                        paraphrases.append(paraphrase_row(request, status))
                    progress.advance(1)
                count_rows(latents or paraphrases, counts)
                if self.config.task == "latent":
                    write_shard(out / path.name, TeacherLatent, latents)
                else:
                    write_shard(out / path.name, Paraphrase, paraphrases)
        self._check_failed_fraction(counts, sent.failed)
        text = f"{self.teacher}: complete, ${cost_usd:.4f} for {counts['answers']:,} responses"
        if (others_usd := sent.budget.spent - cost_usd) > NEGLIGIBLE_USD:
            text += f", ${others_usd:.4f} for answers that were lost or malformed"
        text += sent.budget.describe_estimated()
        print(text, flush=True)
        cache.log(text)
        return {**counts, "cost_usd": cost_usd}

    def _final_status(self, ledger: RequestLedger, request: TeacherRequest) -> RequestStatus:
        status = ledger.status(request)
        if status.next_attempt is not None:
            raise UserError(
                f"{self.teacher}: some requests are part of a pending batch; run this teacher with"
                " kind openai_batch until the batch has ended"
            )
        return status

    def _check_failed_fraction(
        self, counts: Counter[str], failures: Mapping[str, RequestFailure]
    ) -> None:
        total = counts["chunks"] + counts["paraphrases"]
        failed = sum(dropped_by_reason(counts).values())
        if failed > self.config.max_failed_fraction * total:
            examples = [failure.message for failure in failures.values()]
            example = f" (one of them: {examples[0]})" if examples else ""
            advice = "" if counts[f"dropped_{NO_ANSWER}"] == 0 else ", set retry_failed: true"
            raise UserError(
                f"{self.teacher}: {failed} of {total} have no usable response:"
                f" {describe_reasons(counts)}{example}; more than max_failed_fraction"
                f" {self.config.max_failed_fraction} allows. All responses are saved in the"
                f" response cache: raise max_failed_fraction or max_attempts{advice}, or remove the"
                " cause, and run the stage again"
            )

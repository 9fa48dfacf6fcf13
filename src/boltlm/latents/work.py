"""A teacher that is asked, and a corpus: estimate, ask until nothing is open, write the tables."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from boltlm import engine
from boltlm.errors import UserError
from boltlm.latents.asking import Asked, Book, Kind, Paid
from boltlm.latents.journal import Journal
from boltlm.latents.money import Purse
from boltlm.latents.tables import Encoder, count, latent_row, paraphrase_row, reasons
from boltlm.latents.tasks import Asker, Request
from boltlm.progress import Progress
from boltlm.records import Chunk, Document, Paraphrase, TeacherLatent, read_shard, write_shard


class Work:
    """One teacher that is asked, and the corpus that it is asked about."""

    def __init__(
        self, where: str, config: Asked, asker: Asker, split: Path, chunks: list[Path]
    ) -> None:
        self.where, self.config, self.asker = where, config, asker
        self.split, self.chunks = split, chunks

    def requests(self, path: Path) -> Iterator[Request]:
        documents = read_shard(self.split / path.name, Document)
        return self.asker.requests(documents, read_shard(path, Chunk))

    def run(
        self, journal: Journal, encoder: Encoder, limit: int, out: Path
    ) -> dict[str, int | float]:
        """Ask whatever the journal has no answer to, then write the tables from it.

        Runs that would ask the same model the same way wait for each other, so that none asks
        what another is just being told.
        """
        with self._turn(journal):
            rejected = self._ask(journal)
        return self._tables(journal, rejected, encoder, limit, out)

    def _turn(self, journal: Journal) -> AcquireReturnProxy:
        lock = FileLock(journal.path.with_name(f"{engine.key(self.config.settings)}.lock"))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.where}: another run asks this teacher; waiting for it", flush=True)
            return lock.acquire()

    def _ask(self, journal: Journal) -> dict[str, str]:
        """Ask until nothing is open; return what was rejected. Raises what halted the run."""
        limit = self.config.max_cost_usd if isinstance(self.config, Paid) else 0.0
        with Progress(what=self.where, total=None, unit="answers") as progress:
            book = Book(self.where, journal, self.config.attempts, Purse(limit), progress)
            left = self._estimate(book)
            if left == 0:
                return {}
            progress.expect(left)
            kind = self._kind()
            asks = 1
            while asks and book.halted is None:
                everything = (request for path in self.chunks for request in self.requests(path))
                asks = kind.ask(book.open(everything), book)
        if book.halted is not None:
            _log(journal, str(book.halted) or f"{self.where}: interrupted", say=False)
            raise book.halted
        return book.rejected

    def _kind(self) -> Kind:
        kind = self.config.kind
        if kind == "openai":
            from boltlm.latents.online import Online, OnlineTeacher

            assert isinstance(self.config, OnlineTeacher)
            return Online(self.config)
        if kind == "openai_batch":
            from boltlm.latents.batches import Batched, BatchTeacher

            assert isinstance(self.config, BatchTeacher)
            return Batched(self.config)
        from boltlm.latents.local import Local, LocalTeacher

        assert isinstance(self.config, LocalTeacher)
        return Local(self.config)

    def _estimate(self, book: Book) -> int:
        """Say what is to be asked and what it will cost; return how many requests are open.
        Raises UserError where that is above the limit."""
        found, left, tokens_in, tokens_out = 0, 0, 0.0, 0.0
        book.journal.count_anew()
        for path in self.chunks:
            for request in self.requests(path):
                if not book.journal.counts(request.key):
                    continue
                standing = book.standing(request.key)
                book.purse.spent += sum(answer.cost_usd for answer in standing.made)
                book.good += standing.answer is not None
                if standing.attempt is None:
                    found += 1
                    continue
                left += 1
                if isinstance(self.config, Paid):
                    more_in, more_out = self.config.expected(request)
                    tokens_in, tokens_out = tokens_in + more_in, tokens_out + more_out
        text = f"{self.where}: {left:,} requests to {self.config.model}, {found:,} answered before"
        if isinstance(self.config, Paid) and left:
            prices = self.config.prices
            batch = self.config.kind == "openai_batch"
            cost = prices.cost(tokens_in, tokens_out, batch=batch)
            text += (
                f"; about {tokens_in:,.0f} tokens in and {tokens_out:,.0f} out, ${cost:.4f} at the"
                f" prices of {prices.as_of}; ${book.purse.spent:.4f} spent before, limit"
                f" ${book.purse.limit:.4f}"
            )
            if book.purse.spent + cost > book.purse.limit:
                _log(book.journal, f"{text}; refused", say=False)
                raise UserError(f"{text}: above max_cost_usd, so nothing was asked; raise it")
        _log(book.journal, text)
        return left

    def _tables(
        self,
        journal: Journal,
        rejected: dict[str, str],
        encoder: Encoder,
        limit: int,
        out: Path,
    ) -> dict[str, int | float]:
        counts: Counter[str] = Counter()
        cost = 0.0
        with Progress(what=f"{self.where} tables", total=None, unit="requests") as progress:
            book = Book(self.where, journal, self.config.attempts, Purse(0.0), progress, rejected)
            journal.count_anew()
            for path in self.chunks:
                latents: list[TeacherLatent] = []
                paraphrases: list[Paraphrase] = []
                for request in self.requests(path):
                    standing = book.standing(request.key)
                    if standing.attempt is not None:
                        raise UserError(
                            f"{self.where}: requests are in a batch under way; run the teacher"
                            " with kind openai_batch until it is read"
                        )
                    if journal.counts(request.key):
                        counts["answers"] += len(standing.made)
                        counts["input_tokens"] += sum(a.input_tokens for a in standing.made)
                        counts["output_tokens"] += sum(a.output_tokens for a in standing.made)
                        cost += sum(answer.cost_usd for answer in standing.made)
                    if self.config.task == "latent":
                        latents.append(latent_row(request, standing, encoder, limit))
                    else:
                        paraphrases.append(paraphrase_row(request, standing))
                    progress.advance(1)
                count(latents or paraphrases, counts)
                if self.config.task == "latent":
                    write_shard(out / path.name, TeacherLatent, latents)
                else:
                    write_shard(out / path.name, Paraphrase, paraphrases)
        self._enough(counts, rejected)
        _log(journal, f"{self.where}: done, ${cost:.4f} for {counts['answers']:,} answers")
        return {**counts, "cost_usd": cost}

    def _enough(self, counts: Counter[str], rejected: dict[str, str]) -> None:
        """Raises UserError where more requests failed than max_failed_fraction allows."""
        total = counts["chunks"] + counts["paraphrases"]
        failed = sum(n for name, n in counts.items() if name.startswith("without_"))
        if failed > self.config.max_failed_fraction * total:
            why = f" (one of them: {next(iter(rejected.values()))})" if rejected else ""
            raise UserError(
                f"{self.where}: {failed} of {total} have no usable answer: {reasons(counts)}{why};"
                f" more than max_failed_fraction {self.config.max_failed_fraction} allows. The"
                " answers are in the journal: raise it or attempts, or mend the cause, and go on"
            )


def _log(journal: Journal, text: str, *, say: bool = True) -> None:
    """Keep it beside the journal with the time; `say`: on the terminal too, where it is no error,
    which ends the stage and is said there."""
    if say:
        print(text, flush=True)
    with journal.path.with_suffix(".log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")

"""One teacher at work on one corpus: what is still to be asked, what came back, when to stop."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from boltlm.errors import UserError
from boltlm.latents.journal import Answer, Journal
from boltlm.latents.money import Prices, Purse
from boltlm.latents.tasks import Request, Task
from boltlm.progress import Progress
from boltlm.tokens import MARKERS

# The reasons why an answer is none.
EMPTY, REFUSED, LENGTH, SPECIAL = "empty", "refused", "cut_off", "special_token"
UNFINISHED = "unfinished"  # ended in a way that is not a model's own end
REJECTED = "rejected"  # the server would not take the request; nothing was paid
_APOLOGY = re.compile(
    r"(I'm|I am|I’m) (very )?sorry\b|(Sorry|I apologi[sz]e),|I (can't|can’t|cannot) "
)
_OWN_END = ("stop", "eos", "eos_token", "end_turn")
_HOPELESS = 20  # bad answers after which a run with more bad than good ones stops


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What every teacher that is asked has in its params entry. Lengths in tokens; `attempts`:
    how often a request with bad answers is asked; `seed` chooses the styles of paraphrases."""

    kind: Literal["openai", "openai_batch", "vllm"]
    corpus: str
    task: Task
    paraphrases: int
    seed: int
    model: str
    temperature: float
    max_output_tokens: int
    attempts: int
    max_failed_fraction: float

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.max_output_tokens < 1:
            raise UserError("attempts and max_output_tokens must be 1 or more")
        if not 0 <= self.max_failed_fraction <= 1:
            raise UserError(f"max_failed_fraction lies in [0, 1], found {self.max_failed_fraction}")

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What an answer depends on beside its prompt."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_output_tokens": self.max_output_tokens,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Paid(Asked):
    """A teacher behind an OpenAI-compatible API. `base_url` null: OpenAI's own.

    The estimate before the first request takes `characters_per_token` for the input and
    `expected_output_tokens` a request for the output.
    """

    base_url: str | None
    retries: int
    timeout_seconds: float
    expected_output_tokens: int
    characters_per_token: float
    max_cost_usd: float
    prices: Prices

    def __post_init__(self) -> None:
        super(Paid, self).__post_init__()  # slots make a class anew: a bare super() misses it
        if self.characters_per_token <= 0 or self.expected_output_tokens < 1:
            raise UserError("characters_per_token and expected_output_tokens must be above 0")

    def expected(self, request: Request) -> tuple[float, float]:
        """Tokens in and out that a request is expected to take."""
        return request.characters / self.characters_per_token, self.expected_output_tokens

    def expected_usd(self, request: Request) -> float:
        return self.prices.cost(*self.expected(request), batch=self.kind == "openai_batch")

    def body(self, request: Request) -> dict:
        """The request as the chat completions API takes it."""
        return {
            "model": self.model,
            "messages": list(request.messages),
            "temperature": self.temperature,
            "max_completion_tokens": self.max_output_tokens,
        }


def fault(answer: Answer) -> str | None:
    """Why an answer cannot be used, or None."""
    if answer.finish == "length":
        return LENGTH
    if answer.finish in ("refused", "content_filter"):
        return REFUSED
    if answer.finish not in _OWN_END:
        return UNFINISHED
    text = answer.text.strip()
    if not text:
        return EMPTY
    if any(marker in text for marker in MARKERS):
        return SPECIAL
    return REFUSED if _APOLOGY.match(text) else None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to be made, for the first time (attempt 0) or once more."""

    request: Request
    attempt: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands: a good answer, a final reason why there is none, or an attempt
    still to be made; and all attempts so far."""

    answer: Answer | None
    reason: str | None
    attempt: int | None
    made: list[Answer]


@dataclass(slots=True)
class Book:
    """The state of one teacher's requests, which is the journal's, and of this run.

    `halted`: why no further request is sent; what is under way still comes in.
    """

    where: str
    journal: Journal
    attempts: int
    purse: Purse
    progress: Progress
    rejected: dict[str, str] = field(default_factory=dict)
    in_hand: set[str] = field(default_factory=set)
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    halted: BaseException | None = None

    def standing(self, key: str) -> Standing:
        made = self.journal.answers(key)
        for answer in made:
            if fault(answer) is None:
                return Standing(answer, None, None, made)
        if key in self.rejected:
            return Standing(None, REJECTED, None, made)
        if len(made) >= self.attempts:
            return Standing(None, fault(made[-1]), None, made)
        return Standing(None, None, len(made), made)

    def open(self, requests: Iterable[Request]) -> Iterator[Ask]:
        """What is to be asked now: not answered, not given up, not under way, though it be for
        another chunk with the very same words."""
        self.in_hand.clear()
        for request in requests:
            attempt = self.standing(request.key).attempt
            if attempt is None or request.key in self.in_hand:
                continue
            if not self.journal.under_way(request.key, attempt):
                self.in_hand.add(request.key)
                yield Ask(request, attempt)

    def note(self, answer: Answer) -> None:
        """Count an answer of this run; stop where most are bad, before more is paid for them."""
        self.in_hand.discard(answer.key)
        reason = fault(answer)
        self.good += reason is None
        if reason is not None:
            self.bad[reason] += 1
        self._judge()
        self.progress.note(f"${self.purse.spent:.4f}")
        self.progress.advance(1)

    def reject(self, key: str, why: str) -> None:
        self.in_hand.discard(key)
        self.rejected[key] = why
        self._judge()
        self.progress.advance(1)

    def _judge(self) -> None:
        bad = self.bad.total() + len(self.rejected)
        if bad < _HOPELESS or bad <= self.good or self.halted is not None:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.bad.items())
        if self.rejected:
            why = next(iter(self.rejected.values()))
            reasons = "; ".join(filter(None, (reasons, f"{len(self.rejected)} rejected ({why})")))
        self.halt(
            UserError(
                f"{self.where}: stopped, {bad} of the first {bad + self.good} answers cannot be"
                f" used ({reasons}); see max_output_tokens, the model and the prompt"
            )
        )

    def halt(self, why: BaseException) -> None:
        if self.halted is None:
            self.halted = why


class Kind(Protocol):
    def ask(self, asks: Iterator[Ask], book: Book) -> int:
        """Ask, put what comes back into the journal and `book`; return how many were asked."""
        ...

"""The cost of a teacher's requests: an estimate before the run, a limit during it."""

from dataclasses import dataclass

from boltlm.errors import UserError

TOKENS_PER_PRICE_UNIT = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Prices of a model in US dollars per million tokens, as of the date `as_of`.

    `batch_factor`: the price of a request in the Batches API, relative to a single request.
    """

    input_usd: float
    output_usd: float
    batch_factor: float
    as_of: str

    def cost(self, input_tokens: float, output_tokens: float, *, batch: bool) -> float:
        """The cost of a request in US dollars. `batch`: it is sent through the Batches API."""
        scaled = input_tokens * self.input_usd + output_tokens * self.output_usd
        return scaled / TOKENS_PER_PRICE_UNIT * (self.batch_factor if batch else 1.0)


@dataclass(slots=True)
class CostBudget:
    """The budget of one teacher. All amounts are in US dollars.

    `spent` starts at the cost of the responses that are already in the response cache, so the limit
    holds over any number of runs. `reserved` is the expected cost of the requests in flight.
    `settled_expected` and `settled_cost` are the expected and the actual cost of the requests that
    returned in this run: where responses cost more than expected, the requests in flight are
    assumed to cost more by the same factor.
    """

    limit: float
    spent: float = 0.0
    reserved: float = 0.0
    settled_expected: float = 0.0
    settled_cost: float = 0.0

    def reserve(self, expected: float) -> bool:
        """Reserve the expected cost of a request or a batch. Returns False, and reserves nothing,
        where the total would exceed the limit."""
        ratio = max(1.0, self.settled_cost / self.settled_expected) if self.settled_expected else 1
        if self.spent + (self.reserved + expected) * ratio > self.limit:
            return False
        self.reserved += expected
        return True

    def settle(self, expected: float, cost: float) -> None:
        """Replace a reservation by the actual cost. A cost of 0 means that there was no response,
        and does not enter the ratio of actual to expected cost."""
        self.reserved -= expected
        self.spent += cost
        if cost:
            self.settled_expected += expected
            self.settled_cost += cost

    def exceeded_error(self, teacher: str) -> UserError:
        """The error to report when `reserve` has returned False. `teacher`: its key in params."""
        return UserError(
            f"{teacher}: stopped at ${self.spent:.4f} because the next request could exceed"
            f" max_cost_usd ${self.limit:.4f}; all responses are saved in the response cache, so"
            " raise max_cost_usd and run the stage again to continue"
        )

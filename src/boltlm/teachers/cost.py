"""The cost of a teacher's requests: an estimate before the run, a hard limit during it."""

from dataclasses import dataclass

from boltlm.errors import UserError
from boltlm.param_types import NonNegativeFloat

TOKENS_PER_PRICE_UNIT = 1_000_000
# Sums and differences below this are rounding errors of floating-point numbers, US dollars.
NEGLIGIBLE_USD = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Prices of a model in US dollars per million tokens, as of the date `as_of`.

    `batch_factor`: the price of a request in the Batches API, relative to a single request.
    """

    input_usd: NonNegativeFloat
    output_usd: NonNegativeFloat
    batch_factor: NonNegativeFloat
    as_of: str

    def cost(self, input_tokens: float, output_tokens: float, *, batch: bool) -> float:
        """The cost of a request in US dollars. `batch`: it is sent through the Batches API."""
        scaled = input_tokens * self.input_usd + output_tokens * self.output_usd
        return scaled / TOKENS_PER_PRICE_UNIT * (self.batch_factor if batch else 1.0)


@dataclass(slots=True)
class CostBudget:
    """The budget of one teacher. All amounts are in US dollars.

    What is in flight is reserved at the most that it can cost (`APITeacherConfig.max_usd`), so
    `spent` never exceeds `limit` as long as the server charges no more than that. Where it does,
    `ratio` becomes the largest ratio of an actual cost to its reservation, and what is reserved
    counts that many times from then on; what is left is the excess of the requests that were
    already in flight at that moment.

    `spent` starts at the cost of the responses that are already in the response cache, so the limit
    holds over any number of runs. `estimated` is the part of it that no server has reported: the
    cost of answers that never arrived or carried no usage. `expected` is the expected cost of what
    was open at the start of the run.
    """

    limit: float
    spent: float = 0.0
    estimated: float = 0.0
    reserved: float = 0.0
    ratio: float = 1.0
    expected: float = 0.0

    def reserve(self, max_usd: float) -> bool:
        """Reserve the most that a request or a batch can cost. Returns False, and reserves nothing,
        where the total could exceed the limit."""
        if self.spent + (self.reserved + max_usd) * self.ratio > self.limit:
            return False
        self.reserved += max_usd
        return True

    def fits_alone(self, max_usd: float) -> bool:
        """Whether `reserve` would succeed if nothing were in flight: then it pays to wait."""
        return self.spent + max_usd * self.ratio <= self.limit

    def settle(self, max_usd: float, cost: float, *, estimated: bool = False) -> None:
        """Replace a reservation by the actual cost, or by an estimate of it."""
        self.reserved -= max_usd
        if self.reserved < NEGLIGIBLE_USD:
            self.reserved = 0.0
        self.charge(cost, estimated=estimated)
        if max_usd > 0:
            self.ratio = max(self.ratio, cost / max_usd)

    def charge(self, cost: float, *, estimated: bool) -> None:
        """Count a cost without a reservation."""
        self.spent += cost
        if estimated:
            self.estimated += cost

    def describe(self) -> str:
        """The amounts in a few words, for the progress display."""
        parts = [f"${self.spent:.4f} spent{self.describe_estimated()}"]
        if self.reserved:
            parts.append(f"${self.reserved * self.ratio:.4f} reserved")
        parts.append(f"${self.expected:.4f} expected in all")
        if self.ratio > 1:
            parts.append(f"up to {self.ratio:.2f} times the most that a request should cost")
        return ", ".join(parts)

    def describe_estimated(self) -> str:
        """Which part of `spent` is an estimate, to be appended to it; empty where none is."""
        return f" (${self.estimated:.4f} of it estimated)" if self.estimated else ""

    def exceeded_error(self, teacher: str, max_usd: float) -> UserError:
        """The error to report when a request does not fit that can cost `max_usd`. `teacher`: its
        key in params."""
        return UserError(
            f"{teacher}: stopped at ${self.spent:.4f} because the next request could cost"
            f" ${max_usd * self.ratio:.6f} and exceed max_cost_usd {self.limit:g}; all"
            " responses are saved in the response cache, so raise max_cost_usd and run the stage"
            " again to continue"
        )

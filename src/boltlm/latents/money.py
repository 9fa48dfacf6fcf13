"""What asking costs: an estimate before, a limit while it runs, the real sum afterwards."""

from dataclasses import dataclass

from boltlm.errors import UserError

MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Of a model, in US dollars for a million tokens, as they were on the day `as_of`.
    `batch_factor`: what the Batches API takes of them."""

    input_usd: float
    output_usd: float
    batch_factor: float
    as_of: str

    def cost(self, input_tokens: float, output_tokens: float, *, batch: bool) -> float:
        """US dollars."""
        full = (input_tokens * self.input_usd + output_tokens * self.output_usd) / MILLION
        return full * (self.batch_factor if batch else 1.0)


@dataclass(slots=True)
class Purse:
    """The money of one teacher. `spent` starts at what its answers in the journal cost, so the
    limit holds over any number of crashed and repeated runs; `reserved` is what is under way, at
    its expected cost. Where answers are dearer than expected, the rest is expected to be so too."""

    limit: float
    spent: float = 0.0
    reserved: float = 0.0
    expected: float = 0.0
    paid: float = 0.0

    def take(self, expected: float) -> bool:
        """Reserve what a request or a batch is expected to cost; False where that is above the
        limit."""
        dearer = max(1.0, self.paid / self.expected) if self.expected else 1.0
        if self.spent + (self.reserved + expected) * dearer > self.limit:
            return False
        self.reserved += expected
        return True

    def settle(self, expected: float, cost: float) -> None:
        """It is done, and cost so much."""
        self.reserved -= expected
        self.spent += cost
        if cost:
            self.expected += expected
            self.paid += cost

    def refuse(self, where: str) -> UserError:
        return UserError(
            f"{where}: stopped at ${self.spent:.4f}, before max_cost_usd ${self.limit:.4f} was"
            " passed; every answer is in the journal, so raise the limit and run again to go on"
        )

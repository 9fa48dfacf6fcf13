"""The pilot of a run with batches: a first batch of a few hundred requests, whose responses are
judged before the rest of the corpus is sent and paid for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from boltlm.errors import UserError
from boltlm.teachers.model_config import OpenAIBatchConfig
from boltlm.teachers.openai_batch_files import BatchResults
from boltlm.teachers.response_checks import REJECTED, ResponseChecks


@dataclass(slots=True)
class Pilot:
    """The responses to the pilot. `is_complete`: it has been judged, or there is none. The costs
    are in US dollars, `expected_usd` that of the same responses before they were sent."""

    config: OpenAIBatchConfig
    is_complete: bool = False
    usable: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    cost_usd: float = 0.0
    expected_usd: float = 0.0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.is_complete = self.config.pilot_requests == 0

    def add(
        self,
        results: BatchResults,
        sources: Mapping[str, str],
        checks: ResponseChecks,
        expected_usd: float,
    ) -> None:
        """Count the results of a batch. `sources`: the texts that were asked about, by the keys of
        the requests. `expected_usd`: the expected cost of one response."""
        for response in results.responses.values():
            reason = checks.unusable_reason(response, sources.get(response.key))
            self.usable += reason is None
            if reason is not None:
                self.unusable[reason] += 1
            self.cost_usd += response.cost_usd
            self.expected_usd += expected_usd
            self.output_tokens += response.output_tokens
        if results.rejected:
            self.unusable[REJECTED] += len(results.rejected)

    def judge(self, teacher: str) -> UserError | None:
        """Once at least half of the pilot has returned: complete it, or return why no more requests
        should be sent. `teacher`: its key in params."""
        failures = self.unusable.total()
        total = self.usable + failures
        if self.is_complete or 2 * total < self.config.pilot_requests:
            return None
        if self.usable < self.config.min_pilot_usable * total:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.unusable.items())
            return UserError(
                f"{teacher}: stopped after a pilot of {total} requests, of which {failures} have no"
                f" usable response ({reasons}); min_pilot_usable is {self.config.min_pilot_usable}."
                " Change the prompt, the model or max_output_tokens, or lower min_pilot_usable"
            )
        ratio = self.cost_usd / self.expected_usd if self.expected_usd else 0.0
        if ratio > self.config.max_pilot_cost_ratio:
            num_responses = total - self.unusable[REJECTED]
            return UserError(
                f"{teacher}: stopped after a pilot of {total} requests, because a response costs"
                f" {ratio:.2f} times what was expected and has"
                f" {self.output_tokens / num_responses:.0f} tokens on average;"
                f" max_pilot_cost_ratio is {self.config.max_pilot_cost_ratio}. Correct"
                f" expected_output_tokens ({self.config.expected_output_tokens}) and"
                f" characters_per_token ({self.config.characters_per_token}), look at the new"
                " estimate, and run the stage again"
            )
        self.is_complete = True
        return None

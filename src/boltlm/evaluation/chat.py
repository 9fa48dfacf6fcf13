"""A model continues a prompt in plain text, and behind a thought of its own (`boltlm chat`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatOptions:
    """`max_thought_tokens`, `max_answer_tokens`: length limits; `temperature`: 0 is greedy."""

    max_thought_tokens: int
    max_answer_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Continuations:
    """What follows a prompt: without a thought, and a thought with what follows it. `thought_ends`:
    whether the model ended its thought within the limit."""

    plain: str
    thought: str
    thought_ends: bool
    after_thought: str


class ChatModel:
    """A model folder that continues prompts. The prompt is text of a document; a thought stands in
    front of the next chunk of it: BOS prompt SoL Prior thought EoL continuation."""

    def __init__(self, folder: Path, options: ChatOptions) -> None:
        weights = checkpoint.final_weights(folder)
        self.coder, self.options = TextCoder(weights), options
        self.model: Any = checkpoint.load_model(weights)

    def continuations(self, prompt: str) -> Continuations:
        """Both continuations of a prompt, with the same seed. Raises UserError for a prompt that
        leaves no room in the context."""
        special, options = self.coder.special_tokens, self.options
        text = self.coder.encode(prompt)
        room = options.max_thought_tokens + options.max_answer_tokens + 4
        if len(text) + room > self.coder.context_length:
            raise UserError(
                f"the prompt has {len(text)} tokens, but the context of"
                f" {self.coder.context_length} leaves {self.coder.context_length - room} to it;"
                " shorten it, or lower --thought and --answer"
            )
        barred = [token for token in special.barred if token != special.eos]
        plain = self._generate(
            [special.bos, *text], [special.eos], [*barred, special.eol], options.max_answer_tokens
        )
        begin = layouts.prior_prompt(special, text)
        thought = self._generate(
            begin, [special.eol], list(special.barred), options.max_thought_tokens
        )
        # A thought that reaches the limit is ended here, as in the E-step.
        after = self._generate(
            [*begin, *thought, special.eol],
            [special.eos, special.sol],
            [special.bos, special.eol, special.prior, special.post],
            options.max_answer_tokens,
        )
        return Continuations(
            self.coder.decode(plain),
            self.coder.decode(thought),
            len(thought) < options.max_thought_tokens,
            self.coder.decode(after),
        )

    def _generate(
        self, prompt: list[int], ends: list[int], barred: list[int], most: int
    ) -> list[int]:
        """The token ids that follow, without the one of `ends` that ended them."""
        torch.manual_seed(self.options.seed)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.options.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.options.temperature, "top_k": 0}
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=ends[0],
            suppress_tokens=barred,
            **sampling,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens[:-1] if tokens and tokens[-1] in ends else tokens

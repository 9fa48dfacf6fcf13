"""Prompts become draws: K token sequences each, their log-probabilities, and how they ended.

Shapes: B rows, L positions, V vocabulary. A row is one draw of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from boltlm.seeds import generator
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers

Finish = Literal["stop", "length", "eos", "special"]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """`tokens` without the ending token; `log_q` in nats of all that was drawn, the ending
    included. Only `finish == "stop"` (it ended with EoL) is a latent."""

    tokens: tuple[int, ...]
    finish: Finish
    log_q: float


class Sampler(Protocol):
    def sample(
        self, prompts: Sequence[Ids], keys: Sequence[Key], draws: int, first: int = 0
    ) -> list[list[Draw]]:
        """Draws `first`, `first` + 1, … of each prompt at temperature 1, `draws` of them; draw k of
        prompt i depends on (seed, keys[i], k)."""
        ...


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a draw: the token, and what its ending is called."""

    finish_of: dict[int, Finish]

    @classmethod
    def of_latents(cls, m: Markers) -> "Ends":
        special: dict[int, Finish] = dict.fromkeys(m.forbidden, "special")
        return cls({**special, m.eos: "eos", m.eol: "stop"})


@dataclass(slots=True)
class TransformersSampler:
    """Draws by inverting each step's distribution at a uniform number of its own, so a draw does
    not depend on what else is in its batch. The prompt is run once for its K draws."""

    model: PreTrainedModel
    markers: Markers
    max_latent_tokens: int
    batch_tokens: int
    seed: int
    greedy: bool = False
    ends: Ends = field(init=False)

    def __post_init__(self) -> None:
        self.ends = Ends.of_latents(self.markers)

    def sample(
        self, prompts: Sequence[Ids], keys: Sequence[Key], draws: int, first: int = 0
    ) -> list[list[Draw]]:
        found: list[list[Draw]] = [[] for _ in prompts]
        for batch in length_batches(
            [len(p) for p in prompts], draws, self.max_latent_tokens, self.batch_tokens
        ):
            made = self._batch([prompts[i] for i in batch], [keys[i] for i in batch], draws, first)
            for place, index in enumerate(batch):
                found[index] = made[place * draws : (place + 1) * draws]
        return found

    def _noise(self, keys: Sequence[Key], draws: int, first: int) -> torch.Tensor:
        steps, numbers = self.max_latent_tokens + 1, range(first, first + draws)
        noise = [generator(self.seed, *key, k).random(steps) for key in keys for k in numbers]
        return torch.from_numpy(np.stack(noise))

    @torch.inference_mode()
    def _batch(self, prompts: list[Ids], keys: list[Key], draws: int, first: int) -> list[Draw]:
        device = self.model.device
        noise_BL = self._noise(keys, draws, first).to(device)
        logits_BV, cache, mask_BL = prefill(self.model, prompts, draws)
        tokens: list[list[int]] = [[] for _ in range(len(prompts) * draws)]
        log_q = np.zeros(len(tokens))
        finish: list[Finish] = ["length"] * len(tokens)
        rows = np.arange(len(tokens))  # which draw a row of the batch is; -1: ended
        for step in range(self.max_latent_tokens + 1):
            logs_BV = logits_BV.float().log_softmax(-1)
            choice_B = self._choose(logs_BV, noise_BL[:, step])
            chosen = choice_B.tolist()
            gained = logs_BV.gather(1, choice_B[:, None])[:, 0].tolist()
            for place, draw in enumerate(rows):
                if draw < 0:
                    continue
                log_q[draw] += gained[place]
                end = self.ends.finish_of.get(chosen[place])
                if end is None:
                    tokens[draw].append(chosen[place])
                else:
                    finish[draw] = end
                    rows[place] = -1
            alive = np.flatnonzero(rows >= 0)
            if len(alive) == 0 or step == self.max_latent_tokens:
                break
            if len(alive) < 0.7 * len(rows):
                keep = torch.from_numpy(alive).to(device)
                cache.batch_select_indices(keep)
                rows, choice_B, mask_BL = rows[alive], choice_B[keep], mask_BL[keep]
                noise_BL = noise_BL[keep]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(rows), 1)], 1)
            logits_BV = self.model(
                input_ids=choice_B[:, None],
                attention_mask=mask_BL,
                position_ids=mask_BL.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        # What ran to the limit drew one token more than a latent may have.
        return [
            Draw(tuple(drawn[: self.max_latent_tokens]), end, float(total))
            for drawn, end, total in zip(tokens, finish, log_q, strict=True)
        ]

    def _choose(self, logs_BV: torch.Tensor, noise_B: torch.Tensor) -> torch.Tensor:
        if self.greedy:
            return logs_BV.argmax(-1)
        cumulated_BV = logs_BV.double().exp().cumsum(-1)
        wanted_B1 = noise_B[:, None] * cumulated_BV[:, -1:]
        return torch.searchsorted(cumulated_BV, wanted_B1, right=True)[:, 0].clamp_max(
            logs_BV.shape[-1] - 1
        )


def length_batches(
    lengths: Sequence[int], copies: int, more: int, batch_tokens: int
) -> list[list[int]]:
    """Indices in batches of similar length: rows × copies × (longest + more) ≤ `batch_tokens`,
    or a single one where even that is more."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        size = copies * (lengths[index] + more)
        if batches and (len(batches[-1]) + 1) * size <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def prefill(
    model: PreTrainedModel, prompts: Sequence[Ids], copies: int
) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
    """Run left-padded prompts once; return (last logits, key–value cache, attention mask), each
    prompt's row repeated `copies` times."""
    device = model.device
    longest = max(map(len, prompts))
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
    cache = DynamicCache()
    out: Any = model(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        position_ids=(mask_BL.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(copies)
    repeated = out.logits[:, -1].repeat_interleave(copies, 0)
    return repeated, cache, mask_BL.repeat_interleave(copies, 0)

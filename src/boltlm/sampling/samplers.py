"""Prompts become draws: K token sequences each, their log-probabilities, and how they ended.

Shapes: D draws, B rows, K draws of a row, L positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from boltlm.sampling.cache import RoomyLayer, length_batches, prefill
from boltlm.seeds import generator
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers

Finish = Literal["stop", "length", "eos", "special"]
Key = tuple[str | int, ...]
LIVE = 0.7  # share of a batch's rows below which those that ended are taken out


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
    not depend on what else is in its batch. Draws of a prompt that have said the same so far are
    one row of the batch: the prompt is run once, and so is every beginning that draws share."""

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
        lengths = [len(prompt) + self.max_latent_tokens for prompt in prompts]
        for batch in length_batches(lengths, [draws] * len(prompts), self.batch_tokens):
            made = self._batch([prompts[i] for i in batch], [keys[i] for i in batch], draws, first)
            for place, index in enumerate(batch):
                found[index] = made[place * draws : (place + 1) * draws]
        return found

    def _noise(self, keys: Sequence[Key], draws: int, first: int) -> np.ndarray:
        steps, numbers = self.max_latent_tokens + 1, range(first, first + draws)
        return np.stack(
            [generator(self.seed, *key, k).random(steps) for key in keys for k in numbers]
        )

    @torch.inference_mode()
    def _batch(self, prompts: list[Ids], keys: list[Key], draws: int, first: int) -> list[Draw]:
        noise_DL = self._noise(keys, draws, first)
        tokens: list[list[int]] = [[] for _ in noise_DL]
        log_q = np.zeros(len(tokens))
        finish: list[Finish] = ["length"] * len(tokens)
        logits_BV, cache, mask_BL = prefill(self.model, prompts, RoomyLayer)
        # Which draws a row of the batch stands for; none: all of them ended.
        rows = [list(range(i * draws, (i + 1) * draws)) for i in range(len(prompts))]
        for step in range(self.max_latent_tokens + 1):
            chosen, gained = self._choose(logits_BV, rows, noise_DL[:, step])
            heirs: list[dict[int, list[int]]] = []  # of each row: the draws that say a token next
            for row, token_K, gain_K in zip(rows, chosen, gained, strict=True):
                heirs.append({})
                for draw, token, gain in zip(row, token_K, gain_K, strict=False):
                    log_q[draw] += gain
                    end = self.ends.finish_of.get(token)
                    if end is not None:
                        finish[draw] = end
                        continue
                    tokens[draw].append(token)
                    heirs[-1].setdefault(token, []).append(draw)
            if not any(heirs) or step == self.max_latent_tokens:
                break
            rows, said, mask_BL = _branch(cache, mask_BL, heirs)
            logits_BV = self.model(
                input_ids=torch.tensor(said, device=mask_BL.device)[:, None],
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

    def _choose(
        self, logits_BV: torch.Tensor, rows: list[list[int]], noise_D: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The next token of each row's draws and its log-probability, padded to the most draws."""
        logs_BV = logits_BV.float().log_softmax(-1)
        noise_BK = np.zeros((len(rows), max(map(len, rows))))
        for place, row in enumerate(rows):
            noise_BK[place, : len(row)] = noise_D[row]
        if self.greedy:
            choice_BK = logs_BV.argmax(-1, keepdim=True).expand(noise_BK.shape)
        else:
            choice_BK = inverted(logs_BV, torch.from_numpy(noise_BK).to(logs_BV.device))
        return choice_BK.tolist(), logs_BV.gather(1, choice_BK).tolist()


def _branch(
    cache: Cache, mask_BL: torch.Tensor, heirs: list[dict[int, list[int]]]
) -> tuple[list[list[int]], list[int], torch.Tensor]:
    """Rows for the next step, the token that each says, and their mask. A row goes on with the
    first of its tokens, others get copies of it; ended rows go when they are many."""
    parents = [row for row, group in enumerate(heirs) for _ in list(group)[1:]]
    alive = [row for row, group in enumerate(heirs) if group]
    if len(alive) < LIVE * len(heirs):
        order = torch.tensor(alive + parents, device=mask_BL.device)
        cache.batch_select_indices(order)
        mask_BL, heirs = mask_BL[order], [heirs[row] for row in alive]
    elif parents:
        order = torch.tensor(parents, device=mask_BL.device)
        for layer in cache.layers:
            assert isinstance(layer, RoomyLayer)
            layer.append(order)
        mask_BL = torch.cat([mask_BL, mask_BL[order]])
    firsts = [next(iter(group.items()), (0, [])) for group in heirs]
    said = firsts + [pair for group in heirs for pair in list(group.items())[1:]]
    mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(said), 1)], 1)
    return [draws for _, draws in said], [token for token, _ in said], mask_BL


def inverted(logs_BV: torch.Tensor, noise_BK: torch.Tensor) -> torch.Tensor:
    """The tokens (B, K) at which a row's cumulated probability passes its numbers in [0, 1)."""
    cumulated_BV = logs_BV.double().exp().cumsum(-1)
    wanted_BK = noise_BK * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, wanted_BK, right=True).clamp_max(logs_BV.shape[-1] - 1)

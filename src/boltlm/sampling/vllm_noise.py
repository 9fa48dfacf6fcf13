"""Random numbers of one's own inside vLLM, where it has no fast seeds (its CPU build).

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from boltlm.sampling.samplers import inverted
from boltlm.seeds import generator


@dataclass(frozen=True, slots=True)
class _Row:
    uniform: np.ndarray
    drawn: list[int]  # vLLM's own list, which grows


class Noise(LogitsProcessor):
    """Chooses each token by inverting the distribution at the draw's own number for this step, as
    `TransformersSampler` does; vLLM, told to be greedy, takes what is left. It reads log q off the
    logits before this. A request says `extra_args={"draw": [seed, *key, k]}`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, is_pin_memory
        self.device = device
        self.rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, self._row)

    def _row(
        self, params: SamplingParams, prompt: list[int] | None, drawn: list[int]
    ) -> _Row | None:
        del prompt
        if not params.extra_args or params.max_tokens is None:
            return None
        seed, *key = params.extra_args["draw"]
        return _Row(generator(seed, *key).random(params.max_tokens), drawn)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.rows:
            return logits
        places = torch.tensor(list(self.rows), device=self.device)
        numbers = np.array([row.uniform[len(row.drawn)] for row in self.rows.values()])
        noise_B1 = torch.from_numpy(numbers).to(self.device)[:, None]
        choice_B = inverted(logits[places].log_softmax(-1), noise_B1)[:, 0]
        logits[places] = -torch.inf
        logits[places, choice_B] = 0.0
        return logits

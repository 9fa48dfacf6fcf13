"""A vLLM logits processor that samples with given random numbers, for builds of vLLM without fast
per-request seeds (the CPU build).

Shapes: B rows of vLLM's batch, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from boltlm.estep.samplers import inverse_cdf
from boltlm.seeds import generator


@dataclass(frozen=True, slots=True)
class _RequestState:
    noise: np.ndarray  # a uniform number for each step
    output_ids: list[int]  # vLLM's own list, to which it appends each sampled token


class InverseCDFProcessor(LogitsProcessor):
    """Chooses each token by inverse transform sampling, with the same uniform numbers as
    `TransformersSampler`, and masks all other tokens; vLLM then samples greedily.

    vLLM has set the logits of barred tokens to −∞ before, and computes log-probabilities from the
    logits before either. A request passes the key
    of its random numbers as `extra_args={"draw": [seed, *key, k]}`.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, is_pin_memory
        self.device = device
        self.requests: dict[int, _RequestState] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._create_state)

    def _create_state(
        self, params: SamplingParams, prompt: list[int] | None, output_ids: list[int]
    ) -> _RequestState | None:
        del prompt
        if not params.extra_args or params.max_tokens is None:
            return None
        seed, *key = params.extra_args["draw"]
        # The token of the last step is not used (VLLMSampler); it needs a number all the same.
        noise = generator(seed, *key).random(params.max_tokens)
        return _RequestState(noise, output_ids)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.requests:
            return logits
        rows = torch.tensor(list(self.requests), device=self.device)
        states = self.requests.values()
        noise_B = np.array([state.noise[len(state.output_ids)] for state in states])
        noise_B1 = torch.from_numpy(noise_B).to(self.device)[:, None]
        tokens_B1, _ = inverse_cdf(logits[rows].log_softmax(-1), noise_B1)
        logits[rows] = -torch.inf
        logits[rows, tokens_B1[:, 0]] = 0.0
        return logits

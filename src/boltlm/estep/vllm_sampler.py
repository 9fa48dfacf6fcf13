"""Sampling with unmodified releases of vLLM, on a GPU or with the CPU build.

On a GPU every draw is a request with its own seed, which vLLM's V2 model runner supports at full
speed. On a CPU the V1 model runner would process seeded requests one at a time; there
`vllm_logits_processor` supplies the random numbers.

Shapes: L tokens of a draw, T tokens whose log-probabilities vLLM returns.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltlm.errors import UserError
from boltlm.estep.samplers import Draw, SampleKey
from boltlm.param_types import Precision
from boltlm.seeds import generator
from boltlm.sequences.layouts import TokenIds
from boltlm.tokens import SpecialTokens

CPU_CACHE_GIB = "2"  # size of the key–value cache on a CPU unless the environment sets it
BATCHED_TOKENS = 8192  # maximum number of tokens that one engine step processes
MAX_SEQUENCES = 1024  # maximum number of sequences in a batch
# The unit of prefix caching: only complete blocks of a prompt are shared. The smallest size that
# the CPU kernels support.
CPU_BLOCK_TOKENS = 32


def prepare_vllm() -> None:
    """Set the environment variables that vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def vllm_engine_args(context_length: int) -> dict[str, Any]:
    """Engine arguments for many short requests that share prefixes, on this machine's device."""
    gpu = torch.cuda.is_available()
    return {
        "max_model_len": context_length,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": False,  # 190 instead of 164 chunks/s on two cores
        "max_num_batched_tokens": max(context_length, BATCHED_TOKENS),
        "max_num_seqs": MAX_SEQUENCES,
        "block_size": None if gpu else CPU_BLOCK_TOKENS,
        "enforce_eager": not gpu,
        "disable_log_stats": True,
    }


@contextmanager
def vllm_startup(folder: Path) -> Iterator[None]:
    """Start an engine for the model in `folder` inside this context: it restores the number of
    torch threads, which vLLM changes, and raises UserError where vLLM cannot load the model."""
    threads = torch.get_num_threads()
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: vLLM cannot load this model ({reason}); use sampling.sampler 'transformers'"
            " or evaluate.backend 'hf'"
        ) from error
    finally:
        torch.set_num_threads(threads)


class VLLMSampler:
    """Samples with vLLM from q′: the barred tokens have a logit bias of −∞. log q′ and
    `log_allowed` are computed from vLLM's raw log-probabilities, the model's own at temperature 1,
    of each sampled token, the barred tokens and EoL.

    Every draw is a request; the requests of a prompt share its cached prefix. On a CPU the draws
    are those of `TransformersSampler` up to rounding; on a GPU they are others from the same
    distribution.
    """

    def __init__(
        self,
        folder: Path,
        special_tokens: SpecialTokens,
        *,
        max_latent_tokens: int,
        context_length: int,
        precision: Precision,
        gpu_memory_utilization: float,
        seed: int,
    ) -> None:
        prepare_vllm()
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"sampling.sampler 'vllm': vllm cannot be imported ({error}); install it or use"
                " 'transformers'"
            ) from error
        self.max_latent_tokens, self.seed = max_latent_tokens, seed
        self.use_request_seeds = torch.cuda.is_available()
        self.special_tokens = special_tokens
        with vllm_startup(folder):
            self.model: Any = LLM(
                str(folder),
                skip_tokenizer_init=True,
                dtype=precision,
                gpu_memory_utilization=gpu_memory_utilization,
                logits_processors=None if self.use_request_seeds else [_processor_name()],
                seed=seed,
                **vllm_engine_args(context_length),
            )

    def sample(
        self,
        prompts: Sequence[TokenIds],
        keys: Sequence[SampleKey],
        num_samples: int,
        first_index: int = 0,
    ) -> list[list[Draw]]:
        """As `Sampler.sample`."""
        from vllm import SamplingParams, TokensPrompt

        special = self.special_tokens
        sampling_params = [
            SamplingParams(
                # The last step yields log q(EoL) of a draw that has reached the limit.
                max_tokens=self.max_latent_tokens + 1,
                logit_bias=dict.fromkeys(special.barred, -math.inf),
                logprob_token_ids=[special.eol, *special.barred],
                flat_logprobs=True,
                stop_token_ids=[special.eol],
                ignore_eos=True,
                detokenize=False,
                skip_clone=True,
                **self._random_params([*key, k]),
            )
            for key in keys
            for k in range(first_index, first_index + num_samples)
        ]
        requests = [
            TokensPrompt(prompt_token_ids=list(prompt))
            for prompt in prompts
            for _ in range(num_samples)
        ]
        outputs = self.model.generate(requests, sampling_params, use_tqdm=False)
        draws = [self._draw(output.outputs[0]) for output in outputs]
        return [draws[start : start + num_samples] for start in range(0, len(draws), num_samples)]

    def _random_params(self, key: list[str | int]) -> dict[str, Any]:
        """The sampling parameters that determine the random numbers of a draw."""
        if self.use_request_seeds:
            seed = int(generator(self.seed, *key).integers(2**31))
            return {"temperature": 1.0, "seed": seed}
        return {"temperature": 0.0, "extra_args": {"draw": [self.seed, *key]}}

    def _draw(self, output: Any) -> Draw:
        tokens = list(output.token_ids)
        # Of each token: log q of itself, of EoL, and of the barred tokens.
        log_probs_LT = np.reshape(output.logprobs.logprobs, (len(tokens), -1))
        barred_L = np.exp(log_probs_LT[:, 2:]).sum(1)
        # The sampled token is allowed, whatever the rounding of the others.
        allowed_L = np.maximum(1 - barred_L, np.exp(log_probs_LT[:, 0]))
        log_q_L, log_allowed_L = log_probs_LT[:, 0] - np.log(allowed_L), np.log(allowed_L)
        limit = self.max_latent_tokens
        if len(tokens) <= limit:
            return Draw(tuple(tokens[:-1]), "stop", log_q_L.sum(), log_allowed_L.sum())
        # Whatever was drawn after the maximum number of tokens is replaced by EoL.
        log_allowed_L[limit] = log_probs_LT[limit, 1]
        return Draw(tuple(tokens[:limit]), "length", log_q_L[:limit].sum(), log_allowed_L.sum())


def _processor_name() -> str:
    """The import path of the logits processor. The import makes this module's dependence on it
    visible to `fingerprint.hash_code`; it needs vLLM."""
    from boltlm.estep.vllm_logits_processor import InverseCDFProcessor

    return f"{InverseCDFProcessor.__module__}:{InverseCDFProcessor.__qualname__}"

"""Draws by vLLM, stock releases, on a GPU or with the CPU build.

On a GPU each draw is a request with a seed of its own, which the kernels of vLLM's V2 runner take
at no cost. On a CPU the V1 runner draws rows with seeds one by one; there `vllm_noise` hands in the
random numbers.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from boltlm.errors import UserError
from boltlm.model.checkpoint import Precision
from boltlm.sampling.samplers import Draw, Ends, Key
from boltlm.seeds import generator
from boltlm.sequences.layouts import Ids
from boltlm.tokens import Markers

CPU_CACHE_GIB = "2"  # of the key–value cache where there is no GPU and nothing else is set
BATCHED_TOKENS = 8192  # that a step may take in
SEQUENCES = 1024  # drawn at once, as far as the cache holds them
CPU_BLOCK = 32  # tokens; whole blocks of a prompt are shared, the least that a CPU's kernels take


def prepare() -> None:
    """What vLLM reads from the environment, before it is imported."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"


def engine_settings(window: int) -> dict[str, Any]:
    """Of an engine for many short requests that share prefixes, on this machine."""
    gpu = torch.cuda.is_available()
    return {
        "max_model_len": window,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": False,  # 190 against 164 chunks/s on two cores
        "max_num_batched_tokens": max(window, BATCHED_TOKENS),
        "max_num_seqs": SEQUENCES,
        "block_size": None if gpu else CPU_BLOCK,
        "enforce_eager": not gpu,
        "disable_log_stats": True,
    }


@contextmanager
def starting(folder: Path) -> Iterator[None]:
    """Keep the number of threads, which vLLM sets for itself. Raises UserError where vLLM does not
    take the model in `folder`."""
    threads = torch.get_num_threads()
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: vLLM does not take this model ({reason}); use transformers (sampler) or hf"
            " (evaluate.backend)"
        ) from error
    finally:
        torch.set_num_threads(threads)


class VllmSampler:
    """Log-probabilities are vLLM's raw ones, the model's own at temperature 1. Every draw is a
    request of its own; those of one prompt share its cached prefix. On a CPU these are the draws of
    `transformers` but for rounding; on a GPU others of the same law."""

    def __init__(
        self,
        folder: Path,
        markers: Markers,
        *,
        max_latent_tokens: int,
        window: int,
        precision: Precision,
        memory_fraction: float,
        seed: int,
    ) -> None:
        prepare()
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"sampling.sampler 'vllm' needs vllm: {error}") from error
        self.max_latent_tokens, self.seed = max_latent_tokens, seed
        self.seeds = torch.cuda.is_available()
        self.ends = Ends.of_latents(markers)
        with starting(folder):
            self.model: Any = LLM(
                str(folder),
                skip_tokenizer_init=True,
                dtype=precision,
                gpu_memory_utilization=memory_fraction,
                logits_processors=None if self.seeds else ["boltlm.sampling.vllm_noise:Noise"],
                seed=seed,
                **engine_settings(window),
            )

    def sample(
        self, prompts: Sequence[Ids], keys: Sequence[Key], draws: int, first: int = 0
    ) -> list[list[Draw]]:
        from vllm import SamplingParams, TokensPrompt

        settings = [
            SamplingParams(
                max_tokens=self.max_latent_tokens + 1,
                logprobs=0,
                flat_logprobs=True,
                stop_token_ids=list(self.ends.finish_of),
                ignore_eos=True,
                detokenize=False,
                skip_clone=True,
                **self._random([*key, k]),
            )
            for key in keys
            for k in range(first, first + draws)
        ]
        asked = [
            TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts for _ in range(draws)
        ]
        found = [
            self._draw(one.outputs[0])
            for one in self.model.generate(asked, settings, use_tqdm=False)
        ]
        return [found[start : start + draws] for start in range(0, len(found), draws)]

    def _random(self, key: list[str | int]) -> dict[str, Any]:
        """Where a draw's random numbers come from."""
        if self.seeds:
            seed = int(generator(self.seed, *key).integers(2**31))
            return {"temperature": 1.0, "seed": seed}
        return {"temperature": 0.0, "extra_args": {"draw": [self.seed, *key]}}

    def _draw(self, output: Any) -> Draw:
        tokens = list(output.token_ids)
        log_q = sum(output.logprobs.logprobs)  # one a token: none but the drawn ones is asked for
        assert len(output.logprobs.logprobs) == len(tokens)
        end = self.ends.finish_of.get(tokens[-1])
        # What ran to the limit drew one token more than a latent may have.
        kept = tokens[:-1] if end is not None else tokens[: self.max_latent_tokens]
        return Draw(tuple(kept), end or "length", float(log_q))

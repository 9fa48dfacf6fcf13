"""Chunks per second of the E-step, compared with the authors' scheme and with plain `generate`.

    python benchmarks/estep.py --model models/em1 --chunks data/chunks/em --limit 300

The sides are:

    ours_transformers, ours_vllm   the E-step with either sampler
    ours_unmasked                  as ours_transformers, but from the model's own distribution: a
                                   draw that any special token ends is then taken for a latent
    reference                      vLLM with default settings: K copies of each prompt, then a
                                   second pass with prompt_logprobs over the joint texts, which
                                   were decoded and encoded again
    reference_tuned                the same with the engine settings of our sampler
    generate                       model.generate with K sequences per prompt, then one full forward
                                   pass per sample for q and one for p
    scorer, prompt_logprobs        log p alone of the same drawn ids, by our scorer and by vLLM

Each side runs three times in its own process; the better of the last two runs counts, without the
time to load the model.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sides import add_paths, measured  # noqa: E402

from boltlm.checkpoint import Precision  # noqa: E402
from boltlm.estep.config import DrawSettings  # noqa: E402
from boltlm.estep.contexts import (  # noqa: E402
    ChunkInContext,
    Throughput,
    chunks_in_context,
    joint_scores,
)
from boltlm.estep.estep import EStep  # noqa: E402
from boltlm.estep.samplers import (  # noqa: E402
    Draw,
    TransformersSampler,
    inverse_cdf,
)
from boltlm.estep.shard_worker import build_estep, context_token_budget  # noqa: E402
from boltlm.estep.verify_weights import exact_log_prob  # noqa: E402
from boltlm.param_types import PositiveInt  # noqa: E402
from boltlm.params import build_settings, load  # noqa: E402
from boltlm.records import Chunk, read_table  # noqa: E402
from boltlm.sequences import layouts  # noqa: E402

SIDES = (
    "ours_transformers",
    "ours_vllm",
    "ours_unmasked",
    "reference",
    "reference_tuned",
    "generate",
    "scorer",
    "prompt_logprobs",
)
Work = Callable[[EStep, Sequence[ChunkInContext], int], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSettings(DrawSettings):
    """What the sides need: settings of the E-step, and K."""

    k_samples: PositiveInt


class UnmaskedSampler(TransformersSampler):
    """Samples from the model's own distribution. Every special token ends a draw, as EoL does."""

    def _choose_tokens(
        self, logits_BV: torch.Tensor, rows: list[list[int]], noise_D: np.ndarray
    ) -> tuple[list[list[int]], list[list[float]], list[float]]:
        log_probs_BV = logits_BV.float().log_softmax(-1)
        noise_BK = np.zeros((len(rows), max(map(len, rows))))
        for index, row in enumerate(rows):
            noise_BK[index, : len(row)] = noise_D[row]
        tokens_BK, _ = inverse_cdf(log_probs_BV, torch.from_numpy(noise_BK))
        log_q_BK = log_probs_BV.gather(1, tokens_BK)
        is_end_BK = torch.isin(tokens_BK, torch.tensor(self.special_tokens.barred))
        tokens_BK[is_end_BK] = self.special_tokens.eol
        return tokens_BK.tolist(), log_q_BK.tolist(), [0.0] * len(rows)


def run_reference(estep: EStep, chunks: Sequence[ChunkInContext], num_samples: int) -> int:
    """Sample K copies of each prompt, decode, encode again, and score the joint texts with vLLM."""
    from vllm import SamplingParams, TokensPrompt

    special, coder = estep.special_tokens, estep.coder
    engine: Any = estep.sampler
    sampling_params = SamplingParams(
        temperature=1.0,
        max_tokens=estep.max_latent_tokens + 1,
        logprobs=0,
        stop_token_ids=[special.eol, *special.barred],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [
        TokensPrompt(prompt_token_ids=layouts.posterior_prompt(special, chunk.context, chunk.text))
        for chunk in chunks
        for _ in range(num_samples)
    ]
    outputs = engine.model.generate(prompts, sampling_params, use_tqdm=False)
    joint = []
    for index, output in enumerate(outputs):
        chunk = chunks[index // num_samples]
        latent = coder.encode(coder.decode(list(output.outputs[0].token_ids[:-1])))
        text = coder.encode(coder.decode(list(chunk.text)))
        prompt = layouts.prior_prompt(special, chunk.context)
        joint.append([*prompt, *latent, special.eol, *text])
    return run_prompt_logprobs(engine.model, joint)


def run_prompt_logprobs(engine: Any, joint: Sequence[list[int]]) -> int:
    """Compute the log-probabilities of complete sequences with vLLM; returns their number."""
    from vllm import SamplingParams, TokensPrompt

    sampling_params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in joint]
    outputs = engine.generate(prompts, sampling_params, use_tqdm=False)
    return sum(len(output.prompt_logprobs) for output in outputs)


def run_scorer(
    estep: EStep, chunks: Sequence[ChunkInContext], draws: Sequence[Sequence[Draw]]
) -> int:
    """Compute log p of drawn ids with our scorer; returns their number."""
    scores = joint_scores(
        estep.model, estep.special_tokens, chunks, draws, estep.config.batch_tokens
    )
    return sum(map(len, scores))


def joint_sequences(
    estep: EStep, chunks: Sequence[ChunkInContext], draws: Sequence[Sequence[Draw]]
) -> list[list[int]]:
    """The sequences that vLLM must score for the same result: one for each draw."""
    special = estep.special_tokens
    return [
        [*layouts.prior_prompt(special, chunk.context), *draw.tokens, special.eol, *chunk.text]
        for chunk, draws_K in zip(chunks, draws, strict=True)
        for draw in draws_K
    ]


def create_engine(model: Path, context_length: int, precision: Precision, **arguments: Any) -> Any:
    """vLLM with its default settings, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    from vllm import LLM

    threads = torch.get_num_threads()
    engine = LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype=precision,
        max_model_len=context_length,
        enforce_eager=not torch.cuda.is_available(),
        seed=1,
        **arguments,
    )
    torch.set_num_threads(threads)
    return engine


def run_generate(estep: EStep, chunks: Sequence[ChunkInContext], num_samples: int) -> int:
    """Call model.generate for one prompt at a time, then run a full forward pass per sample for q
    and one for p; returns the number of samples."""
    special, model = estep.special_tokens, estep.model
    count = 0
    for chunk in chunks:
        prompt = layouts.posterior_prompt(special, chunk.context, chunk.text)
        prior = layouts.prior_prompt(special, chunk.context)
        with torch.inference_mode():
            outputs: Any = model.generate(  # pyright: ignore[reportCallIssue]
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True,
                top_k=0,
                num_return_sequences=num_samples,
                max_new_tokens=estep.max_latent_tokens + 1,
                eos_token_id=[special.eol, special.eos],
                pad_token_id=special.eos,
            )
        for row in outputs[:, len(prompt) :].tolist():
            latent = row[: row.index(special.eol) + 1] if special.eol in row else row
            exact_log_prob(model, prompt, latent)
            exact_log_prob(model, prior, [*latent, *chunk.text])
            count += 1
    return count


def prepare(
    args: argparse.Namespace, estep: EStep, chunks: Sequence[ChunkInContext], num_samples: int
) -> Work:
    """The work that a side repeats; what it needs beforehand is done here, outside the timing."""
    context_length = estep.coder.context_length
    if args.side == "ours_unmasked":
        estep.sampler = UnmaskedSampler(
            estep.model,
            estep.special_tokens,
            estep.max_latent_tokens,
            estep.config.batch_tokens,
            estep.seed,
        )
    if args.side == "reference":
        engine = create_engine(args.model, context_length, args.precision)
        sampler: Any = SimpleNamespace(model=engine)
        estep.sampler = sampler
    if args.side in ("reference", "reference_tuned"):
        return run_reference
    if args.side == "generate":
        return run_generate
    if args.side not in ("scorer", "prompt_logprobs"):
        return lambda estep, chunks, num_samples: estep.run(chunks, num_samples)
    special = estep.special_tokens
    prompts = [layouts.posterior_prompt(special, chunk.context, chunk.text) for chunk in chunks]
    keys = [("sample", "benchmark", chunk.doc_id, chunk.chunk) for chunk in chunks]
    draws = estep.sampler.sample(prompts, keys, num_samples)
    if args.side == "scorer":
        return lambda estep, chunks, _: run_scorer(estep, chunks, draws)
    # prompt_logprobs does not use the prefix cache.
    engine = create_engine(args.model, context_length, args.precision, enable_prefix_caching=False)
    joint = joint_sequences(estep, chunks, draws)
    return lambda *_: run_prompt_logprobs(engine, joint)


def measure_side(args: argparse.Namespace) -> dict[str, float]:
    """One side, in this process."""
    params = load(args.params)
    uses_our_vllm = args.side in ("ours_vllm", "reference_tuned")
    params["sampling"] |= {
        "sampler": "vllm" if uses_our_vllm else "transformers",
        "precision": args.precision,
    }
    settings = build_settings(BenchmarkSettings, params)
    estep = build_estep(settings, args.model, purpose="benchmark")
    token_budget = context_token_budget(estep.coder, settings.max_latent_tokens)
    table = list(read_table(args.chunks, Chunk))
    chunks = chunks_in_context(table, settings.context_chunks, token_budget)[: args.limit]
    work = prepare(args, estep, chunks, settings.k_samples)
    runs: list[tuple[float, Throughput]] = []
    for _ in range(3):
        estep.throughput = Throughput()
        start = time.perf_counter()
        work(estep, chunks, settings.k_samples)
        runs.append((time.perf_counter() - start, estep.throughput))
    seconds, throughput = min(runs[1:], key=lambda run: run[0])
    estep_seconds = max(throughput.sample_seconds + throughput.score_seconds, 1e-9)
    return {
        "chunks": len(chunks),
        "chunks_per_second": len(chunks) / seconds,
        "sampling_time_fraction": throughput.sample_seconds / estep_seconds,
        "sampled_tokens_per_second": throughput.sampled_tokens
        / max(throughput.sample_seconds, 1e-9),
        "scored_tokens_per_second": throughput.scored_tokens / max(throughput.score_seconds, 1e-9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_paths(parser, params="params.yaml", model="models/em1", chunks="data/chunks/em")
    parser.add_argument("--limit", type=int, default=300, help="number of chunks")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_side(args)))
        return
    sides: dict[str, dict[str, float]] = {}
    for name in SIDES:
        sides[name] = measured("--side", name)
        print(name, json.dumps(sides[name]), flush=True)
    speed = {name: facts["chunks_per_second"] for name, facts in sides.items()}
    best = max(speed["ours_transformers"], speed["ours_vllm"])
    facts = {
        "cores": os.cpu_count(),
        "precision": args.precision,
        **{f"chunks_per_second_{name}": value for name, value in speed.items()},
        "ratio_masked_vs_unmasked": speed["ours_transformers"] / speed["ours_unmasked"],
        "ratio_masked_vs_unmasked_by_token": sides["ours_transformers"]["sampled_tokens_per_second"]
        / sides["ours_unmasked"]["sampled_tokens_per_second"],
        "ratio_vs_reference": best / speed["reference"],
        "ratio_vs_generate": best / speed["generate"],
        "ratio_vllm_vs_reference": speed["ours_vllm"] / speed["reference"],
        "ratio_vllm_vs_reference_tuned": speed["ours_vllm"] / speed["reference_tuned"],
        "ratio_scorer_vs_prompt_logprobs": speed["scorer"] / speed["prompt_logprobs"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

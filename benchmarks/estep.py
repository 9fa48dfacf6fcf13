"""Chunks a second of the E-step, against the reference's scheme and against plain generate.

    python benchmarks/estep.py --model models/em1 --chunks data/chunks/em --limit 300

`reference`: K copies of each prompt to vLLM, then a second vLLM pass with prompt_logprobs over the
decoded and encoded joint texts, vLLM's settings as they come; `reference_tuned`: the same with the
settings that our sampler gives vLLM. `generate`: model.generate with K sequences a prompt, then one
full forward pass a sample for q and for p. `ours`: the E-step with each sampler. `scorer` and
`prompt_logprobs`: log p alone, of the same drawn ids, by our scorer and by vLLM. Each side is a
process of its own and is run three times; the best of the last two counts, without the loading.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from sides import add_paths, measured  # noqa: E402

from boltlm.params import load, section  # noqa: E402
from boltlm.records import Chunk, read  # noqa: E402
from boltlm.sampling.estep import Effort, EStep, Item, items, joint_scores  # noqa: E402
from boltlm.sampling.precision import log_prob  # noqa: E402
from boltlm.sampling.samplers import Draw, Ends  # noqa: E402
from boltlm.sampling.shards import context_room, make_estep  # noqa: E402
from boltlm.sequences import layouts  # noqa: E402

SIDES = (
    "ours_transformers",
    "ours_vllm",
    "reference",
    "reference_tuned",
    "generate",
    "scorer",
    "prompt_logprobs",
)


def reference(estep: EStep, found: Sequence[Item], draws: int) -> int:
    """Sample K copies of each prompt, decode, encode again, and score the joint by vLLM."""
    from vllm import SamplingParams, TokensPrompt

    m, coder = estep.markers, estep.coder
    engine: Any = estep.sampler
    ends = list(Ends.of_latents(m).finish_of)
    settings = SamplingParams(
        temperature=1.0,
        max_tokens=estep.max_latent_tokens + 1,
        logprobs=0,
        stop_token_ids=ends,
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [
        TokensPrompt(prompt_token_ids=layouts.posterior_prefix(m, item.context, item.text))
        for item in found
        for _ in range(draws)
    ]
    drawn = engine.model.generate(prompts, settings, use_tqdm=False)
    joint = []
    for place, output in enumerate(drawn):
        item = found[place // draws]
        latent = coder.encode(coder.decode(list(output.outputs[0].token_ids[:-1])))
        text = coder.encode(coder.decode(list(item.text)))
        joint.append([*layouts.prior_prefix(m, item.context), *latent, m.eol, *text])
    return prompt_logprobs(engine.model, joint)


def prompt_logprobs(engine: Any, joint: Sequence[list[int]]) -> int:
    """Log-probabilities of whole sequences by vLLM; how many there are."""
    from vllm import SamplingParams, TokensPrompt

    score = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in joint]
    scored = engine.generate(asked, score, use_tqdm=False)
    return sum(len(one.prompt_logprobs) for one in scored)


def scorer(estep: EStep, found: Sequence[Item], groups: Sequence[Sequence[Draw]]) -> int:
    """log p of drawn ids by our scorer."""
    scores = joint_scores(estep.model, estep.markers, found, groups, estep.config.batch_tokens)
    return sum(map(len, scores))


def joints(estep: EStep, found: Sequence[Item], groups: Sequence[Sequence[Draw]]) -> list[Any]:
    """What vLLM must score for the same: a sequence for every draw that ended."""
    m = estep.markers
    return [
        [*layouts.prior_prefix(m, item.context), *draw.tokens, m.eol, *item.text]
        for item, group in zip(found, groups, strict=True)
        for draw in group
        if draw.finish == "stop"
    ]


def stock(model: Path, window: int, precision: str, **more: Any) -> Any:
    """vLLM with its own settings, in this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    import torch
    from vllm import LLM

    threads = torch.get_num_threads()
    engine = LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype=precision,
        max_model_len=window,
        enforce_eager=not torch.cuda.is_available(),
        seed=1,
        **more,
    )
    torch.set_num_threads(threads)
    return engine


def generate(estep: EStep, found: Sequence[Item], draws: int) -> int:
    """model.generate a prompt at a time, then a full forward pass a sample for q and for p."""
    import torch

    m, model = estep.markers, estep.model
    count = 0
    for item in found:
        prompt = layouts.posterior_prefix(m, item.context, item.text)
        with torch.inference_mode():
            drawn: Any = model.generate(  # pyright: ignore[reportCallIssue]
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True,
                top_k=0,
                num_return_sequences=draws,
                max_new_tokens=estep.max_latent_tokens + 1,
                eos_token_id=[m.eol, m.eos],
                pad_token_id=m.eos,
            )
        for row in drawn[:, len(prompt) :].tolist():
            latent = row[: row.index(m.eol) + 1] if m.eol in row else row
            log_prob(model, prompt, latent)
            log_prob(model, layouts.prior_prefix(m, item.context), [*latent, *item.text])
            count += 1
    return count


def side(args: argparse.Namespace) -> dict[str, float]:
    params = load(args.params)
    params["sampling"] |= {"sampler": "transformers", "precision": args.precision}
    if args.side in ("ours_vllm", "reference_tuned"):
        params["sampling"]["sampler"] = "vllm"
    estep = make_estep(params, args.model, purpose="benchmark")
    room = context_room(estep.coder, params)
    chunks = list(read(args.chunks, Chunk))
    found = items(chunks, section(params, "context_chunks"), room)[: args.limit]
    draws = section(params, "k_samples")
    window = estep.coder.window
    if args.side == "reference":
        engine: Any = SimpleNamespace(model=stock(args.model, window, args.precision))
        estep.sampler = engine
    work: Callable[[EStep, Sequence[Item], int], Any] = {
        "reference": reference,
        "reference_tuned": reference,
        "generate": generate,
    }.get(args.side, lambda estep, found, draws: estep.run(found, draws))
    if args.side in ("scorer", "prompt_logprobs"):
        m = estep.markers
        prompts = [layouts.posterior_prefix(m, item.context, item.text) for item in found]
        keys = [("sample", "benchmark", item.doc_id, item.chunk) for item in found]
        groups = estep.sampler.sample(prompts, keys, draws)
        work = lambda estep, found, _: scorer(estep, found, groups)  # noqa: E731
    if args.side == "prompt_logprobs":  # which does not use the prefix cache
        scoring = stock(args.model, window, args.precision, enable_prefix_caching=False)
        joint = joints(estep, found, groups)
        work = lambda *_: prompt_logprobs(scoring, joint)  # noqa: E731
    took: list[tuple[float, Effort]] = []
    for _ in range(3):
        estep.effort = Effort()
        started = time.perf_counter()
        work(estep, found, draws)
        took.append((time.perf_counter() - started, estep.effort))
    seconds, effort = min(took[1:], key=lambda run: run[0])
    both = max(effort.sample_seconds + effort.score_seconds, 1e-9)
    return {
        "chunks": len(found),
        "chunks_per_second": len(found) / seconds,
        "sampling_time_fraction": effort.sample_seconds / both,
        "sampled_tokens_per_second": effort.sampled_tokens / max(effort.sample_seconds, 1e-9),
        "scored_tokens_per_second": effort.scored_tokens / max(effort.score_seconds, 1e-9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_paths(parser, params="params.yaml", model="models/em1", chunks="data/chunks/em")
    parser.add_argument("--limit", type=int, default=300, help="chunks")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args)))
        return
    found: dict[str, dict[str, float]] = {}
    for name in SIDES:
        found[name] = measured("--side", name)
        print(name, json.dumps(found[name]), flush=True)
    speed = {name: facts["chunks_per_second"] for name, facts in found.items()}
    best = max(speed["ours_transformers"], speed["ours_vllm"])
    facts = {
        "cores": os.cpu_count(),
        "precision": args.precision,
        **{f"chunks_per_second_{name}": value for name, value in speed.items()},
        "ratio_vs_reference": best / speed["reference"],
        "ratio_vs_generate": best / speed["generate"],
        "ratio_vllm_vs_reference": speed["ours_vllm"] / speed["reference"],
        "ratio_vllm_vs_reference_tuned": speed["ours_vllm"] / speed["reference_tuned"],
        "ratio_scorer_vs_prompt_logprobs": speed["scorer"] / speed["prompt_logprobs"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Sampling with vLLM itself: the draws of the transformers sampler or its distribution, and the
log q′ of a plain loop.

Shapes: V vocabulary.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm import checkpoint
from boltlm.estep.contexts import ChunkInContext, chunks_in_context
from boltlm.estep.estep import EStep
from boltlm.estep.shard_worker import build_estep, context_token_budget
from boltlm.estep.verify_weights import exact_log_prob, exact_log_weight
from boltlm.records import Chunk, Sample, read_table
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder
from boltlm.training.compute import write_compute
from tests import reference, tiny
from tests.estep.stage_harness import LatentsStage

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

SAMPLES = 300
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """The base model's tokenizer, and a model whose head dimension vLLM supports on a CPU. It is
    far from uniform, about half of the draws end within a few tokens, and the tokens that are
    barred have much of the probability."""
    folder = tmp_path_factory.mktemp("model")
    coder = TextCoder(base_folder)
    config = LlamaConfig.from_pretrained(base_folder)
    config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 32})
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    favoured = [coder.special_tokens.eol, *coder.encode("Dial from the 1 2 3")]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[favoured, 0] = 1.0
    checkpoint.save_model(model, folder, base_folder, {})
    write_compute(folder, "models/tests", flops=0, flops_per_token=6, history=[])
    return folder


def create_stage(folder: Path, model: Path, **sampling: Any) -> LatentsStage:
    stage = LatentsStage(folder, model, 100, documents=2)
    stage.params["sampling"] |= sampling
    stage.params |= {"k_samples": SAMPLES, "max_latent_tokens": 3}
    return stage


def run_process(command: list[str]) -> str:
    """Run a process of its own, because vLLM cannot share one with other tests; its output."""
    env = {**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(tiny.ROOT / "src")}
    return subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout


def chunks_by_id(stage: LatentsStage, estep: EStep) -> dict[tuple[str, int], ChunkInContext]:
    """Every chunk of the corpus with its context."""
    settings = stage.settings
    token_budget = context_token_budget(estep.coder, settings.max_latent_tokens)
    chunks = list(read_table(stage.chunks, Chunk))
    in_context = chunks_in_context(chunks, settings.context_chunks, token_budget)
    return {(chunk.doc_id, chunk.chunk): chunk for chunk in in_context}


def check_weights(samples: list[Sample], stage: LatentsStage, folder: Path) -> EStep:
    """log q′, log_allowed and log w equal those of a plain loop within 10⁻³; returns an E-step
    without vLLM."""
    stage.params["sampling"]["sampler"] = "transformers"
    estep = build_estep(stage.settings, folder, purpose="em1")
    chunks = chunks_by_id(stage, estep)
    special = estep.special_tokens
    assert {sample.finish for sample in samples} == {"stop", "length"}
    for sample in samples[::7]:
        chunk, ended = chunks[sample.doc_id, sample.chunk], [*sample.tokens, special.eol]
        log_q, log_w = exact_log_weight(estep.model, special, chunk, sample.tokens, sample.finish)
        assert abs(sample.log_q - log_q) < 1e-3
        assert abs(sample.log_weight - log_w) < 1e-3
        prompt = layouts.posterior_prompt(special, chunk.context, chunk.text)
        log_q_unmasked = exact_log_prob(estep.model, prompt, ended)
        assert abs(sample.log_q + sample.log_allowed - log_q_unmasked) < 1e-3
    return estep


@pytest.mark.timeout(1200)
def test_on_a_cpu_both_samplers_have_the_same_draws(folder: Path, tmp_path: Path) -> None:
    """The same random numbers select the same tokens, except where rounding moves a boundary; log q
    and log w of vLLM's draws are those of a plain loop."""
    samplers = ("transformers", "vllm")
    stages = {name: create_stage(tmp_path / name, folder, sampler=name) for name in samplers}
    samples: dict[str, list[Sample]] = {}
    for name, stage in stages.items():
        run_process(stage.command())
        metrics = json.loads((stage.folder / "metrics.json").read_text("utf-8"))
        assert metrics["samples"] == SAMPLES * metrics["chunks"]
        samples[name] = stage.samples()
    assert 0.1 < np.mean([s.finish == "stop" for s in samples["vllm"]]) < 0.9
    equal = [
        (first, second)
        for first, second in zip(*samples.values(), strict=True)
        if (first.tokens, first.finish) == (second.tokens, second.finish)
    ]
    assert len(equal) > 0.98 * len(samples["vllm"])
    for name in ("log_q", "log_allowed"):
        values = np.array([[getattr(s, name) for s in pair] for pair in equal])
        np.testing.assert_allclose(values[:, 0], values[:, 1], atol=1e-4)
    assert np.exp([s.log_allowed for s in samples["vllm"]]).mean() < 0.9
    check_weights(samples["vllm"], stages["vllm"], folder)


PREFIX_CACHE_SCRIPT = """
import json, sys
from pathlib import Path
from boltlm.estep.config import EStepSettings
from boltlm.estep.shard_worker import build_estep
from boltlm.estep.vllm_sampler import CPU_BLOCK_TOKENS as block
from boltlm.params import load_settings
settings = load_settings(EStepSettings, Path(sys.argv[1]), name="em1")
sampler = build_estep(settings, Path(sys.argv[2]), purpose="em1").sampler
cached, generate = [], sampler.model.generate
def recorded_generate(*args, **kwargs):
    outputs = generate(*args, **kwargs)
    cached.extend(output.num_cached_tokens for output in outputs)
    return outputs
sampler.model.generate = recorded_generate
lengths = [20, block, block + 1, 2 * block + 9]
prompts = [[10 + (i + i * i * length) % 200 for i in range(length)] for length in lengths]
sampler.sample(prompts, [("tests", length) for length in lengths], 4)
print(json.dumps({"block": block, "lengths": lengths, "cached": cached}))
"""


@pytest.mark.timeout(1200)
def test_draws_of_a_prompt_share_its_blocks(folder: Path, tmp_path: Path) -> None:
    """Every complete block of a prompt without its last token is computed once for all its
    draws."""
    params = create_stage(tmp_path, folder, sampler="vllm").write_params()
    output = run_process([sys.executable, "-c", PREFIX_CACHE_SCRIPT, str(params), str(folder)])
    report = json.loads(output.splitlines()[-1])
    block, cached = report["block"], np.reshape(report["cached"], (-1, 4))
    for length, cached_tokens in zip(report["lengths"], cached, strict=True):
        assert cached_tokens[0] == 0
        assert (cached_tokens[1:] == (length - 1) // block * block).all(), (length, cached_tokens)


REQUEST_SEEDS_SCRIPT = """
import sys
from pathlib import Path
from boltlm.estep.config import EStepSettings
from boltlm.estep.contexts import chunks_in_context
from boltlm.estep.shard_worker import build_estep, context_token_budget
from boltlm.params import load_settings
from boltlm.records import Chunk, Sample, read_table, write_shard
params, model, chunks, out = (Path(argument) for argument in sys.argv[1:])
settings = load_settings(EStepSettings, params, name="em1")
estep = build_estep(settings, model, purpose="em1")
estep.sampler.use_request_seeds = True
token_budget = context_token_budget(estep.coder, settings.max_latent_tokens)
table = list(read_table(chunks, Chunk))
groups = estep.run(
    chunks_in_context(table, settings.context_chunks, token_budget), settings.k_samples
)
write_shard(out / "00000.parquet", Sample, [sample for group in groups for sample in group])
"""


@pytest.mark.timeout(1200)
def test_seeded_requests_have_the_models_distribution(folder: Path, tmp_path: Path) -> None:
    """The procedure for GPUs, run on the CPU: χ² test of first tokens against the softmax in
    float64 over allowed tokens; log q′ and log w are those of a plain loop."""
    stage = create_stage(tmp_path, folder, sampler="vllm")
    out = tmp_path / "seeded"
    paths = [stage.write_params(), folder, stage.chunks, out]
    run_process([sys.executable, "-c", REQUEST_SEEDS_SCRIPT, *map(str, paths)])
    samples = list(read_table(out, Sample))
    estep = check_weights(samples, stage, folder)
    special, model64 = estep.special_tokens, reference.double(estep.model)
    for (doc_id, n), chunk in chunks_by_id(stage, estep).items():
        drawn = [s for s in samples if (s.doc_id, s.chunk) == (doc_id, n)]
        assert len(drawn) == SAMPLES
        prompt = layouts.posterior_prompt(special, chunk.context, chunk.text)
        probs_V = reference.next_probs(model64, prompt)
        probs_V[list(special.barred)] = 0
        probs_V /= probs_V.sum()
        most_probable = np.argsort(probs_V)[::-1][:6].tolist()
        first = [s.tokens[0] if s.tokens else special.eol for s in drawn]
        observed = [first.count(token) for token in most_probable]
        expected = [float(probs_V[token]) * SAMPLES for token in most_probable]
        p = reference.chi2(
            [*observed, SAMPLES - sum(observed)], [*expected, SAMPLES - sum(expected)]
        )
        assert p > 1e-4

"""vLLM really draws: the transformers sampler's draws or its law, and log q as a plain loop's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm.model import checkpoint
from boltlm.records import Chunk, Sample, read
from boltlm.sampling.estep import EStep, Item, items
from boltlm.sampling.precision import log_weight
from boltlm.sampling.shards import context_room, make_estep
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder
from tests import exact, tiny
from tests.sampling.test_shards import Stage

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

DRAWS = 300
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """The base's tokenizer, and a model whose heads vLLM takes on a CPU: far from uniform, with a
    third of its draws ending within a few tokens."""
    folder = tmp_path_factory.mktemp("heads")
    coder = TextCoder(base_folder)
    config = LlamaConfig.from_pretrained(base_folder)
    config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 32})
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    favoured = [coder.markers.eol, *coder.encode("Dial from the 1 2 3")]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[favoured, 0] = 1.0
    checkpoint.save(model, folder, base_folder, {})
    return folder


def stage(where: Path, model: Path, **sampling: Any) -> Stage:
    made = Stage(where, model, 100, documents=2)
    made.params["sampling"] |= sampling
    made.params |= {"k_samples": DRAWS, "max_latent_tokens": 3}
    return made


def run(made: Stage) -> dict[str, Any]:
    """The stage as a process of its own: vLLM does not share one with other tests."""
    env = {**os.environ, **VLLM, "PYTHONPATH": str(tiny.ROOT / "src")}
    subprocess.run(made.command(), check=True, env=env)
    return json.loads((made.folder / "m.json").read_text("utf-8"))


def places(made: Stage, estep: EStep) -> dict[tuple[str, int], Item]:
    """Every chunk of the corpus with its context."""
    context, room = made.params["context_chunks"], context_room(estep.coder, made.params)
    found = items(list(read(made.folder / "chunks" / "em", Chunk)), context, room)
    return {(item.doc_id, item.chunk): item for item in found}


def check_weights(samples: list[Sample], made: Stage, folder: Path) -> EStep:
    """log q and log w are those of a plain loop within 10⁻³; returns an E-step without vLLM."""
    sampling = made.params["sampling"] | {"sampler": "transformers"}
    estep = make_estep(made.params | {"sampling": sampling}, folder, purpose="em1")
    of_chunk = places(made, estep)
    done = [sample for sample in samples if sample.finish == "stop"][::7]
    assert len(done) > 20
    for sample in done:
        item = of_chunk[sample.doc_id, sample.chunk]
        log_q, log_w = log_weight(estep.model, estep.markers, item, sample.tokens)
        assert abs(sample.log_q - log_q) < 1e-3
        assert abs(sample.log_weight - log_w) < 1e-3
    return estep


@pytest.mark.timeout(300)
def test_on_a_cpu_both_samplers_draw_the_same(folder: Path, tmp_path: Path) -> None:
    """The same random numbers pick the same tokens, but where rounding moves a border; log q and
    log w of draws by vLLM are those of a plain loop."""
    both = ("transformers", "vllm")
    stages = {sampler: stage(tmp_path / sampler, folder, sampler=sampler) for sampler in both}
    by: dict[str, list[Sample]] = {}
    for sampler, made in stages.items():
        measured = run(made)
        assert measured["samples"] == DRAWS * measured["chunks"]
        by[sampler] = list(read(made.folder / "out", Sample))
    assert 0.1 < np.mean([s.finish == "stop" for s in by["vllm"]]) < 0.9
    same = [
        (one.tokens, one.finish) == (other.tokens, other.finish)
        for one, other in zip(*by.values(), strict=True)
    ]
    assert np.mean(same) > 0.98
    check_weights(by["vllm"], stages["vllm"], folder)


SHARED = """
import json, sys
from pathlib import Path
from boltlm.params import load
from boltlm.sampling.shards import make_estep
from boltlm.sampling.vllm_sampler import CPU_BLOCK
sampler = make_estep(load(Path(sys.argv[1])), Path(sys.argv[2]), purpose="em1").sampler
seen, generate = [], sampler.model.generate
def spy(*args, **more):
    outputs = generate(*args, **more)
    seen.extend(one.num_cached_tokens for one in outputs)
    return outputs
sampler.model.generate = spy
lengths = [20, CPU_BLOCK, CPU_BLOCK + 1, 2 * CPU_BLOCK + 9]
prompts = [[10 + (i + i * i * length) % 200 for i in range(length)] for length in lengths]
sampler.sample(prompts, [("tests", length) for length in lengths], 4)
print(json.dumps({"block": CPU_BLOCK, "lengths": lengths, "cached": seen}))
"""


@pytest.mark.timeout(300)
def test_draws_of_a_prompt_share_its_blocks(folder: Path, tmp_path: Path) -> None:
    """Every whole block of a prompt, but its last token, is worked on once for all its draws."""
    made = stage(tmp_path, folder, sampler="vllm")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(made.params))
    env = {**os.environ, **VLLM, "PYTHONPATH": str(tiny.ROOT / "src")}
    command = [sys.executable, "-c", SHARED, str(tmp_path / "params.yaml"), str(folder)]
    done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    block, cached = found["block"], np.reshape(found["cached"], (-1, 4))
    for length, of_draws in zip(found["lengths"], cached, strict=True):
        assert of_draws[0] == 0
        assert (of_draws[1:] == (length - 1) // block * block).all(), (length, of_draws)


SEEDED = """
import sys
from pathlib import Path
from boltlm.params import load
from boltlm.records import Chunk, Sample, read, write_shard
from boltlm.sampling.estep import EStep, Item, items
from boltlm.sampling.shards import context_room, make_estep
params, model, chunks, out = (Path(name) for name in sys.argv[1:])
params = load(params)
estep = make_estep(params, model, purpose="em1")
estep.sampler.seeds = True
room = context_room(estep.coder, params)
found = items(list(read(chunks, Chunk)), params["context_chunks"], room)
groups = estep.run(found, params["k_samples"])
write_shard(out / "00000.parquet", Sample, [sample for group in groups for sample in group])
"""


@pytest.mark.timeout(300)
def test_seeded_requests_draw_from_the_models_law(folder: Path, tmp_path: Path) -> None:
    """What a GPU does, done here on the CPU: χ² of first tokens against the softmax in float64;
    and `rescore_q` gives the log q and log w of a plain loop."""
    made = stage(tmp_path, folder, sampler="vllm", rescore_q=True)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(made.params))
    chunks, out = tmp_path / "chunks" / "em", tmp_path / "seeded"
    env = {**os.environ, **VLLM, "PYTHONPATH": str(tiny.ROOT / "src")}
    command = [sys.executable, "-c", SEEDED, str(tmp_path / "params.yaml"), str(folder)]
    subprocess.run([*command, str(chunks), str(out)], check=True, env=env)
    samples = list(read(out, Sample))
    estep = check_weights(samples, made, folder)
    m, slow = estep.markers, exact.double(estep.model)
    for (doc_id, chunk), item in places(made, estep).items():
        drawn = [s for s in samples if (s.doc_id, s.chunk) == (doc_id, chunk)]
        assert len(drawn) == DRAWS
        probs_V = exact.next_probs(slow, layouts.posterior_prefix(m, item.context, item.text))
        likely = np.argsort(probs_V)[::-1][:6].tolist()
        ends = {"stop": m.eol, "eos": m.eos}
        firsts = [s.tokens[0] if s.tokens else ends.get(s.finish, -1) for s in drawn]
        seen = [firsts.count(token) for token in likely]
        wanted = [float(probs_V[token]) * DRAWS for token in likely]
        p = exact.chi2([*seen, DRAWS - sum(seen)], [*wanted, DRAWS - sum(wanted)])
        assert p > 1e-4

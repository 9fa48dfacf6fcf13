"""vLLM really draws: the law of the transformers sampler, and log q that the scorer confirms."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm.model import checkpoint
from boltlm.records import Chunk, Sample, read
from boltlm.sampling.estep import items
from boltlm.sampling.precision import log_weight
from boltlm.sampling.shards import context_room, make_estep
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


@pytest.mark.timeout(300)
def test_both_samplers_draw_from_the_same_law(folder: Path, tmp_path: Path) -> None:
    """χ² of the first token of a latent, and of how draws end, between the two samplers; and log q
    and log w of draws by vLLM are those of a plain loop within 10⁻³."""
    both = ("transformers", "vllm")
    stages = {sampler: stage(tmp_path / sampler, folder, sampler=sampler) for sampler in both}
    by: dict[str, list[Sample]] = {}
    for sampler, made in stages.items():
        measured = run(made)
        assert measured["samples"] == DRAWS * measured["chunks"]
        by[sampler] = list(read(made.folder / "out", Sample))
    same = [one.tokens == other.tokens for one, other in zip(*by.values(), strict=True)]
    assert np.mean(same) > 0.98, "vLLM did not draw with the numbers that it was given"
    made = stages["vllm"]
    chunks = {(s.doc_id, s.chunk) for s in by["vllm"]}
    assert 0.1 < np.mean([s.finish == "stop" for s in by["vllm"]]) < 0.9
    for chunk in chunks:
        ends = [
            np.array([s.finish for s in found if (s.doc_id, s.chunk) == chunk])
            for found in (by["vllm"], by["transformers"])
        ]
        kinds = sorted(set(np.concatenate(ends)))
        table = np.array([[(end == kind).sum() for kind in kinds] for end in ends])
        assert exact.same_law(table) > 1e-4
        bins = np.zeros((2, 8), dtype=int)
        for row, found in enumerate((by["vllm"], by["transformers"])):
            for sample in found:
                if (sample.doc_id, sample.chunk) == chunk:
                    bins[row, (sample.tokens[0] + 1) % 8 if sample.tokens else 0] += 1
        assert (bins.sum(0) > 0).sum() > 2, "too few first tokens to tell laws apart"
        assert exact.same_law(bins) > 1e-4
    by_transformers = made.params["sampling"] | {"sampler": "transformers"}
    estep = make_estep(made.params | {"sampling": by_transformers}, folder, purpose="em1")
    context, room = made.params["context_chunks"], context_room(estep.coder, made.params)
    found = items(list(read(made.folder / "chunks" / "em", Chunk)), context, room)
    of_chunk = {(item.doc_id, item.chunk): item for item in found}
    done = [sample for sample in by["vllm"] if sample.finish == "stop"][::7]
    assert len(done) > 20
    for sample in done:
        item = of_chunk[sample.doc_id, sample.chunk]
        log_q, log_w = log_weight(estep.model, estep.markers, item, sample.tokens)
        assert abs(sample.log_q - log_q) < 1e-3
        assert abs(sample.log_weight - log_w) < 1e-3

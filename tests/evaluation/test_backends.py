"""lm-eval's `hf` and `vllm` as they are used here: the same greedy answers, the right prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm.corpus import generated
from boltlm.evaluation import backends
from boltlm.model import checkpoint
from boltlm.model.resume import Checkpoints
from boltlm.model.training import train
from boltlm.sequences.examples import Example, Examples
from boltlm.tokens import EOL, MARKERS, PRIOR, SOL, TextCoder
from tests import exact, tiny

MOST = 70  # tokens of an answer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A model that has learnt pages with thoughts for some seconds; of a size that vLLM takes."""
    folder = tmp_path_factory.mktemp("trained")
    coder = TextCoder(base_folder)
    config = LlamaConfig.from_pretrained(base_folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    m, pages = coder.markers, generated.questions(tiny.pages(), seed=1)
    found: list[Example] = []
    for page, _ in zip(pages, range(200), strict=False):
        thought = [*coder.encode(page.latent or ""), m.eol]
        answer = coder.encode(f" It stops at {page.answer}.")
        asked = [m.bos, *coder.encode(page.prompt), m.sol, m.prior]
        found.append(Example(asked[:1], [*asked[1:], *thought, *answer, m.eos]))
    config = tiny.train_config(learning_rate=0.01, batch_rows=20)
    kept = Checkpoints(folder / "work", 1000, "tests")
    rows = Examples(found, 6, 1)
    train(model, rows, config, seed=1, csv_path=None, what="tests", kept=kept)  # pyright: ignore
    checkpoint.save(model, folder, base_folder, {})
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    pages = generated.questions(tiny.pages(), seed=2)
    asked = [page.prompt for page, _ in zip(pages, range(20), strict=False)]
    return [*(f"{text}{SOL}{PRIOR}" for text in asked), *asked[:5]]


def ask(model: Any, prompts: list[str], **settings: Any) -> list[str]:
    chosen = {"until": [SOL], "do_sample": False, "max_gen_toks": MOST, **settings}
    requests = [Instance("generate_until", {}, (text, chosen), i) for i, text in enumerate(prompts)]
    return model.generate_until(requests, disable_tqdm=True)


def greedy(folder: Path, prompt: str, forbidden: tuple[int, ...]) -> tuple[str, float]:
    """Most likely tokens by float64 until EOS, SoL or the limit, and by how little the closest of
    the choices was made, nats."""
    slow, coder = exact.double(checkpoint.load(folder)), TextCoder(folder)
    m, ids, least = coder.markers, [], 9.0
    named = dict(zip(MARKERS, (m.sol, m.eol, m.prior, m.post), strict=True))
    text, marks = prompt.removesuffix(SOL + PRIOR), prompt.endswith(SOL + PRIOR)
    before = [m.bos, *coder.encode(text), *([named[SOL], named[PRIOR]] if marks else [])]
    while len(ids) < MOST:
        probs = exact.next_probs(slow, [*before, *ids])
        probs[list(forbidden)] = 0.0
        second, best = np.argsort(probs)[-2:]
        least = min(least, float(np.log(probs[best] / probs[second])))
        if best in (m.eos, m.sol):
            break
        ids.append(int(best))
    return coder.decode(ids), least


def test_hf_answers_greedily_behind_the_right_prompt(trained: Path, prompts: list[str]) -> None:
    """BOS, the text, the marks by their ids; special tokens told in the answer; a batch, padded on
    the left, answers as each prompt alone in float64. A tie would be the one excuse."""
    model = backends.load("hf", trained, "float32", 7, 0.4)
    found = ask(model, prompts)
    for prompt, answer in zip(prompts, found, strict=True):
        wanted, least = greedy(trained, prompt, ())
        assert answer == wanted or least < 1e-4
    assert sum(EOL in answer for answer in found) > 10, "the model must have learnt something"


def test_forbidden_tokens_are_never_drawn(trained: Path, prompts: list[str]) -> None:
    """In raw space a model that would rather open or close a latent must go on in plain text."""
    model = backends.load("hf", trained, "float32", 7, 0.4)
    m = TextCoder(trained).markers
    model.forbidden = (m.sol, m.eol, m.prior, m.post)
    found = ask(model, prompts)
    assert not any(mark in answer for answer in found for mark in MARKERS)
    for prompt, answer in zip(prompts[:3], found, strict=False):
        wanted, least = greedy(trained, prompt, model.forbidden)
        assert answer == wanted or least < 1e-4


@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_vllm_answers_as_hf(trained: Path, prompts: list[str]) -> None:
    """The same greedy completions, with and without forbidden tokens, at the same stop strings; a
    difference must be a tie of log-probabilities."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        ours = backends.load("hf", trained, "float32", 7, 0.4)
        theirs = backends.load("vllm", trained, "float32", 100, 0.4)
        m = TextCoder(trained).markers
        for forbidden in ((), (m.sol, m.eol, m.prior, m.post)):
            ours.forbidden = theirs.forbidden = forbidden
            for settings in ({}, {"until": [SOL, "up", "by 2"]}):
                answers = (ask(model, prompts, **settings) for model in (ours, theirs))
                pairs = zip(prompts, *answers, strict=True)
                for prompt, one, other in pairs:
                    assert one == other or greedy(trained, prompt, forbidden)[1] < 1e-4
        drawn = [
            ask(theirs, prompts[:1] * 30, do_sample=True, temperature=2.0, top_k=0, top_p=1.0)
            for _ in range(2)
        ]
        assert len(set(drawn[0])) > 15, "every sample has random numbers of its own"
        assert drawn[0] != drawn[1], "later calls go on with others"

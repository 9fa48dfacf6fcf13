"""The back ends `hf` and `vllm`: prompts, greedy answers equal to a float64 reference, seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm import checkpoint
from boltlm.corpus import generated
from boltlm.evaluation import backends
from boltlm.sequences.sft import SFTDataset, SFTExample
from boltlm.tokens import EOL, PRIOR, SOL, SPECIAL_TOKENS, SpecialTokens, TextCoder
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.trainer import train_model
from tests import reference, tiny

MAX_NEW_TOKENS = 70
TIE_NATS = 1e-4  # choices between tokens whose log-probabilities are closer may differ


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A model trained for some seconds on pages with thoughts, of a size that vLLM supports."""
    folder = tmp_path_factory.mktemp("trained")
    coder = TextCoder(base_folder)
    model_config = LlamaConfig.from_pretrained(base_folder)
    model_config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    torch.manual_seed(3)
    model = LlamaForCausalLM(model_config)
    special, pages = coder.special_tokens, generated.generate_questions(tiny.pages(), seed=1)
    examples: list[SFTExample] = []
    for page, _ in zip(pages, range(200), strict=False):
        thought = [*coder.encode(page.latent or ""), special.eol]
        answer = coder.encode(f" It stops at {page.answer}.")
        question = [*coder.encode(page.prompt), special.sol, special.prior]
        examples.append(SFTExample([special.bos], [*question, *thought, *answer, special.eos]))
    train_model(
        model,
        SFTDataset(examples, 6, 1),
        tiny.train_config(learning_rate=0.01, batch_size=20),
        seed=1,
        csv_path=None,
        what="tests",
        checkpoints=CheckpointManager(folder / "work", 1000, "tests"),
    )
    checkpoint.save_model(model, folder, base_folder, {})
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Twenty prompts in latent space and five in raw space."""
    pages = generated.generate_questions(tiny.pages(), seed=2)
    questions = [page.prompt for page, _ in zip(pages, range(20), strict=False)]
    return [*(f"{question}{SOL}{PRIOR}" for question in questions), *questions[:5]]


def generate(model: Any, prompts: list[str], **changes: Any) -> list[str]:
    settings = {"until": [SOL], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS, **changes}
    requests = [
        Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(prompts)
    ]
    return model.generate_until(requests, disable_tqdm=True)


def latent_tokens(special: SpecialTokens) -> tuple[int, ...]:
    return (special.sol, special.eol, special.prior, special.post)


def greedy(folder: Path, prompt: str, forbidden: tuple[int, ...]) -> tuple[str, float]:
    """The most likely tokens in float64 until EOS, SoL or the length limit, and the smallest margin
    by which one of them was chosen, in nats."""
    model64, coder = reference.double(checkpoint.load_model(folder)), TextCoder(folder)
    special = coder.special_tokens
    new_tokens: list[int] = []
    min_margin = np.inf
    text = prompt.removesuffix(SOL + PRIOR)
    ids = [special.bos, *coder.encode(text)]
    if prompt.endswith(SOL + PRIOR):
        ids += [special.sol, special.prior]
    while len(new_tokens) < MAX_NEW_TOKENS:
        probs_V = reference.next_probs(model64, [*ids, *new_tokens])
        probs_V[list(forbidden)] = 0.0
        second, best = np.argsort(probs_V)[-2:]
        min_margin = min(min_margin, float(np.log(probs_V[best] / probs_V[second])))
        if best in (special.eos, special.sol):
            break
        new_tokens.append(int(best))
    return coder.decode(new_tokens), min_margin


def test_hf_answers_greedily(trained: Path, prompts: list[str]) -> None:
    """The prompt is BOS, the text, and the ids of its special tokens; special tokens are spelled
    out in the answer. In a batch, padded on the left, each prompt has the answer that it has alone
    in float64, up to ties."""
    model = backends.load_lm("hf", trained, "float32", 7, 0.4)
    answers = generate(model, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, margin = greedy(trained, prompt, ())
        assert answer == expected or margin < TIE_NATS
    assert sum(EOL in answer for answer in answers) > 10, "the model has not learnt anything"


def test_forbidden_tokens_are_never_drawn(trained: Path, prompts: list[str]) -> None:
    """In raw space, a model that would begin or end a latent continues with text."""
    model = backends.load_lm("hf", trained, "float32", 7, 0.4)
    model.forbidden = latent_tokens(TextCoder(trained).special_tokens)
    answers = generate(model, prompts)
    assert not any(token in answer for answer in answers for token in SPECIAL_TOKENS)
    for prompt, answer in zip(prompts[:3], answers, strict=False):
        expected, margin = greedy(trained, prompt, model.forbidden)
        assert answer == expected or margin < TIE_NATS


@pytest.mark.filterwarnings("ignore")  # vLLM's own
def test_vllm_answers_as_hf(trained: Path, prompts: list[str]) -> None:
    """The same greedy answers up to ties, with and without forbidden tokens and further stop
    strings; and every sampled answer has random numbers of its own."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        hf = backends.load_lm("hf", trained, "float32", 7, 0.4)
        vllm = backends.load_lm("vllm", trained, "float32", 100, 0.4)
        for forbidden in ((), latent_tokens(TextCoder(trained).special_tokens)):
            hf.forbidden = vllm.forbidden = forbidden
            for changes in ({}, {"until": [SOL, "up", "by 2"]}):
                hf_answers, vllm_answers = (
                    generate(model, prompts, **changes) for model in (hf, vllm)
                )
                for prompt, ours, theirs in zip(prompts, hf_answers, vllm_answers, strict=True):
                    assert ours == theirs or greedy(trained, prompt, forbidden)[1] < TIE_NATS
        sampled = [
            generate(vllm, prompts[:1] * 30, do_sample=True, temperature=2.0, top_k=0, top_p=1.0)
            for _ in range(2)
        ]
        assert len(set(sampled[0])) > 15, "the samples of a call share random numbers"
        assert sampled[0] != sampled[1], "two calls share random numbers"

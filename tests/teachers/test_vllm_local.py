"""vLLM as a teacher: as a server, used with kind openai, and inside the stage, as kind vllm."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm.corpus import generated
from boltlm.records import TeacherLatent, read_table
from boltlm.teachers.prompts import Message, PromptTemplate, latent_words
from boltlm.training.tokenizer import BOS_TEXT, EOS_TEXT, train_tokenizer
from tests import tiny
from tests.teachers.stage_harness import POLL_SECONDS, TeacherStage

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

CONTEXT_LENGTH = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Thoughts:{% endif %}"
)
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
TRAINING_STEPS, BATCH_SIZE = 100, 8


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _rendered(messages: Sequence[Message]) -> str:
    return "".join(f"{message['content']}\n\n" for message in messages)


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a chat template, trained to respond with a derivation and to end it."""
    folder = tmp_path_factory.mktemp("teacher")
    pages = list(itertools.islice(generated.generate_documents(tiny.pages(), seed=3), 200))
    prompt = PromptTemplate.read(tiny.TEMPLATES, "latent")
    dialogues: list[tuple[str, str]] = []
    for page in pages:
        if page.thoughts:
            words = str(latent_words(page.text))
            messages = prompt.messages(context="", chunk=page.text, words=words)
            dialogues.append((f"{_rendered(messages)}Thoughts:", str(page.thoughts[-1])))
    tokenizer = train_tokenizer(map("".join, dialogues), 900)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.get_vocab()[BOS_TEXT],
        eos_token_id=tokenizer.get_vocab()[EOS_TEXT],
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [[tokenizer(text)["input_ids"] for text in dialogue] for dialogue in dialogues]
    ids = [[*request, *response, tokenizer.eos_token_id] for request, response in rows]
    # The loss is that of the responses: the prompts are much longer.
    targets = [[*[-100] * len(rows[i][0]), *ids[i][len(rows[i][0]) :]] for i in range(len(ids))]
    for step in range(TRAINING_STEPS):
        batch = [i % len(ids) for i in range(BATCH_SIZE * step, BATCH_SIZE * (step + 1))]
        inputs = _padded([ids[i] for i in batch], 0)
        labels = _padded([targets[i] for i in batch], -100)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm_server(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server that `vllm serve` starts, on the loopback address. The command
    itself requires a package named vllm, and the CPU build has another name."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    flags = {
        "model": teacher_model,
        "host": "127.0.0.1",
        "port": port,
        "max-model-len": CONTEXT_LENGTH,
        "served-model-name": "tiny",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            env={**os.environ, **VLLM_ENVIRONMENT},
            start_new_session=True,
        )
    try:
        while not _is_healthy(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(POLL_SECONDS)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _is_healthy(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
    except OSError:
        return False
    return True


@pytest.mark.timeout(1200)
def test_server_and_local_engine_give_the_same_responses(
    make_stage: Callable[..., TeacherStage], teacher_model: Path, vllm_server: str
) -> None:
    """The same prompts, chat template and greedy decoding give the same text for every chunk. A
    server of one's own needs no API key."""
    common = {
        "temperature": 0.0,
        "max_output_tokens": 48,
        "max_failed_fraction": 1.0,
        "max_attempts": 1,
    }
    remote = make_stage("remote")
    server = {"base_url": vllm_server, "api_key_env": None, "model": "tiny"}
    remote.configure("openai", None, **server, **common)
    exit_code, printed = remote.run(OPENAI_API_KEY=None)
    assert exit_code == 0, printed
    remote_rows = list(read_table(remote.paths["out"], TeacherLatent))
    local = make_stage("local").configure("vllm", None, model=str(teacher_model), **common)
    exit_code, printed = local.run(**VLLM_ENVIRONMENT)
    assert exit_code == 0, printed
    local_rows = list(read_table(local.paths["out"], TeacherLatent))
    assert local_rows == remote_rows
    latents = [row.latent for row in local_rows if row.latent is not None]
    assert len(latents) > len(local_rows) / 2, local_rows
    assert all("first" in latent for latent in latents), latents
    assert local.metrics()["cost_usd"] == 0.0
    assert local.metrics()["input_tokens"] == remote.metrics()["input_tokens"]


@pytest.mark.timeout(1200)
def test_prompts_that_do_not_fit_are_rejected(
    make_stage: Callable[..., TeacherStage], teacher_model: Path
) -> None:
    """The message names the length of a prompt and the context length."""
    stage = make_stage(documents=2)
    stage.configure("vllm", None, model=str(teacher_model), context_length=128)
    exit_code, printed = stage.run(**VLLM_ENVIRONMENT)
    assert exit_code == 1
    assert "do not fit into context_length 128" in printed
    assert "Traceback" not in printed


@pytest.mark.timeout(1200)
def test_a_model_without_a_chat_template_is_an_error(
    make_stage: Callable[..., TeacherStage], teacher_model: Path, tmp_path: Path
) -> None:
    """It is one line, before any request."""
    model = tmp_path / "model"
    shutil.copytree(teacher_model, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    stage = make_stage().configure("vllm", None, model=str(model))
    exit_code, printed = stage.run(**VLLM_ENVIRONMENT)
    assert exit_code == 1
    assert "has no chat template" in printed
    assert "Traceback" not in printed


def test_a_model_given_by_a_path_is_identified_by_its_files(
    make_stage: Callable[..., TeacherStage], teacher_model: Path, tmp_path: Path
) -> None:
    """If its folder is moved, the keys stay the same; if a file changes, they change."""
    stage = make_stage()

    def keys(model: Path) -> list[str]:
        requests = stage.configure("vllm", None, model=str(model)).requests()
        return [request.key for request in requests]

    moved = tmp_path / "moved"
    shutil.copytree(teacher_model, moved)
    assert keys(moved) == keys(teacher_model)
    (moved / "config.json").write_text("{}")
    assert keys(moved) != keys(teacher_model)

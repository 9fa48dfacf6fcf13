"""A real server and a real engine: vLLM serving behind kind openai, and in process as kind vllm."""

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
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from boltlm.corpus import generated
from boltlm.latents.tasks import Message, Prompt
from boltlm.model import base
from boltlm.records import TeacherLatent, read
from tests import tiny
from tests.latents.house import House

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

WINDOW = 2048
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Thoughts:{% endif %}"
)
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
STEPS, ROWS, START_SECONDS = 100, 8, 240.0


def _rendered(messages: Sequence[Message]) -> str:
    return "".join(f"{message['content']}\n\n" for message in messages)


@pytest.fixture(scope="module")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a chat template that has learnt to answer with a derivation, and stop."""
    folder = tmp_path_factory.mktemp("teacher")
    pages = list(itertools.islice(generated.documents(tiny.pages(), seed=3), 200))
    prompt = Prompt.read("latent")
    dialogues = [
        f"{_rendered(prompt.messages(context='', chunk=page.text))}Thoughts:{page.thoughts[0]}"
        for page in pages
        if page.thoughts
    ]
    tokenizer = base.train_tokenizer(iter(dialogues), 900)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.get_vocab()[base.BOS],
        eos_token_id=tokenizer.get_vocab()[base.EOS],
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in dialogues]
    for step in range(STEPS):
        batch = [torch.tensor(ids[i % len(ids)]) for i in range(ROWS * step, ROWS * step + ROWS)]
        inputs = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serving(teacher_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `vllm serve` runs, on the loopback address. The command itself looks for a package
    named vllm, which the CPU build is not."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += [
        "--model",
        str(teacher_model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
    ]
    command += ["--max-model-len", str(WINDOW), "--served-model-name", "tiny"]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **VLLM}, start_new_session=True
        )
    until = time.monotonic() + START_SECONDS
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.timeout(600)
def test_the_server_and_the_engine_in_process_say_the_same(
    base_folder: Path, teacher_model: Path, serving: str, tmp_path: Path
) -> None:
    """Same prompts, same template, greedy: the same text for every chunk, by either way, from the
    stage as its user runs it; a server of one's own needs no key."""
    common = {
        "temperature": 0.0,
        "max_output_tokens": 48,
        "max_failed_fraction": 1.0,
        "attempts": 1,
    }
    house = House(tmp_path / "server", base_folder)
    house.teach("openai", None, base_url=serving, model="tiny", **common)
    code, said = house.run(OPENAI_API_KEY=None)
    assert code == 0, said
    over_server = list(read(house.paths["out"], TeacherLatent))
    local = House(tmp_path / "local", base_folder)
    local.teach("vllm", None, model=str(teacher_model), **common)
    code, said = local.run(**VLLM)
    assert code == 0, said
    in_process = list(read(local.paths["out"], TeacherLatent))
    assert in_process == over_server
    found = [row.latent for row in in_process if row.latent is not None]
    assert len(found) > len(in_process) / 2
    assert all(text.startswith("Dial from") for text in found)
    assert local.metrics()["cost_usd"] == 0.0
    assert local.metrics()["input_tokens"] == house.metrics()["input_tokens"]


@pytest.mark.timeout(300)
def test_a_model_without_a_chat_template_is_named(
    base_folder: Path, teacher_model: Path, tmp_path: Path
) -> None:
    """One line, before anything is asked."""
    bare = tmp_path / "bare"
    shutil.copytree(teacher_model, bare)
    for path in (bare / "chat_template.jinja", bare / "tokenizer_config.json"):
        if path.suffix == ".jinja":
            path.unlink(missing_ok=True)
    house = House(tmp_path / "house", base_folder).teach("vllm", None, model=str(bare))
    code, said = house.run(**VLLM)
    assert code == 1
    assert "has no chat template" in said
    assert "Traceback" not in said


def test_a_model_by_path_is_known_by_its_files(
    base_folder: Path, teacher_model: Path, tmp_path: Path
) -> None:
    """Moved, it is the same teacher; trained on, it is another."""
    house = House(tmp_path / "house", base_folder)
    first = [r.key for r in house.teach("vllm", None, model=str(teacher_model)).requests()]
    moved = tmp_path / "moved"
    shutil.copytree(teacher_model, moved)
    assert [r.key for r in house.teach("vllm", None, model=str(moved)).requests()] == first
    (moved / "config.json").write_text("{}")
    assert [r.key for r in house.teach("vllm", None, model=str(moved)).requests()] != first

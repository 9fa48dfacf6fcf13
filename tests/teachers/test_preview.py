"""The command `boltlm teacher preview`: prompts, responses, their length and cost."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.records import Chunk, read_table
from boltlm.teachers.preview import PreviewPaths, preview
from boltlm.tokens import TextCoder
from tests.teachers.stage_harness import PRICES, ServerProcess, TeacherStage

MakeStage = Callable[..., TeacherStage]


def show(stage: TeacherStage, *, requests: int = 3, send: int = 0, tokenizer: bool = True) -> str:
    """What the command prints for a stage's teacher, but for the lines of the stage itself."""
    paths = {name: path for name, path in stage.paths.items() if name != "out"}
    encoder = TextCoder(stage.base) if tokenizer else None
    texts = preview(
        stage.settings, encoder, PreviewPaths(**paths), num_requests=requests, num_sent=send
    )
    return "\n".join(texts)


def test_prompts_are_shown_without_a_key_a_server_or_a_cache(make_stage: MakeStage) -> None:
    """And the expected cost of the whole corpus."""
    stage = make_stage().configure("openai", None)
    printed = show(stage, requests=2)
    contents = [m["content"] for r in stage.requests() for m in r.messages]
    shown = [content for content in contents if content in printed]
    assert printed.count("[system]") == printed.count("[user]") == 2
    assert len(set(shown)) == 3, "the system message and two others"
    num_chunks = len(list(read_table(stage.paths["chunks"], Chunk)))
    assert f"for the {num_chunks} requests of the corpus" in printed
    assert not stage.paths["cache"].exists()


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
def test_sent_requests_are_not_paid_for_again(
    kind: str, make_stage: MakeStage, server: ServerProcess
) -> None:
    """The preview prints the responses, the ratio of lengths and the cost at the prices of the
    teacher's kind; the stage then uses the responses. Requests of the Batches API do not wait."""
    stage = make_stage().configure(kind, server)
    printed = show(stage, requests=0, send=4)
    assert server.num_batches() == 0
    assert sum(server.answered().values()) == 4
    digests = stage.digests()
    responses = [digests[key][:12] for key in stage.saved_keys()]
    assert all(f"rests on fact {text}" in printed for text in responses)
    assert "4 of 4 requests have a usable response" in printed
    (ratio,) = re.findall(r"; ([\d.]+) tokens for each of the text \(the paper: 2.3\)", printed)
    coder = TextCoder(stage.base)
    sent = [r for r in stage.requests() if r.key in stage.saved_keys()]
    raw = sum(len(coder.encode(r.source)) for r in {r.key: r for r in sent}.values())
    texts = [f"The passage rests on fact {text}. It follows." for text in responses]
    assert float(ratio) == pytest.approx(sum(len(coder.encode(t)) for t in texts) / raw, abs=0.01)
    response_usd = 27e-6 * (PRICES["batch_factor"] if kind == "openai_batch" else 1.0)
    assert f"measured cost: ${response_usd:.6f} a request" in printed
    show(stage, requests=0, send=4)
    assert sum(server.answered().values()) == 4
    stage.run_in_process()
    assert set(server.answered().values()) == {1}


def test_what_is_unusable_is_said(make_stage: MakeStage, server: ServerProcess) -> None:
    """With its reason; all attempts are shown and count in the cost of a request."""
    server.fail("chat", "apology", "length")
    stage = make_stage().configure("openai", server, concurrency=1)
    printed = show(stage, requests=0, send=1)
    assert "(unusable: refused; 20 output tokens)" in printed
    assert "(unusable: truncated; 20 output tokens)" in printed
    assert "(usable; 20 output tokens)" in printed
    assert "1 of 1 requests have a usable response" in printed
    assert f"${3 * 27e-6:.6f} a request" in printed
    server.fail("chat", "400")
    assert "(rejected: " in show(stage, requests=0, send=2)


def test_a_preview_stays_below_the_limit_of_all_runs(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """What the stage has spent before counts, also on requests that are not in the preview."""
    stage = make_stage().configure("openai", server)
    stage.run_in_process()
    answered = sum(server.answered().values())
    spent = answered * 27e-6
    stage.configure("openai", server, max_cost_usd=spent + 1e-6, max_attempts=4)
    stage.params["max_latent_tokens"] = 1  # every response is too long now
    with pytest.raises(UserError, match="above max_cost_usd, so nothing was sent"):
        show(stage, send=1)
    assert sum(server.answered().values()) == answered


def test_without_a_tokenizer_lengths_are_characters(
    make_stage: MakeStage, server: ServerProcess
) -> None:
    """Before `models/base` exists, or where it was not fetched."""
    stage = make_stage().configure("openai", server, task="wrap_cot", paraphrases=2)
    printed = show(stage, send=2, tokenizer=False)
    assert re.search(r"; [\d.]+ characters for each of the text$", printed, re.MULTILINE)
    assert "for the 32 requests of the corpus" in printed


def test_what_a_preview_needs(make_stage: MakeStage, tmp_path: Path) -> None:
    """Documents and chunks, with the command that makes them, and a model to ask."""
    stage = make_stage().configure("openai", None)
    shutil.move(stage.paths["chunks"], tmp_path / "moved")
    with pytest.raises(UserError, match=r"chunks/em: no .* make it with: dvc repro split"):
        show(stage)
    stage.params["teachers"]["t"] = {"kind": "dataset", "corpus": "em"}
    with pytest.raises(UserError, match=r"teachers\.t: a teacher of kind dataset asks no model"):
        show(stage)

"""`boltlm try` and `boltlm chat`, with a tiny model and a few chunks."""

from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.estep.config import EStepSettings
from boltlm.evaluation.chat import ChatModel, ChatOptions
from boltlm.params import build_settings, load
from boltlm.records import Chunk, shard_name, write_shard
from boltlm.reporting.trial import first_chunks, try_estep
from boltlm.tokens import TextCoder
from tests import tiny

TEXTS = ["Ann turns a dial from 8: first 3. ", "It stops at 1. ", "So it goes. "]


def write_chunks(folder: Path, coder: TextCoder) -> None:
    chunks = [
        Chunk(doc_id=f"d{document}", chunk=i, text=text, tokens=tuple(coder.encode(text)))
        for document in range(3)
        for i, text in enumerate(TEXTS)
    ]
    write_shard(folder / shard_name(0), Chunk, chunks)


def estep_settings() -> EStepSettings:
    params = load(tiny.ROOT / "params.yaml") | {"max_latent_tokens": 6, "k_samples": 3}
    return build_settings(EStepSettings, params, name="em1")


def test_a_trial_shows_chunks_latents_weights_and_what_the_model_knows(
    tmp_path: Path, base_folder: Path, base_coder: TextCoder
) -> None:
    """An untrained model knows less than the frequencies of the tokens, and that is said."""
    write_chunks(tmp_path, base_coder)
    chunks = first_chunks(tmp_path, 2)
    assert [chunk.doc_id for chunk in chunks] == ["d0"] * 3 + ["d1"] * 3
    trial = try_estep(
        estep_settings(), model=base_folder, chunks=chunks, shown=2, has_latents=False
    )
    assert trial.text.count("── d0, chunk") == 2
    assert trial.text.count("→") == 2
    assert "knows less of the text than its token frequencies" in " ".join(trial.text.split())
    assert "6 chunks × K = 3" in trial.text
    assert trial.forced_fraction > 0.5
    assert trial.text.count("cut at the limit") >= 2


def test_a_corpus_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the command that makes it."""
    with pytest.raises(UserError, match="dvc repro split"):
        first_chunks(tmp_path, 1)


def test_a_chat_continues_with_and_without_a_thought(base_folder: Path) -> None:
    """The same every time at temperature 0; no special token in what it says."""
    options = ChatOptions(max_thought_tokens=5, max_answer_tokens=7, temperature=0.0, seed=1)
    model = ChatModel(base_folder, options)
    found = model.continuations("Ann turns")
    assert found == model.continuations("Ann turns")
    for text in (found.plain, found.thought, found.after_thought):
        assert text
        assert "<|" not in text
    with pytest.raises(UserError, match="shorten it"):
        model.continuations("Ann turns a dial. " * 50)

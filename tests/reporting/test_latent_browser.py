"""What the latent browser shows: which documents, draws and weights, and the gain of each token."""

import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boltlm.errors import UserError
from boltlm.estep.verify_weights import exact_log_prob
from boltlm.records import Chunk, Sample
from boltlm.reporting.browse_server import browser_page, make_server
from boltlm.reporting.browser_documents import DataFolders, named_documents
from boltlm.reporting.latent_browser import browser_data
from boltlm.reporting.token_gains import score_text, token_pieces
from boltlm.sequences import layouts
from boltlm.tokens import TextCoder
from tests.reporting.latents import HOSTILE, page_settings, write_models, write_tables
from tests.tiny import byte_level, coder_folder, enumerable, sampling_config, sentencepiece_bpe


def folders(root: Path) -> DataFolders:
    return DataFolders(root / "data", root / "models")


def by_id(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {document["id"]: document for document in data["documents"]}


def test_gains_are_those_of_the_selected_latent_in_the_context_of_the_e_step(
    tmp_path: Path,
) -> None:
    """Token by token, against one forward pass of a prompt that is written out here."""
    tiny = enumerable(tmp_path)
    special = tiny.special_tokens
    chunks = [
        Chunk(doc_id="d", chunk=c, text="", tokens=tokens)
        for c, tokens in enumerate([(1, 4), (7, 1)])
    ]
    scores = score_text(
        tmp_path,
        chunks,
        {("d", 1): (4, 4)},
        context_chunks=3,
        max_latent_tokens=8,
        sampling=sampling_config(),
    )
    assert list(scores) == [("d", 1)]
    start = [special.bos, 1, 4, special.sol]
    for found_L, prefix in (
        (scores["d", 1].with_latent, [*start, special.prior, 4, 4, special.eol]),
        (scores["d", 1].without_latent, layouts.no_latent_prompt(special, (1, 4))),
    ):
        expected = [exact_log_prob(tiny.model, prefix, [7])]
        expected.append(exact_log_prob(tiny.model, [*prefix, 7], [1]))
        np.testing.assert_allclose(found_L, expected, atol=1e-4)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
@pytest.mark.parametrize("text", ["the end.", " é😀 x\n", HOSTILE, ""])
def test_the_pieces_of_a_text_are_the_characters_that_its_tokens_complete(
    tmp_path: Path, make: Any, text: str
) -> None:
    """One for each token; bytes inside a character have an empty piece before its last byte."""
    coder = TextCoder(coder_folder(make(), tmp_path))
    tokens = coder.encode(text)
    if coder.decode(tokens) != text:  # the split drops such documents
        pytest.skip("the tokenizer does not give this text back")
    pieces = token_pieces(coder, text, tokens)
    assert "".join(pieces) == text
    assert len(pieces) == max(len(tokens), 1)
    if make is byte_level and "😀" in text:
        assert pieces[pieces.index("😀") - 3 : pieces.index("😀")] == ["", "", ""]


def test_documents_have_their_draws_weights_and_facts(tmp_path: Path) -> None:
    write_tables(tmp_path)
    write_models(tmp_path)
    data = browser_data(page_settings(), folders(tmp_path))
    entries = {entry["name"]: entry for entry in data["entries"]}
    assert list(entries) == ["by_m0", "by_m1"], "`fixed` was never drawn"
    assert [entries[name]["iteration"] for name in entries] == [1, 2]
    assert any("latents/fixed is not on this machine" in note for note in data["notes"])
    documents = by_id(data)
    assert len(documents) == 6
    draws = documents["d0"]["chunks"][1]["latents"]["by_m1"]
    weights = np.exp([-3.0, -1.0, -2.0]) / np.exp([-3.0, -1.0, -2.0]).sum()
    assert [sample["weight"] for sample in draws["samples"]] == pytest.approx(weights, abs=1e-3)
    assert [sample["selected"] for sample in draws["samples"]] == [False, True, False]
    assert draws["ess"] == pytest.approx(1 / (weights**2).sum(), abs=1e-3)
    assert documents["d0"]["ess"] == pytest.approx(draws["ess"] / 3, abs=1e-3)
    assert draws["gain"] == pytest.approx(sum(draws["token_gains"]), abs=0.02)
    assert len(draws["token_gains"]) == len(documents["d0"]["chunks"][1]["pieces"]) == 2
    gains = [chunk["latents"]["by_m1"]["gain"] for chunk in documents["d0"]["chunks"]]
    assert documents["d0"]["gain"] == pytest.approx(sum(gains), abs=1e-3)
    assert documents["d0"]["gain_of"] == "by_m1"
    assert {name: document["invalid"] for name, document in documents.items()} == {
        name: 4 if name == "d1" else 0 for name in documents
    }
    changes = {name: document["change"] for name, document in documents.items()}
    assert changes.pop("d2") == pytest.approx(1 - 2 * 2 / 5, abs=1e-3), "2 of 2 and of 3 words"
    assert set(changes.values()) == {0.0}


def test_the_sample_depends_on_the_seed_and_takes_from_every_shard(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shown = [
        tuple(
            by_id(
                browser_data(page_settings(documents=count, token_gains=False), folders(tmp_path))
            )
        )
        for count in (3, 3, 0)
    ]
    assert shown[0] == shown[1]
    assert shown[2] == ()
    assert len(shown[0]) == 3
    assert {int(name[1:]) % 2 for name in shown[0]} == {0, 1}


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """Without models there are latents, but no gains; larger documents than allowed are counted."""
    write_tables(tmp_path, ("a" * 300_000, "b"))
    data = browser_data(page_settings(max_megabytes=7), folders(tmp_path))
    assert all("is not on this machine" in entry["gain_note"] for entry in data["entries"])
    documents = by_id(data)
    assert 0 < len(documents) < 6
    assert any(f"{6 - len(documents)} sampled documents are left out" in n for n in data["notes"])
    assert "gain" not in data["documents"][0]["chunks"][0]["latents"]["by_m0"]
    assert data["documents"][0]["gain"] is None


def test_an_unknown_document_is_an_error_with_an_example(tmp_path: Path) -> None:
    write_tables(tmp_path)
    chunks = tmp_path / "data/chunks/em"
    assert named_documents(chunks, ["d1", "d2"]) == {
        "00000.parquet": ["d2"],
        "00001.parquet": ["d1"],
    }
    with pytest.raises(UserError, match=r"no document 'd9' in it.*such as 'd0'"):
        named_documents(chunks, ["d1", "d9"])


def test_latents_that_are_no_entry_are_an_error(tmp_path: Path) -> None:
    write_tables(tmp_path)
    with pytest.raises(UserError, match=r"no latents of this experiment; give one of .*by_m0"):
        browser_page(page_settings(), tmp_path / "data/latents/em7", tmp_path / "models", [])


def test_a_table_with_other_columns_is_an_error(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_tables(tmp_path)
    path = tmp_path / "data/latents/by_m0/00000.parquet"
    columns = [field.name for field in Sample.schema if field.name != "log_allowed"]
    pq.write_table(pq.read_table(path, columns=columns), path)
    with pytest.raises(UserError, match="column 'log_allowed'"):
        browser_data(page_settings(token_gains=False), folders(tmp_path))


def test_the_server_answers_this_machine_only(tmp_path: Path) -> None:
    """The sample, one document, an unknown document, another path, and a foreign host name."""
    write_tables(tmp_path)
    settings = page_settings(token_gains=False)
    latents = tmp_path / "data/latents/by_m1"
    page = partial(browser_page, settings, latents, tmp_path / "models")
    with make_server(page, 0) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert '"id":"d5"' in fetch(port, "/")[1]
            status, body = fetch(port, "/?doc=d4")
            assert (status, '"id":"d4"' in body, '"id":"d5"' in body) == (200, True, False)
            status, body = fetch(port, "/?doc=%3Cb%3E")
            assert (status, body.startswith("error: "), "'<b>'" in body) == (404, True, True)
            assert fetch(port, "/../params.yaml")[0] == 404
            assert fetch(port, "/", "example.org")[0] == 403
            with pytest.raises(UserError, match=f"--port {port} cannot be used"):
                make_server(page, port)
        finally:
            server.shutdown()
            thread.join()


def fetch(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()

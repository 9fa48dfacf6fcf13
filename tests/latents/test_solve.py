"""The task `solve`: thoughts between question and answer, one paraphrase row a request."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from boltlm.errors import UserError
from boltlm.evaluation.lessons import Run, examples, thoughts
from boltlm.latents.tasks import Prompt
from boltlm.records import Document, Paraphrase, read
from boltlm.tokens import TextCoder
from tests.latents.house import House, Server
from tests.latents.server import KEY


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "server").mkdir()
    started = Server(tmp_path / "server").start()
    yield started
    started.stop()


@pytest.fixture
def house(base_folder: Path, tmp_path: Path) -> House:
    return House(tmp_path / "house", base_folder, documents=6)


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_document_gets_its_thoughts(
    kind: str, count: int, house: House, server: Server
) -> None:
    """`paraphrases` requests a document, in its order, with its whole text in the one that is
    sent; each row holds the answer to its own request, and a second run asks nothing."""
    one = house.teach(kind, server, task="solve", paraphrases=count)
    counts = one.write()
    documents = list(read(one.paths["split"], Document))
    wanted = [(document, number) for document in documents for number in range(count)]
    rows, requests = list(read(one.paths["out"], Paraphrase)), one.requests()
    assert [(r.doc_id, r.paraphrase) for r in rows] == [(d.doc_id, n) for d, n in wanted]
    assert {row.style for row in rows} == {"solve"}
    prompt = Prompt.read("solve")
    digests = one.digests()
    for (document, _), row, request in zip(wanted, rows, requests, strict=True):
        system, user = request.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert system["content"] == prompt.system.template
        assert f"<<<\n{document.text}\n>>>" in user["content"]
        assert row.reason is None
        assert row.text is not None
        assert digests[request.key][:12] in row.text
    assert len(digests) == len(rows), "two paraphrases of a document share a key"
    assert counts["paraphrases"] == counts["answers"] == count * len(documents)
    answered, output = server.answered(), one.output()
    assert set(answered.values()) == {count}
    assert len(answered) == len(documents)
    server.stop()
    assert one.write() == counts
    assert one.output() == output


def test_more_thoughts_leave_the_first_ones_as_they_are(house: House, server: Server) -> None:
    """Raising `paraphrases` pays for what is added, not again for what is there."""
    house.teach("openai", server, task="solve", paraphrases=1).write()
    first = [row.text for row in read(house.paths["out"], Paraphrase)]
    house.teach("openai", server, task="solve", paraphrases=2)
    counts = house.write()
    rows = list(read(house.paths["out"], Paraphrase))
    assert [row.text for row in rows if row.paraphrase == 0] == first
    assert sum(server.answered().values()) == len(rows) == counts["answers"]


def test_a_thought_that_fails_is_a_row_with_its_reason(house: House, server: Server) -> None:
    """It is counted, and keeps its place: fine-tuning leaves it out by the missing text."""
    server.fail("chat", "refused")
    one = house.teach("openai", server, task="solve", paraphrases=1, attempts=1, concurrency=1)
    with pytest.raises(UserError, match="1 of 6 have no usable answer: 1 refus"):
        one.write()
    one.params["teachers"]["t"]["max_failed_fraction"] = 0.2
    counts = one.write()
    rows = list(read(one.paths["out"], Paraphrase))
    assert [row.text is None for row in rows] == [True] + [False] * 5
    reasons = {name: number for name, number in counts.items() if name.startswith("without_")}
    assert reasons == {f"without_{rows[0].reason}": 1}


def test_thoughts_become_examples(house: House, server: Server, base_coder: TextCoder) -> None:
    """Several a document, each one an example in the table's order; one that failed, and has no
    text, is none, and neither is a document of which all have failed."""
    server.fail("chat", *["refused"] * 3)  # both of the first document, one of the second
    one = house.teach("openai", server, task="solve", paraphrases=2, attempts=1, concurrency=1)
    one.params["teachers"]["t"]["max_failed_fraction"] = 0.3
    one.write()
    documents = list(read(one.paths["split"], Document))
    known = thoughts(one.paths["out"], documents)
    assert [len(known.get(d.doc_id, ())) for d in documents] == [0, 1, 2, 2, 2, 2]
    run = Run(model="m", corpus="em", data="teacher/t", task="questions", space="raw")
    told = [
        base_coder.decode([*e.prompt[1:], *e.completion[:-1]])
        for e in examples(base_coder, documents, known, run)
    ]
    rows = [row for row in read(one.paths["out"], Paraphrase) if row.text]
    pages = {document.doc_id: document.text.rpartition(" It stops") for document in documents}
    wanted = [(*pages[row.doc_id], row.text) for row in rows]
    assert told == [f"{asked} {text}{mark}{answer}" for asked, mark, answer, text in wanted]


def test_what_cannot_be_learnt_is_said(base_coder: TextCoder) -> None:
    """A long example would else be cut or crash, and one that just fits the window must not be
    refused; a document without a question would teach to answer none."""
    run = Run(model="m", corpus="em", data="teacher/t", task="questions", space="latent")
    documents = [Document(doc_id="d", text="Al asks. It is B.", source="t")]
    assert not list(examples(base_coder, documents, {"other": ["a"]}, run))
    for task, text in (("questions", "It is B."), ("gsm8k", "How many? 7.")):
        odd = [Document(doc_id="odd", text=text, source="t")]
        asked = Run(model="m", corpus="em", data="teacher/t", task=task, space="latent")
        with pytest.raises(UserError, match=r"'odd' lacks a question, or behind it"):
            list(examples(base_coder, odd, {"odd": ["a"]}, asked))
    (one,) = examples(base_coder, documents, {"d": ["1"]}, run)
    left = base_coder.window - len(one.prompt) - len(one.completion)
    assert list(examples(base_coder, documents, {"d": ["1" * (1 + left)]}, run))
    with pytest.raises(UserError, match=r"'d' .* 129 tokens, the window 128; leave it out"):
        list(examples(base_coder, documents, {"d": ["1" * (2 + left)]}, run))


def test_the_prompt_keeps_the_answer_out_of_the_thoughts(house: House) -> None:
    """A thought that repeats the closing sentence would stand before it twice; and a `solve` that
    fell back to another task's prompt would retell the question."""
    system, _ = Prompt.read("solve").messages(document="x")
    assert "without repeating its closing sentence" in system["content"]
    keys: dict[str, set[str]] = {}
    for task in ("solve", "wrap_cot", "wrap_orig"):
        found = house.teach("openai", None, task=task, paraphrases=1).requests()
        keys[task] = {request.key for request in found}
    assert keys["solve"].isdisjoint(keys["wrap_cot"] | keys["wrap_orig"])


def test_solving_needs_a_number_of_thoughts(house: House, server: Server) -> None:
    """None would leave a table without rows, and a fine-tuning without examples."""
    with pytest.raises(UserError, match="paraphrases must be 1 or more, found 0"):
        house.teach("openai", server, task="solve", paraphrases=0).write()

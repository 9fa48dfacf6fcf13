"""The task `solve`: thoughts between a question and its answer, one row for each request."""

from collections.abc import Callable

import pytest

from boltlm.errors import UserError
from boltlm.evaluation.finetune_config import FinetuneRun
from boltlm.evaluation.sft_data import build_examples, fits_window, read_thoughts
from boltlm.evaluation.task_spec import TaskName
from boltlm.records import Document, Paraphrase, read_table
from boltlm.teachers.prompts import PromptTemplate
from boltlm.tokens import TextCoder
from tests import tiny
from tests.teachers.stage_harness import ServerProcess, TeacherStage


@pytest.fixture
def stage(make_stage: Callable[..., TeacherStage]) -> TeacherStage:
    return make_stage(documents=6)


@pytest.mark.parametrize("kind", ["openai", "openai_batch"])
@pytest.mark.parametrize("count", [1, 2])
def test_every_document_gets_its_thoughts(
    kind: str, count: int, stage: TeacherStage, server: ServerProcess
) -> None:
    """There are `paraphrases` requests for each document, in order, with its question and its
    answer in the prompt. Each row holds the response to its own request, and a second run sends
    nothing."""
    stage.configure(kind, server, task="solve", paraphrases=count)
    counts = stage.run_in_process()
    documents = list(read_table(stage.paths["split"], Document))
    expected = [(document, index) for document in documents for index in range(count)]
    rows, requests = list(read_table(stage.paths["out"], Paraphrase)), stage.requests()
    assert [(r.doc_id, r.paraphrase) for r in rows] == [(d.doc_id, i) for d, i in expected]
    assert {row.style for row in rows} == {"solve"}
    prompt = PromptTemplate.read(tiny.TEMPLATES, "solve")
    digests = stage.digests()
    for (document, _), row, request in zip(expected, rows, requests, strict=True):
        system, user = request.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert system["content"] == prompt.system.template
        question, cue, end = document.text.rpartition(" It stops")
        assert f"<<<\n{question}\n>>>" in user["content"]
        assert f"<<<\n{(cue + end).strip()}\n>>>" in user["content"]
        assert row.reason is None
        assert row.text is not None
        assert digests[request.key][:12] in row.text
    assert len(digests) == len(rows), "two paraphrases of a document share a key"
    assert counts["paraphrases"] == counts["answers"] == count * len(documents)
    answered, output = server.answered(), stage.output()
    assert set(answered.values()) == {count}
    assert len(answered) == len(documents)
    server.stop()
    assert stage.run_in_process() == counts
    assert stage.output() == output


def test_more_thoughts_leave_the_first_ones_unchanged(
    stage: TeacherStage, server: ServerProcess
) -> None:
    """Raising `paraphrases` pays only for the additional ones."""
    stage.configure("openai", server, task="solve", paraphrases=1).run_in_process()
    first = [row.text for row in read_table(stage.paths["out"], Paraphrase)]
    stage.configure("openai", server, task="solve", paraphrases=2)
    counts = stage.run_in_process()
    rows = list(read_table(stage.paths["out"], Paraphrase))
    assert [row.text for row in rows if row.paraphrase == 0] == first
    assert sum(server.answered().values()) == len(rows) == counts["answers"]


def test_a_failed_request_is_a_row_with_a_reason(
    stage: TeacherStage, server: ServerProcess
) -> None:
    """It is counted and keeps its position; fine-tuning skips rows without a text."""
    server.fail("chat", "refused")
    stage.configure("openai", server, task="solve", paraphrases=1, max_attempts=1, concurrency=1)
    with pytest.raises(UserError, match="1 of 6 have no usable response: 1 refused"):
        stage.run_in_process()
    stage.params["teachers"]["t"]["max_failed_fraction"] = 0.2
    counts = stage.run_in_process()
    rows = list(read_table(stage.paths["out"], Paraphrase))
    assert [row.text is None for row in rows] == [True] + [False] * 5
    reasons = {name: count for name, count in counts.items() if name.startswith("dropped_")}
    assert reasons == {f"dropped_{rows[0].reason}": 1}


def test_thoughts_become_fine_tuning_examples(
    stage: TeacherStage, server: ServerProcess, base_coder: TextCoder
) -> None:
    """Each row with a text is an example, in the order of the table. A failed row is none, and
    neither is a document all of whose rows have failed."""
    server.fail("chat", *["refused"] * 3)  # both of the first document, one of the second
    stage.configure("openai", server, task="solve", paraphrases=2, max_attempts=1, concurrency=1)
    stage.params["teachers"]["t"]["max_failed_fraction"] = 0.3
    stage.run_in_process()
    documents = list(read_table(stage.paths["split"], Document))
    thoughts = read_thoughts(stage.paths["out"], documents)
    assert [len(thoughts.get(d.doc_id, ())) for d in documents] == [0, 1, 2, 2, 2, 2]
    run = FinetuneRun(model="m", corpus="em", data="teacher/t", task="questions", space="raw")
    texts = [
        base_coder.decode([*example.prompt[1:], *example.completion[:-1]])
        for example in build_examples(base_coder, documents, thoughts, run)
    ]
    rows = [row for row in read_table(stage.paths["out"], Paraphrase) if row.text]
    parts = {document.doc_id: document.text.rpartition(" It stops") for document in documents}
    expected = [(*parts[row.doc_id], row.text) for row in rows]
    assert texts == [f"{question} {text}{cue}{end}" for question, cue, end, text in expected]


def test_documents_that_cannot_become_examples_are_errors(base_coder: TextCoder) -> None:
    """An example that exactly fills the context window fits, a longer one does not; a document
    without a question is an error."""
    run = FinetuneRun(model="m", corpus="em", data="teacher/t", task="questions", space="latent")
    documents = [Document(doc_id="d", text="Al asks. It is B.", source="t")]
    assert not list(build_examples(base_coder, documents, {"other": ["a"]}, run))
    texts: dict[TaskName, str] = {"questions": "It is B.", "gsm8k": "How many? 7."}
    for task, text in texts.items():
        incomplete = [Document(doc_id="incomplete", text=text, source="t")]
        task_run = FinetuneRun(model="m", corpus="em", data="teacher/t", task=task, space="latent")
        with pytest.raises(UserError, match=r"'incomplete' must consist of a question and"):
            list(build_examples(base_coder, incomplete, {"incomplete": ["a"]}, task_run))
    (example,) = build_examples(base_coder, documents, {"d": ["1"]}, run)
    num_free = base_coder.context_length - len(example.prompt) - len(example.completion)
    for num_characters, fits in ((1 + num_free, True), (2 + num_free, False)):
        (example,) = build_examples(base_coder, documents, {"d": ["1" * num_characters]}, run)
        assert fits_window(base_coder, example) == fits


def test_the_prompt_keeps_the_answer_out_of_the_thoughts(stage: TeacherStage) -> None:
    """A thought that repeats the closing sentence would double it, and the prompt of another task
    would retell the question."""
    system, _ = PromptTemplate.read(tiny.TEMPLATES, "solve").messages(question="x", answer="y")
    assert "do not repeat the sentence in which the answer is stated" in system["content"]
    keys: dict[str, set[str]] = {}
    for task in ("solve", "wrap_cot", "wrap_orig"):
        requests = stage.configure("openai", None, task=task, paraphrases=1).requests()
        keys[task] = {request.key for request in requests}
    assert keys["solve"].isdisjoint(keys["wrap_cot"] | keys["wrap_orig"])


def test_solve_needs_at_least_one_paraphrase(stage: TeacherStage, server: ServerProcess) -> None:
    """Otherwise the table would have no rows, and fine-tuning no examples."""
    with pytest.raises(UserError, match="paraphrases must be 1 or more, found 0"):
        stage.configure("openai", server, task="solve", paraphrases=0).run_in_process()

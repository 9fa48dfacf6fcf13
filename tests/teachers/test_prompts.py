"""Requests: what the prompts contain, and what their keys depend on."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boltlm.corpus.answers import ANSWER_CUES
from boltlm.corpus.sources import format_gsm8k_answer
from boltlm.errors import UserError
from boltlm.evaluation.fewshot import PROMPT_FORMS
from boltlm.fingerprint import fingerprint
from boltlm.records import Chunk, Document, read_table
from boltlm.teachers.cost import Prices
from boltlm.teachers.model_config import OpenAIChatConfig, TeacherConfig, VLLMTeacherConfig
from boltlm.teachers.prompts import (
    PARAPHRASE_STYLES,
    PromptTemplate,
    RequestBuilder,
    TeacherTask,
    latent_words,
)
from tests import tiny
from tests.teachers.stage_harness import COMMON_KEYS, PRICES, TeacherStage

MakeStage = Callable[..., TeacherStage]

# Templates of version 1, with which responses were bought.
TEMPLATES_V1 = Path(__file__).with_name("templates_v1")
# Keys of requests under which responses were saved by earlier versions. They must not change.
SAVED_KEYS: list[tuple[str, TeacherTask, list[str]]] = [
    (
        "openai",
        "latent",
        ["3979a5cb4b47ba3ea84f220d8af0c9d2", "22499869845869862c9f860148413ada"],
    ),
    (
        "openai",
        "wrap_orig",
        ["51eada4c38becef98b1e319a8f874f4d", "bee7143d3e3afe11bd2dd1f8f5e8b749"],
    ),
    (
        "openai",
        "solve",
        ["8df615ecbecf254c6a923de588478529", "475a0a461f45fa473fb680f7dd495f32"],
    ),
    (
        "vllm",
        "latent",
        ["a8ee607278ad49e5f6c924135a489adb", "3f39fa3baf6de9b8345961d93680d6db"],
    ),
    (
        "vllm",
        "wrap_orig",
        ["2ae7b7edc554243735277e7f32eaa470", "51e7bcc71cf7c42fef82d962b5e5c77c"],
    ),
    (
        "vllm",
        "solve",
        ["ba0e8f45a5215c50c888ca70d736f74d", "7b089e3cff6b02a36d0a91a0b2e576f6"],
    ),
]
# The fingerprints of the sampling facts, under which pending batches are saved.
SAVED_TEACHERS = {
    "openai": "88f8b54bfbe630481b7cc2410d132f5b",
    "vllm": "0f383d42abbd8209f77e626fa8893db6",
}


def make_config(kind: str, task: TeacherTask) -> TeacherConfig:
    common = {**COMMON_KEYS, "task": task, "paraphrases": 0 if task == "latent" else 2}
    if kind == "vllm":
        return VLLMTeacherConfig(
            kind="vllm",
            context_length=100,
            gpu_memory_utilization=0.5,
            request_batch_size=3,
            **common,
        )
    return OpenAIChatConfig(
        kind="openai",
        base_url=None,
        max_retries=4,
        timeout_seconds=1.0,
        expected_output_tokens=20,
        characters_per_token=4.0,
        max_cost_usd=1.0,
        prices=Prices(**PRICES),
        concurrency=4,
        api_key_env=None,
        top_p=None,
        sampling_seed=None,
        reasoning_effort=None,
        extra_body={},
        retry_failed=False,
        max_outage_seconds=60.0,
        **common,
    )


def write_template(folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_prompts_are_read_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    """The messages, and so the keys, are those of the templates in the folder."""
    text = "version: 3\n--- system\nBe brief: $$1.\n--- user\nExplain ${chunk}!\n"
    prompt = PromptTemplate.read(write_template(tmp_path, "latent", text), "latent")
    assert prompt.messages(context="unused", chunk="$x --- y") == (
        {"role": "system", "content": "Be brief: $1."},
        {"role": "user", "content": "Explain $x --- y!"},
    )
    keys = set[str]()
    for folder in (tmp_path, tiny.TEMPLATES):
        builder = RequestBuilder(
            task="latent",
            templates=folder,
            sampling_facts={"model": "m"},
            context_chunks=3,
            paraphrases=0,
            seed=1,
        )
        chunk = Chunk(doc_id="d", chunk=0, text="x", tokens=(1,))
        keys |= {request.key for request in builder.requests([], [chunk])}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("latent", None, "cannot be read"),
        ("latent", "Explain $chunk", "must be a line 'version: <number>'"),
        ("latent", "version: 1\n--- user\n$chunk\n--- system\nx", "must be a line 'version"),
        ("latent", "version: 1\n--- system\nx\n--- user\n$context", r"must contain \$chunk"),
        ("latent", "version: 1\n--- system\nx\n--- user\n$chunk $y", r"may contain \$context"),
        ("latent", "version: 1\n--- system\nfor 5 $\n--- user\n$chunk", r"is written \$\$"),
        ("solve", "version: 1\n--- system\nx\n--- user\n$question", r"\$answer and \$question or"),
        ("wrap_cot", "version: 1\n--- system\nx\n--- user\nx", r"must contain \$document;"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_user_error(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        write_template(tmp_path, name, text)
    with pytest.raises(UserError, match=rf"prompts\.teacher: .*{name}\.txt.*{message}"):
        PromptTemplate.read(tmp_path, name)


@pytest.mark.parametrize(("kind", "task", "keys"), SAVED_KEYS)
def test_responses_of_earlier_versions_are_found(
    kind: str, task: TeacherTask, keys: list[str]
) -> None:
    """Keys are compared with literal values: responses that were paid for are found by them, with
    the prompts with which they were bought."""
    config = make_config(kind, task)
    texts = ("One and one are two. ", "Two and two are four.")
    chunks = [Chunk(doc_id="d", chunk=i, text=text, tokens=(1,)) for i, text in enumerate(texts)]
    document = Document(doc_id="d", text="".join(texts), source="t")
    builder = RequestBuilder(
        task=task,
        templates=tiny.TEMPLATES if task == "wrap_orig" else TEMPLATES_V1,
        sampling_facts=config.sampling_facts,
        context_chunks=3,
        paraphrases=config.paraphrases,
        seed=1,
    )
    assert [request.key for request in builder.requests([document], chunks)] == keys
    assert fingerprint(config.sampling_facts) == SAVED_TEACHERS[kind]


def test_a_key_depends_on_all_that_the_response_depends_on(make_stage: MakeStage) -> None:
    """Another model, temperature, length limit or context gives another key; what cannot change
    the response does not."""
    stage = make_stage().configure("openai", None)
    keys = [request.key for request in stage.requests()]
    for changes in ({"model": "m"}, {"temperature": 0.0}, {"max_output_tokens": 3}):
        requests = stage.configure("openai", None, **changes).requests()
        assert not set(keys) & {request.key for request in requests}
    for changes in ({"concurrency": 9}, {"max_attempts": 9}, {"max_cost_usd": 9.0}, {"seed": 9}):
        requests = stage.configure("openai", None, **changes).requests()
        assert keys == [request.key for request in requests]
    stage.params["context_chunks"] = 0
    keys_without_context = [request.key for request in stage.configure("openai", None).requests()]
    pairs = zip(keys, keys_without_context, strict=True)
    assert [key == without_context for key, without_context in pairs] == [
        chunk.chunk == 0 for chunk in read_table(stage.paths["chunks"], Chunk)
    ]


def make_builder(task: TeacherTask, **changes: Any) -> RequestBuilder:
    facts = {"task": task, "templates": tiny.TEMPLATES, "sampling_facts": {"model": "m"}}
    facts |= {"context_chunks": 3, "paraphrases": 1, "seed": 1}
    return RequestBuilder(**{**facts, **changes})


@pytest.mark.parametrize("paraphrases", [3, 4, 5, 9])
def test_paraphrases_of_a_document_differ_in_style(paraphrases: int) -> None:
    """Each run of four holds all four styles, so five paraphrases do; every style is about as
    often the first one, and the fifth; more paraphrases leave the first ones as they are."""
    documents = [Document(doc_id=f"d{i}", text="x", source="t") for i in range(400)]

    def styles(count: int) -> list[list[str]]:
        requests = list(make_builder("wrap_orig", paraphrases=count).requests(documents, []))
        rows = [request.style for request in requests]
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    rows = styles(paraphrases)
    for row in rows:
        for start in range(0, paraphrases, len(PARAPHRASE_STYLES)):
            run = row[start : start + len(PARAPHRASE_STYLES)]
            assert len(set(run)) == len(run)
    assert [row[:2] for row in rows] == styles(2)
    for index in range(paraphrases):
        counts = Counter(row[index] for row in rows)
        assert all(60 < counts[style] < 140 for style in PARAPHRASE_STYLES), counts


def test_a_latent_is_asked_for_in_the_papers_length() -> None:
    """2.3 words for each word of the chunk; the example in the prompt is of that length."""
    chunk = Chunk(doc_id="d", chunk=0, text="river " * 100, tokens=(1,))
    (request,) = make_builder("latent").requests([], [chunk])
    assert "in about 230 words." in request.messages[1]["content"]
    assert [latent_words("x" * n) for n in (0, 60, 600)] == [20, 20, 230]
    system = request.messages[0]["content"]
    passage, thoughts = re.findall(r"<<<\n(.*?)\n>>>", system, re.DOTALL)
    assert 2.0 < len(thoughts.split()) / len(passage.split()) < 2.6


def test_a_question_comes_first_and_its_answer_last() -> None:
    """The answer begins where that of the benchmark does, or is the last sentence."""
    documents = [
        Document(
            doc_id="gsm8k", text=f"How many? Say it.\n{format_gsm8k_answer('1.5')}", source=""
        ),
        Document(
            doc_id="math",
            text="Find $x$.\nFinal Answer: The final answer is $2$. I hope",
            source="",
        ),
        Document(doc_id="dial", text="It starts at 8. It stops at 7.", source=""),
    ]
    answers = [
        "The answer is 1.5.",
        "Final Answer: The final answer is $2$. I hope",
        "It stops at 7.",
    ]
    questions = ["How many? Say it.", "Find $x$.", "It starts at 8."]
    requests = make_builder("solve").requests(documents, [])
    for request, question, answer in zip(requests, questions, answers, strict=True):
        text = request.messages[1]["content"]
        assert f"Question:\n<<<\n{question}\n>>>\n\nAnswer:\n<<<\n{answer}\n>>>" in text
    with pytest.raises(UserError, match="'d' must consist of a question and its answer"):
        list(make_builder("solve").requests([Document(doc_id="d", text="It is 7.", source="")], []))


def test_answers_begin_as_they_do_in_few_shot_prompts() -> None:
    """The cues that the teacher's documents are split at are those of the evaluation's tasks."""
    assert {form.answer_cue for form in PROMPT_FORMS.values()} - {""} == set(ANSWER_CUES)


def test_prompts_contain_the_chunk_and_its_context(make_stage: MakeStage) -> None:
    """No field of the template is left unfilled."""
    stage = make_stage().configure("openai", None)
    chunks = list(read_table(stage.paths["chunks"], Chunk))
    for chunk, previous, request in zip(chunks[1:], chunks, stage.requests()[1:], strict=False):
        text = json.dumps(request.messages, ensure_ascii=False)
        assert chunk.text.strip() in text
        if previous.doc_id == chunk.doc_id:
            assert previous.text.strip() in text
        assert "$" not in text

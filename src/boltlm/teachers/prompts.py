"""The requests that a teacher receives: prompt templates, filled in for chunks or documents.

The templates are text files in the folder that `prompts.teacher` of params.yaml names; this
project's own are in `templates/`. Each begins with a version number, which is part of every
request's key.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from boltlm.corpus.answers import find_answer_cue, split_answer
from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint
from boltlm.records import Chunk, Document
from boltlm.seeds import uniform

PARAPHRASE_STYLES = ("simple", "scholarly", "encyclopedia", "questions")

# latent: a latent for each chunk. The other tasks write `paraphrases` texts for each document:
# wrap_orig: a paraphrase in one of PARAPHRASE_STYLES; wrap_cot: a paraphrase that spells out the
# reasoning; solve: the thoughts between the question and the answer that the document holds.
TeacherTask = Literal["latent", "wrap_orig", "wrap_cot", "solve"]
# The style recorded for the paraphrases of a task that has a single prompt.
SINGLE_PROMPT_STYLE = {"wrap_cot": "cot", "solve": "solve"}
# The paper's latents have 2.3 tokens for each token of their chunk. A prompt asks for this ratio
# times the number of words in the chunk, counted by the length of an English word and its space.
LATENT_RATIO, CHARACTERS_PER_WORD = 2.3, 6
Message = Mapping[str, str]
# The fields that a template must contain, in one of these sets, and those that it may contain.
_REQUIRED_FIELDS = {"latent": ({"chunk"},), "solve": ({"question", "answer"}, {"document"})}
_OPTIONAL_FIELDS = {"latent": {"context", "words"}}
_TEMPLATE = re.compile(
    r"version: *(?P<version>\d+)\n--- system\n(?P<system>.*)\n--- user\n(?P<user>.*)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt's name and version, and the templates of its system and user messages."""

    name: str
    version: int
    system: Template
    user: Template

    @classmethod
    def read(cls, folder: Path, name: str) -> "PromptTemplate":
        """Read `<name>.txt` of a folder of templates. Raises UserError where it is missing, is not
        a template, or lacks a field of its task."""
        path = folder / f"{name}.txt"
        try:
            match = _TEMPLATE.fullmatch(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts.teacher: {path} cannot be read: {error}") from error
        if match is None:
            raise UserError(
                f"prompts.teacher: {path} must be a line 'version: <number>', a line '--- system',"
                " the system message, a line '--- user', and the user message"
            )
        system, user = Template(match["system"].strip()), Template(match["user"].strip())
        required = _REQUIRED_FIELDS.get(name, ({"document"},))
        optional = _OPTIONAL_FIELDS.get(name, set[str]())
        fields = {*system.get_identifiers(), *user.get_identifiers()}
        fits = any(needed <= fields <= needed | optional for needed in required)
        if not (system.is_valid() and user.is_valid() and fits):
            needed_text = " or ".join(_list_fields(needed) for needed in required)
            raise UserError(
                f"prompts.teacher: {path} must contain {needed_text}"
                + (f" and may contain {_list_fields(optional)}" if optional else "")
                + "; a dollar sign that begins no field is written $$"
            )
        return cls(name, int(match["version"]), system, user)

    def messages(self, **texts: str) -> tuple[Message, ...]:
        """The system and the user message, with `texts` substituted for the template's fields."""
        return (
            {"role": "system", "content": self.system.substitute(texts)},
            {"role": "user", "content": self.user.substitute(texts)},
        )


def latent_words(text: str) -> int:
    """The number of words at which the latent of a chunk is to aim, in tens; 20 or more."""
    return max(20, 10 * round(LATENT_RATIO * len(text) / CHARACTERS_PER_WORD / 10))


def _list_fields(fields: Iterable[str]) -> str:
    return " and ".join(f"${field}" for field in sorted(fields))


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One request to a teacher. `index`: the number of the chunk in its document, or the number of
    the paraphrase. `source`: the text that it asks about, a chunk or a document.

    `key` is a fingerprint of everything that the response depends on: the model and its sampling
    settings, the prompt's name and version, the messages, and the number of the draw, which tells
    apart requests that are otherwise equal.
    """

    key: str
    doc_id: str
    index: int
    style: str
    source: str
    messages: tuple[Message, ...]

    @property
    def num_characters(self) -> int:
        """The length of all messages in characters."""
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestBuilder:
    """Builds the requests of one teacher.

    `templates`: the folder of the prompt templates.
    `sampling_facts`: the model and its sampling settings, JSON-ready, as part of each key.
    `context_chunks`: number of chunks before a chunk that the prompt shows as its context.
    `paraphrases`: number of requests for each document, for all tasks but `latent`.
    `seed` selects the styles. It belongs to the teacher, not to the experiment, so that experiments
    with different seeds share the responses.
    """

    task: TeacherTask
    templates: Path
    sampling_facts: Mapping[str, str | int | float]
    context_chunks: int
    paraphrases: int
    seed: int

    def requests(
        self, documents: Sequence[Document], chunks: Sequence[Chunk]
    ) -> Iterator[TeacherRequest]:
        """The requests of one shard, in the order of its chunks or documents."""
        if self.task == "latent":
            return self._latent_requests(chunks)
        return self._paraphrase_requests(documents)

    def _latent_requests(self, chunks: Sequence[Chunk]) -> Iterator[TeacherRequest]:
        prompt = PromptTemplate.read(self.templates, "latent")
        for doc_id, group in itertools.groupby(chunks, lambda chunk: chunk.doc_id):
            document_chunks = list(group)
            for index, chunk in enumerate(document_chunks):
                context_start = max(0, index - self.context_chunks)
                context = "".join(c.text for c in document_chunks[context_start:index])
                words = str(latent_words(chunk.text))
                messages = prompt.messages(context=context, chunk=chunk.text, words=words)
                key = self._key(prompt, messages, draw=0)
                yield TeacherRequest(key, doc_id, chunk.chunk, "", chunk.text, messages)

    def _paraphrase_requests(self, documents: Sequence[Document]) -> Iterator[TeacherRequest]:
        prompts = self._paraphrase_prompts()
        for document in documents:
            fields = self._document_fields(document)
            for index, style in enumerate(self._draw_styles(document.doc_id, tuple(prompts))):
                messages = prompts[style].messages(**fields)
                key = self._key(prompts[style], messages, draw=index)
                yield TeacherRequest(key, document.doc_id, index, style, document.text, messages)

    def _document_fields(self, document: Document) -> dict[str, str]:
        """What the templates of the task show of a document. Raises UserError where the task is
        `solve` and the document is not a question with an answer."""
        fields = {"document": document.text}
        if self.task == "solve":
            question, answer = split_answer(document.text, find_answer_cue(document.text))
            if not (question.strip() and answer.strip()):
                raise UserError(
                    f"document '{document.doc_id}' must consist of a question and its answer"
                    " (task solve); use a corpus of questions"
                )
            fields |= {"question": question.strip(), "answer": answer.strip()}
        return fields

    def _draw_styles(self, doc_id: str, styles: tuple[str, ...]) -> Iterator[str]:
        """The styles of a document's paraphrases, drawn at random without replacement: of each run
        of len(styles) paraphrases every one has another style. More paraphrases leave the styles
        of the first ones as they are."""
        left: list[str] = []
        for index in range(self.paraphrases):
            left = left or list(styles)
            u = uniform(self.seed, "style", doc_id, index) * len(styles)
            style = styles[int(u)]
            if style not in left:  # drawn again from those that are left, with the fraction of u
                style = left[int(u % 1 * len(left))]
            left.remove(style)
            yield style

    def _paraphrase_prompts(self) -> dict[str, PromptTemplate]:
        """The task's prompts by style."""
        if self.task == "wrap_orig":
            return {
                style: PromptTemplate.read(self.templates, f"wrap_orig.{style}")
                for style in PARAPHRASE_STYLES
            }
        return {SINGLE_PROMPT_STYLE[self.task]: PromptTemplate.read(self.templates, self.task)}

    def _key(self, prompt: PromptTemplate, messages: tuple[Message, ...], *, draw: int) -> str:
        # Responses that were paid for are found by this key: its facts must never change.
        return fingerprint(
            {
                "prompt": prompt.name,
                "version": prompt.version,
                "messages": messages,
                "draw": draw,
                **self.sampling_facts,
            }
        )

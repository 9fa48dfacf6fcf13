"""The requests that a teacher receives: prompt templates, filled in for chunks or documents.

The templates are text files in the folder that `prompts.teacher` of params.yaml names; this
project's own are in `templates/`. Each begins with a version number, which is part of every
request's key.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

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
Message = Mapping[str, str]
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
        text, others = ("chunk", {"context"}) if name == "latent" else ("document", set[str]())
        fields = {*system.get_identifiers(), *user.get_identifiers()}
        if not (system.is_valid() and user.is_valid() and {text} <= fields <= {text, *others}):
            known = ", ".join(f"${field}" for field in sorted(others))
            raise UserError(
                f"prompts.teacher: {path} must contain ${text}"
                + (f" and may contain {known}" if known else "")
                + "; a dollar sign that begins no field is written $$"
            )
        return cls(name, int(match["version"]), system, user)

    def messages(self, **texts: str) -> tuple[Message, ...]:
        """The system and the user message, with `texts` substituted for the template's fields."""
        return (
            {"role": "system", "content": self.system.substitute(texts)},
            {"role": "user", "content": self.user.substitute(texts)},
        )


@dataclass(frozen=True, slots=True)
class TeacherRequest:
    """One request to a teacher. `index`: the number of the chunk in its document, or the number of
    the paraphrase.

    `key` is a fingerprint of everything that the response depends on: the model and its sampling
    settings, the prompt's name and version, the messages, and the number of the draw, which tells
    apart requests that are otherwise equal.
    """

    key: str
    doc_id: str
    index: int
    style: str
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
                messages = prompt.messages(context=context, chunk=chunk.text)
                key = self._key(prompt, messages, draw=0)
                yield TeacherRequest(key, doc_id, chunk.chunk, "", messages)

    def _paraphrase_requests(self, documents: Sequence[Document]) -> Iterator[TeacherRequest]:
        prompts = self._paraphrase_prompts()
        styles = tuple(prompts)
        for document in documents:
            for index in range(self.paraphrases):
                u = uniform(self.seed, "style", document.doc_id, index)
                style = styles[int(u * len(styles))]
                messages = prompts[style].messages(document=document.text)
                key = self._key(prompts[style], messages, draw=index)
                yield TeacherRequest(key, document.doc_id, index, style, messages)

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

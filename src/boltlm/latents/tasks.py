"""What a teacher is asked about a corpus: latents for chunks, or paraphrases of documents, or the
thoughts between the question and the answer that a document holds.

The prompts are the text files in `prompts/`; the version that stands in each is part of every
request's key.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from boltlm import engine
from boltlm.errors import UserError
from boltlm.records import Chunk, Document
from boltlm.seeds import uniform

PROMPTS = Path(__file__).parent / "prompts"
STYLES = ("simple", "scholarly", "encyclopedia", "questions")

Task = Literal["latent", "wrap_orig", "wrap_cot", "solve"]
ONE_PROMPT = {"wrap_cot": "cot", "solve": "solve"}  # its style, of tasks with a single prompt
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's name and version, and the templates of its two messages."""

    name: str
    version: int
    system: Template
    user: Template

    @classmethod
    def read(cls, name: str) -> "Prompt":
        text = (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")
        head, system, user = text.split("---")
        return cls(
            name,
            int(head.removeprefix("version:")),
            Template(system.removeprefix(" system\n").strip()),
            Template(user.removeprefix(" user\n").strip()),
        )

    def messages(self, **texts: str) -> tuple[Message, ...]:
        return (
            {"role": "system", "content": self.system.substitute(texts)},
            {"role": "user", "content": self.user.substitute(texts)},
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to ask: about chunk `number` of a document, or for its paraphrase `number`.

    `key` is made of all that the answer depends on: the model, the prompt's name and version, the
    messages, the sampling settings, and which of several equal requests this is.
    """

    key: str
    doc_id: str
    number: int
    style: str
    messages: tuple[Message, ...]

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asker:
    """Makes the requests of one teacher. `settings`: the model and how it samples, JSON-ready.
    `seed` chooses the styles; it is the teacher's own, so that a sweep over the experiment's
    seeds asks once."""

    task: Task
    settings: Mapping[str, str | int | float]
    context_chunks: int
    paraphrases: int
    seed: int

    def __post_init__(self) -> None:
        if self.task != "latent" and self.paraphrases < 1:
            raise UserError(f"paraphrases must be 1 or more, found {self.paraphrases}")

    def requests(self, documents: Sequence[Document], chunks: Sequence[Chunk]) -> Iterator[Request]:
        """The requests of one shard, in its order."""
        return self._latents(chunks) if self.task == "latent" else self._paraphrases(documents)

    def _latents(self, chunks: Sequence[Chunk]) -> Iterator[Request]:
        prompt = Prompt.read("latent")
        for doc_id, group in itertools.groupby(chunks, lambda chunk: chunk.doc_id):
            found = list(group)
            for index, chunk in enumerate(found):
                before = found[max(0, index - self.context_chunks) : index]
                context = "".join(earlier.text for earlier in before)
                messages = prompt.messages(context=context, chunk=chunk.text)
                yield self._request(prompt, doc_id, chunk.chunk, "", messages, 0)

    def _paraphrases(self, documents: Sequence[Document]) -> Iterator[Request]:
        prompts = (
            {style: Prompt.read(f"wrap_orig.{style}") for style in STYLES}
            if self.task == "wrap_orig"
            else {ONE_PROMPT[self.task]: Prompt.read(self.task)}
        )
        styles = tuple(prompts)
        for document in documents:
            for number in range(self.paraphrases):
                place = uniform(self.seed, "style", document.doc_id, number)
                style = styles[int(place * len(styles))]
                messages = prompts[style].messages(document=document.text)
                yield self._request(
                    prompts[style], document.doc_id, number, style, messages, number
                )

    def _request(
        self,
        prompt: Prompt,
        doc_id: str,
        number: int,
        style: str,
        messages: tuple[Message, ...],
        draw: int,
    ) -> Request:
        key = engine.key(
            {
                "prompt": prompt.name,
                "version": prompt.version,
                "messages": messages,
                "draw": draw,
                **self.settings,
            }
        )
        return Request(key, doc_id, number, style, messages)

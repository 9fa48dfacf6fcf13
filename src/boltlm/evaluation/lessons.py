"""Documents that end in an answer become what fine-tuning learns: question, thought, answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.evaluation import prompts
from boltlm.evaluation.downstream import Spec
from boltlm.evaluation.prompts import FORMS, Form, Space
from boltlm.latents.dataset import document_thought
from boltlm.latents.tasks import ONE_PROMPT
from boltlm.records import Document, Paraphrase, read
from boltlm.seeds import uniform
from boltlm.sequences.examples import Example
from boltlm.tokens import TextCoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Params entry `finetune.runs.<name>`. `corpus`: documents that end in an answer (their last
    sentence); `data`: the folder under data/ with the thoughts: teacher/<name> of the task `solve`,
    or split/<corpus>, whose documents carry them; `task`: asked in the end, zero-shot; `space`:
    where the thoughts stand."""

    model: str
    corpus: str
    data: str
    task: str
    space: Space

    def spec(self, name: str) -> Spec:
        """What is asked. Raises UserError for a task that there is not."""
        if self.task not in FORMS:
            known = " | ".join(FORMS)
            raise UserError(f"finetune.runs.{name}.task must be {known}, found '{self.task}'")
        return Spec(task=self.task, prompts="standard", space=self.space)


def thoughts(data: Path, documents: Sequence[Document]) -> dict[str, list[str]]:
    """The thoughts of each document, by its id: a teacher's, or its own. Raises UserError for a
    teacher of another task."""
    if data.parent.name == "split":
        found = {one.doc_id: document_thought(one) for one in documents}
        return {doc_id: [thought] for doc_id, thought in found.items() if thought}
    told: dict[str, list[str]] = {}
    for row in read(data, Paraphrase):
        if row.style != ONE_PROMPT["solve"]:
            raise UserError(
                f"{data}: holds paraphrases, no thoughts; its teacher's task is `solve`"
            )
        if row.text:
            told.setdefault(row.doc_id, []).append(row.text)
    return told


def examples(
    coder: TextCoder, documents: Sequence[Document], told: Mapping[str, Sequence[str]], entry: Run
) -> Iterator[Example]:
    """Each document with each of its thoughts; those without are left out. Raises UserError for an
    example that is longer than the window, and a document without a question or an answer."""
    m, form = coder.markers, FORMS[entry.task]
    for document in documents:
        asked, answer = _cut(document, form)
        prompt = [m.bos, *prompts.encode(coder, prompts.render(form, "", (), asked, entry.space))]
        for thought in told.get(document.doc_id, ()):
            if entry.space == "latent":
                rest = prompts.latent(thought).removeprefix(prompts.OPENING) + answer
            else:
                rest = f" {thought}{answer}"
            one = Example(prompt, [*prompts.encode(coder, rest), m.eos])
            length = len(one.prompt) + len(one.completion)
            if length > coder.window:
                raise UserError(
                    f"document '{document.doc_id}' and its thought take {length} tokens, the window"
                    f" {coder.window}; leave it out of the corpus"
                )
            yield one


def _cut(document: Document, form: Form) -> tuple[str, str]:
    """A document's question and its answer: from the task's words for it on, or else the last
    sentence."""
    if form.answer:
        asked, mark, answer = document.text.rpartition(form.answer)
        asked, answer = asked.strip(), f" {mark}{answer.rstrip()}" if mark else ""
    else:
        *question, answer = sentences(document.text)
        asked = "".join(question)
    if not (asked and answer):
        said = f"'{form.answer}'" if form.answer else "a sentence of its own with the answer"
        raise UserError(
            f"document '{document.doc_id}' lacks a question, or behind it {said}; see"
            " finetune.runs.<name>.corpus"
        )
    return asked, answer


def divided(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """What is trained on, and what is held out, whatever the other documents are."""
    out = [uniform(seed, "finetune, held out", one.doc_id) < fraction for one in documents]
    pairs = list(zip(documents, out, strict=True))
    return [one for one, o in pairs if not o], [one for one, o in pairs if o]

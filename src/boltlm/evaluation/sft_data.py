"""Fine-tuning examples: question, thought and answer of documents that end in an answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boltlm.corpus.answers import split_answer
from boltlm.corpus.reference_latents import document_thought
from boltlm.errors import UserError
from boltlm.evaluation import fewshot
from boltlm.evaluation.fewshot import PROMPT_FORMS, PromptForm
from boltlm.evaluation.finetune_config import FinetuneRun, FinetuneSettings
from boltlm.records import Document, Paraphrase, read_table
from boltlm.seeds import uniform
from boltlm.sequences.sft import SFTExample
from boltlm.teachers.prompts import SINGLE_PROMPT_STYLE
from boltlm.tokens import TextCoder


@dataclass(frozen=True, slots=True)
class FinetuneExamples:
    """The examples to train on and the held-out ones, the number of documents that have neither,
    because they carry no thought, and the number of examples that were left out, because they are
    longer than the context window."""

    training: list[SFTExample]
    heldout: list[SFTExample]
    documents_without_thought: int
    dropped_too_long: int


def load_examples(
    settings: FinetuneSettings, split: Path, data: Path, coder: TextCoder
) -> FinetuneExamples:
    """The examples of a run. `split`: the splits of all corpora; `data`: as in `read_thoughts`.
    Raises UserError where there is none to train on."""
    documents = list(read_table(split / settings.run.corpus, Document))
    thoughts = read_thoughts(data, documents)
    parts = [
        list(build_examples(coder, part, thoughts, settings.run))
        for part in split_heldout(documents, settings.heldout_fraction, settings.seed)
    ]
    training, heldout = (
        [example for example in examples if fits_window(coder, example)] for examples in parts
    )
    if not training:
        problem = "fits the context window" if parts[0] else "has a thought"
        raise UserError(
            f"finetune {settings.name}: no training document {problem}; see"
            f" finetune.runs.{settings.name}.data and finetune.heldout_fraction"
        )
    without_thought = sum(not thoughts.get(document.doc_id) for document in documents)
    num_fitting = len(training) + len(heldout)
    return FinetuneExamples(training, heldout, without_thought, sum(map(len, parts)) - num_fitting)


def read_thoughts(data: Path, documents: Sequence[Document]) -> dict[str, list[str]]:
    """The thoughts of each document by its id; a document without a thought has no entry.

    `data` is the output of a teacher, or a corpus of the split, whose documents carry their own
    thoughts. Raises UserError for the output of a teacher whose task is not `solve`.
    """
    if data.parent.name == "split":
        own_thoughts = {document.doc_id: document_thought(document) for document in documents}
        return {doc_id: [thought] for doc_id, thought in own_thoughts.items() if thought}
    thoughts: dict[str, list[str]] = {}
    for row in read_table(data, Paraphrase):
        if row.style != SINGLE_PROMPT_STYLE["solve"]:
            raise UserError(
                f"{data}: contains paraphrases instead of thoughts; use a teacher whose task is"
                " `solve`"
            )
        if row.text:
            thoughts.setdefault(row.doc_id, []).append(row.text)
    return thoughts


def build_examples(
    coder: TextCoder,
    documents: Sequence[Document],
    thoughts: Mapping[str, Sequence[str]],
    run: FinetuneRun,
) -> Iterator[SFTExample]:
    """One example for each thought of each document (docs/method.md, 6.3).

    Raises UserError for a document without a question or an answer.
    """
    form = PROMPT_FORMS[run.task]
    bos, eos = coder.special_tokens.bos, coder.special_tokens.eos
    for document in documents:
        question, answer = _split_document(document, form)
        text = fewshot.render_prompt(form, "", (), question, run.space)
        prompt = [bos, *fewshot.encode_prompt(coder, text)]
        for thought in thoughts.get(document.doc_id, ()):
            if run.space == "latent":
                latent = fewshot.render_latent(thought).removeprefix(fewshot.LATENT_START)
                completion = f"{latent}{fewshot.as_text(answer)}"
            else:
                completion = f" {fewshot.as_text(thought + answer)}"
            yield SFTExample(prompt, [*fewshot.encode_prompt(coder, completion), eos])


def fits_window(coder: TextCoder, example: SFTExample) -> bool:
    """Whether an example is not longer than the context window."""
    return len(example.prompt) + len(example.completion) <= coder.context_length


def _split_document(document: Document, form: PromptForm) -> tuple[str, str]:
    """A document's question and its answer: from the task's answer cue on or, for a task without
    one, the last sentence."""
    question, answer = split_answer(document.text, form.answer_cue)
    if form.answer_cue:
        question, answer = question.strip(), f" {answer.rstrip()}" if answer else ""
    if not (question and answer):
        ending = (
            f"an answer that begins with '{form.answer_cue}'"
            if form.answer_cue
            else "a last sentence with the answer"
        )
        raise UserError(
            f"document '{document.doc_id}' must consist of a question and {ending}; see"
            " finetune.runs.<name>.corpus"
        )
    return question, answer


def split_heldout(
    documents: Sequence[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """The documents to train on, and the held-out ones. On which side a document is depends on the
    seed and its id alone."""
    is_heldout = [
        uniform(seed, "finetune, held out", document.doc_id) < fraction for document in documents
    ]
    pairs = list(zip(documents, is_heldout, strict=True))
    return [document for document, out in pairs if not out], [
        document for document, out in pairs if out
    ]

"""Held-out questions: the thought in the latent space, or no thought; the number that follows."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import ClassVar, Literal

import pyarrow as pa

from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.records import Question
from boltlm.sampling.estep import EStep
from boltlm.sampling.samplers import Key, TransformersSampler
from boltlm.sequences import layouts

Space = Literal["latent", "none"]
# A sign belongs to a number unless a digit stands before it; commas group thousands.
_NUMBER = re.compile(r"(?:(?<![\d.])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question, what the model wrote for it, the number read from that, and the verdict."""

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "question_id": pa.string(),
            "space": pa.string(),
            "thought": pa.string(),
            "completion": pa.string(),
            "extracted": pa.string(),
            "answer": pa.string(),
            "correct": pa.bool_(),
        }
    )
    question_id: str
    space: str
    thought: str | None
    completion: str
    extracted: str | None
    answer: str
    correct: bool


def number(text: str) -> str | None:
    """The last number of the first sentence of `text`, or None."""
    first = next(iter(sentences(text.strip())), "")
    found = _NUMBER.findall(first)
    return found[-1] if found else None


def same_number(found: str | None, wanted: str) -> bool:
    """Whether both say the same number, thousands commas and trailing zeros aside."""
    if found is None:
        return False
    try:
        return _decimal(found) == _decimal(wanted)
    except InvalidOperation:
        return found == wanted


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("−", "-"))


def answer(
    estep: EStep,
    questions: Sequence[Question],
    space: Space,
    *,
    latent_format: bool,
    room: int,
    answer_tokens: int,
) -> list[Answer]:
    """Greedy answers. Space `latent`: question, SoL Prior, thought, EoL, answer. Space `none`:
    question, answer, with the empty pair between them for models of the latent format."""
    if room < 1:
        raise UserError("the model's window leaves no room for a question; lower max_latent_tokens")
    m, coder = estep.markers, estep.coder
    keys: list[Key] = [("answer", question.question_id) for question in questions]
    contexts = [coder.encode(question.prompt)[-room:] for question in questions]
    thoughts: list[tuple[int, ...] | None] = [None] * len(questions)
    if space == "latent":
        drawn = _greedy(estep, estep.max_latent_tokens).sample(
            [layouts.prior_prefix(m, context) for context in contexts], keys, 1
        )
        thoughts = [draws[0].tokens for draws in drawn]
        prompts = [
            [*layouts.prior_prefix(m, context), *(thought or ()), m.eol]
            for context, thought in zip(contexts, thoughts, strict=True)
        ]
    elif latent_format:
        prompts = [layouts.bare_prefix(m, context) for context in contexts]
    else:
        prompts = [[m.bos, *context] for context in contexts]
    written = _greedy(estep, answer_tokens).sample(prompts, keys, 1)
    return [
        _judge(
            question,
            space,
            None if thought is None else coder.decode(list(thought)),
            coder.decode(list(draws[0].tokens)),
        )
        for question, thought, draws in zip(questions, thoughts, written, strict=True)
    ]


def _greedy(estep: EStep, tokens: int) -> TransformersSampler:
    return TransformersSampler(
        estep.model, estep.markers, tokens, estep.config.batch_tokens, estep.seed, greedy=True
    )


def _judge(question: Question, space: Space, thought: str | None, completion: str) -> Answer:
    extracted = number(completion)
    return Answer(
        question_id=question.question_id,
        space=space,
        thought=thought,
        completion=completion,
        extracted=extracted,
        answer=question.answer,
        correct=same_number(extracted, question.answer),
    )


def accuracy(answers: Sequence[Answer]) -> tuple[float, float]:
    """Share of correct answers and its binomial standard error."""
    share = sum(one.correct for one in answers) / len(answers)
    return share, math.sqrt(share * (1 - share) / len(answers))

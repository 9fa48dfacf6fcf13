"""What lm-eval calls for the tasks of this folder: their questions as prompts, and the verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from boltlm.corpus import benchmarks
from boltlm.evaluation import prompts
from boltlm.evaluation.grading import Verdict, grade
from boltlm.records import Question, read
from boltlm.tokens import EOL, SOL, TextCoder


def docs(
    *,
    task: str,
    prompts: str,
    space: str,
    where: str,
    split: str = "test",
    model: str | None = None,
    answer_tokens: int = 256,
    samples: int = 1,
    bare: bool = False,
    zero_shot: bool = False,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The questions of `where`, each `samples` times. With `model`, a folder with its tokenizer,
    prompts lose the shots for which its window has no room beside `answer_tokens`."""
    coder = TextCoder(Path(model)) if model else None
    found = list(_asked(task, where, split))[:limit]
    spec = task, None if zero_shot else prompts, space
    rows = [
        {**row, "sample": sample}
        for row in (_row(one, spec, coder, answer_tokens, bare) for one in found)
        for sample in range(samples)
    ]
    return {"test": Dataset.from_list(rows)}


def _asked(task: str, where: str, split: str) -> Iterator[benchmarks.Item]:
    if task != "questions":
        yield from benchmarks.items(task, where, split)
        return
    for one in read(Path(where), Question):
        yield benchmarks.Item(
            item_id=one.question_id,
            subject="",
            question=one.prompt,
            choices=(),
            solution=one.answer,
        )


def _row(
    item: benchmarks.Item,
    spec: tuple[Any, Any, Any],
    coder: TextCoder | None,
    answer_tokens: int,
    bare: bool,
) -> dict[str, Any]:
    task, name, space = spec
    form = prompts.FORMS[task]
    description, shots = prompts.shots(task, name, item.subject) if name else ("", ())
    question = item.question.strip() if task == "mmlu_stem" else item.question
    if item.choices:
        letters = zip("ABCD", item.choices, strict=True)
        question += "\n" + " ".join(f"({letter}) {choice}" for letter, choice in letters)
    pair = f"{SOL}{EOL}" if bare else ""
    if coder is None:
        text, kept = prompts.render(form, description, shots, question, space, pair), len(shots)
    else:
        room = coder.window - answer_tokens
        text, kept = prompts.fitting(coder, room, form, description, shots, question, space, pair)
    return {
        "id": item.item_id,
        "subject": item.subject,
        "gold": item.solution,
        "prompt": text,
        "shots": kept,
        "lost_shots": len(shots) - max(kept, 0),
        "task": task,
        "space": space,
    }


def parts(completion: str, space: str) -> tuple[str | None, str | None]:
    """The thought and the answer in what a model wrote; in raw space the answer is all of it. A
    latent that does not end has no answer."""
    if space == "raw":
        return None, completion
    thought, mark, answer = completion.partition(EOL)
    return thought, answer if mark else None


def verdicts(doc: Mapping[str, Any], completion: str) -> dict[str, Verdict]:
    """What each grader of the task says."""
    return grade(doc["task"], parts(completion, doc["space"])[1], doc["gold"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As lm-eval wants it: 1 or 0 for each grader."""
    found = verdicts(doc, results[0])
    return {name: float(verdict.correct) for name, verdict in found.items()}

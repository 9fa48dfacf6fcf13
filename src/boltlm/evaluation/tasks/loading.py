"""Functions that lm-eval calls for the tasks of this folder: questions as prompts, and verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from boltlm.corpus import benchmarks
from boltlm.evaluation import fewshot
from boltlm.evaluation.grading import Verdict, grade
from boltlm.evaluation.task_spec import PromptSet, TaskName, ThoughtSpace
from boltlm.records import Question, read_table
from boltlm.tokens import EOL, TextCoder


def load_docs(
    *,
    task: TaskName,
    prompts: PromptSet,
    space: ThoughtSpace,
    data_path: str,
    split: str = "test",
    model_folder: str | None = None,
    max_answer_tokens: int = 256,
    samples: int = 1,
    no_latent: bool = False,
    zero_shot: bool = False,
    limit: int | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The first `limit` questions in `data_path`, each `samples` times, as lm-eval's documents.

    With `model_folder`, whose tokenizer and context window then count, prompts lose the examples
    that do not fit beside an answer of `max_answer_tokens` tokens. `no_latent` is described at
    `render_prompt`; `zero_shot` leaves out description and examples.
    """
    coder = TextCoder(Path(model_folder)) if model_folder else None
    rows: list[dict[str, Any]] = []
    for item in list(_read_items(task, data_path, split))[:limit]:
        row = _row(
            item,
            task,
            None if zero_shot else prompts,
            space,
            coder=coder,
            max_answer_tokens=max_answer_tokens,
            no_latent=no_latent,
        )
        rows += [{**row, "sample": sample} for sample in range(samples)]
    return {"test": Dataset.from_list(rows)}


def _read_items(task: TaskName, data_path: str, split: str) -> Iterator[benchmarks.BenchmarkItem]:
    if task != "questions":
        yield from benchmarks.read_benchmark(task, data_path, split)
        return
    for question in read_table(Path(data_path), Question):
        yield benchmarks.BenchmarkItem(
            item_id=question.question_id,
            subject="",
            question=question.prompt,
            choices=(),
            solution=question.answer,
        )


def _row(
    item: benchmarks.BenchmarkItem,
    task: TaskName,
    prompts: PromptSet | None,
    space: ThoughtSpace,
    *,
    coder: TextCoder | None,
    max_answer_tokens: int,
    no_latent: bool,
) -> dict[str, Any]:
    """One question with its prompt; zero-shot without a prompt set."""
    form = fewshot.PROMPT_FORMS[task]
    description, examples = (
        fewshot.fewshot_examples(task, prompts, item.subject) if prompts else ("", ())
    )
    question = item.question.strip() if task == "mmlu_stem" else item.question
    if item.choices:
        choices = zip("ABCD", item.choices, strict=True)
        question += "\n" + " ".join(f"({letter}) {choice}" for letter, choice in choices)
    arguments = form, description, examples, question, space, no_latent
    if coder is None:
        prompt, num_shots = fewshot.render_prompt(*arguments), len(examples)
    else:
        token_budget = coder.context_length - max_answer_tokens
        prompt, num_shots = fewshot.fit_prompt(coder, token_budget, *arguments)
    return {
        "id": item.item_id,
        "subject": item.subject,
        "gold": item.solution,
        "prompt": prompt,
        "shots": num_shots,
        "lost_shots": len(examples) - max(num_shots, 0),
        "task": task,
        "space": space,
    }


def split_completion(completion: str, space: ThoughtSpace) -> tuple[str | None, str | None]:
    """The thought and the answer in a completion.

    In raw space the whole completion is the answer. In latent space the answer follows the first
    EoL; without EoL there is none.
    """
    if space == "raw":
        return None, completion
    thought, eol, answer = completion.partition(EOL)
    return thought, answer if eol else None


def grade_completion(doc: Mapping[str, Any], completion: str) -> dict[str, Verdict]:
    """The verdict of each of the task's graders, by name."""
    return grade(doc["task"], split_completion(completion, doc["space"])[1], doc["gold"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The verdicts in the form that lm-eval expects: 1 or 0 for each grader."""
    verdicts = grade_completion(doc, results[0])
    return {grader: float(verdict.correct) for grader, verdict in verdicts.items()}

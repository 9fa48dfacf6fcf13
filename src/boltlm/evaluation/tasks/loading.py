"""Functions that lm-eval calls for the tasks of this folder: questions as prompts, and verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from boltlm.corpus import benchmarks
from boltlm.evaluation import fewshot
from boltlm.evaluation.grading import Verdict, find_statement, grade
from boltlm.evaluation.task_spec import PromptSet, TaskName, ThoughtSpace
from boltlm.records import Question, read_table
from boltlm.tokens import EOL, TextCoder


def load_docs(
    *,
    task: TaskName,
    prompts: PromptSet,
    space: ThoughtSpace,
    data_path: str,
    fewshot_path: str = "",
    split: str = "test",
    model_folder: str | None = None,
    max_answer_tokens: int = 256,
    samples: int = 1,
    no_latent: bool = False,
    zero_shot: bool = False,
    cues: Sequence[str] = ("",),
    limit: int | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The first `limit` questions in `data_path`, each `samples` times, as lm-eval's documents; in
    the space `cot` so for each of `cues`.

    With `model_folder`, whose tokenizer and context window then count, prompts lose the examples
    that do not fit beside an answer of `max_answer_tokens` tokens. With `no_latent` they end with
    SoL EoL, which tells a model with latents that none follows. `zero_shot` leaves out description
    and examples.
    """
    coder = TextCoder(Path(model_folder)) if model_folder else None
    rows: list[dict[str, Any]] = []
    for item, cluster in list(_read_items(task, data_path, split))[:limit]:
        for number, cue in enumerate(cues, 1) if space == "cot" else [(0, "")]:
            row = _row(
                item,
                task,
                None if zero_shot else prompts,
                space,
                synthetic=Path(fewshot_path),
                coder=coder,
                max_answer_tokens=max_answer_tokens,
                ending=fewshot.EMPTY_LATENT if no_latent else cue and f" {fewshot.as_text(cue)}",
            )
            row |= {"cluster": cluster, "cue": number}
            rows += [{**row, "sample": sample} for sample in range(samples)]
    return {"test": Dataset.from_list(rows)}


def _read_items(
    task: TaskName, data_path: str, split: str
) -> Iterator[tuple[benchmarks.BenchmarkItem, str]]:
    """The items, each with its cluster: of a benchmark, each item is its own."""
    if task != "questions":
        for item in benchmarks.read_benchmark(task, data_path, split):
            yield item, item.item_id
        return
    for question in read_table(Path(data_path), Question):
        item = benchmarks.BenchmarkItem(
            item_id=question.question_id,
            subject=question.subject,
            level="",
            question=question.prompt,
            choices=(),
            solution=f"{question.stem} {question.answer}.",
        )
        yield item, question.cluster or question.question_id


def _row(
    item: benchmarks.BenchmarkItem,
    task: TaskName,
    prompts: PromptSet | None,
    space: ThoughtSpace,
    *,
    synthetic: Path,
    coder: TextCoder | None,
    max_answer_tokens: int,
    ending: str,
) -> dict[str, Any]:
    """One question with its prompt; zero-shot without a prompt set. `synthetic` as in
    `fewshot_examples`, `ending` as in `render_prompt`."""
    form = fewshot.PROMPT_FORMS[task]
    description, examples = (
        fewshot.fewshot_examples(task, prompts, item.subject, synthetic) if prompts else ("", ())
    )
    question = item.question.strip() if task == "mmlu_stem" else item.question
    if item.choices:
        choices = zip("ABCD", item.choices, strict=True)
        question += "\n" + " ".join(f"({letter}) {choice}" for letter, choice in choices)
    arguments = form, description, examples, question, space, ending
    if coder is None:
        prompt, num_shots = fewshot.render_prompt(*arguments), len(examples)
    else:
        token_budget = coder.context_length - max_answer_tokens
        prompt, num_shots = fewshot.fit_prompt(coder, token_budget, *arguments)
    return {
        "id": item.item_id,
        "subject": item.subject,
        "level": item.level,
        "gold": item.solution,
        "prompt": prompt,
        "shots": num_shots,
        "lost_shots": len(examples) - max(num_shots, 0),
        "task": task,
        "space": space,
    }


def split_completion(
    completion: str, space: ThoughtSpace, gold: str
) -> tuple[str | None, str | None]:
    """The thought and the answer in a completion.

    In raw space the whole completion is the answer. In latent space the answer follows the first
    EoL; without EoL there is none. In the space `cot` it begins with the first sentence of the form
    of `gold`; without one there is none.
    """
    if space == "raw":
        return None, completion
    if space == "cot":
        statement = find_statement(completion, gold)
        if statement is None:
            return completion, None
        return completion[: statement.start()], completion[statement.start() :]
    thought, eol, answer = completion.partition(EOL)
    return thought, answer if eol else None


def grade_completion(doc: Mapping[str, Any], completion: str) -> dict[str, Verdict]:
    """The verdict of each of the task's graders, by name."""
    _, answer = split_completion(completion, doc["space"], doc["gold"])
    return grade(doc["task"], answer, doc["gold"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The verdicts in the form that lm-eval expects: 1 or 0 for each grader."""
    verdicts = grade_completion(doc, results[0])
    return {grader: float(verdict.correct) for grader, verdict in verdicts.items()}

"""Few-shot prompts: the wording of each task, its two prompt sets, and fitting them into a context
window (docs/method.md, 6.1 and 6.2).

The prompt set `standard` (Minerva, Wei et al., FLAN) is read from the installed lm-eval; the
examples of the set `synthetic` are read from the file that `prompts.fewshot` of params.yaml names;
this project's own are in `fewshot.yaml`. In raw space a standard
prompt is that of lm-eval, character by character. In latent space an example has the form
`question SoL Prior thought EoL answer`, with a space before the answer as in training text.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from boltlm.errors import UserError
from boltlm.evaluation.task_spec import MISSING_PROMPT_SETS, PromptSet, TaskName, ThoughtSpace
from boltlm.tokens import EOL, PRIOR, SOL, SPECIAL_TOKENS, TextCoder

LATENT_START = SOL + PRIOR
EMPTY_LATENT = SOL + EOL  # tells a model that no latent follows
# Inside a special token that is meant as text; a prompt is one string, because lm-eval wants it so.
_ESCAPE = "\ue000"
_SPECIAL = "|".join(map(re.escape, SPECIAL_TOKENS))
_EXAMPLE_KEYS = ("question", "thought", "answer")
COT_CUE = "Let's think step by step."
# The FLAN examples in lm-eval lost backslashes: \f and \r became control characters or line breaks.
BACKSLASH_REPAIRS = (
    (r"[\f\n]actorial\{", r"\\factorial{"),
    (r"[\f\n]rac\{", r"\\frac{"),
    (r"[\r\n]ightarrow", r"\\rightarrow"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptForm:
    """The wording of a task: the text around a question; `cot_cue`, which in raw space comes before
    the thought; `answer_cue`, with which the answer of an example begins; and the number of
    examples."""

    question_prefix: str
    question_suffix: str
    cot_cue: str
    answer_cue: str
    num_shots: int


PROMPT_FORMS: dict[TaskName, PromptForm] = {
    "gsm8k": PromptForm(
        question_prefix="Q: ",
        question_suffix="\nA:",
        cot_cue="",
        answer_cue="The answer is",
        num_shots=8,
    ),
    "math": PromptForm(
        question_prefix="Problem:\n",
        question_suffix="\n\nSolution:",
        cot_cue="",
        answer_cue="Final Answer:",
        num_shots=4,
    ),
    "mmlu_stem": PromptForm(
        question_prefix="Q: ",
        question_suffix="\nA:",
        cot_cue=COT_CUE,
        answer_cue="The answer is",
        num_shots=4,
    ),
    "questions": PromptForm(
        question_prefix="", question_suffix="", cot_cue="", answer_cue="", num_shots=0
    ),
}


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """A worked question; `target` is everything that follows the question in raw space."""

    question: str
    target: str

    def split_target(self, form: PromptForm) -> tuple[str, str]:
        """The thought and the answer in `target`."""
        thought, cue, answer = self.target.rpartition(form.answer_cue)
        return thought.removeprefix(form.cot_cue).strip(), (cue + answer).strip()


def fewshot_examples(
    task: TaskName, prompts: PromptSet, subject: str, synthetic: Path
) -> tuple[str, tuple[FewShotExample, ...]]:
    """The description that a prompt begins with, and its examples; both are empty for the task
    `questions`. `synthetic`: the file of the prompt set of that name.

    Raises UserError where there are no such examples.
    """
    if message := MISSING_PROMPT_SETS.get((task, prompts)):
        raise UserError(message)
    if task == "questions":
        return "", ()
    if prompts == "synthetic":
        return "", _synthetic_examples(task, synthetic)
    description, examples = _standard_examples(task, subject)
    return description, examples[: PROMPT_FORMS[task].num_shots]


@cache
def _synthetic_examples(task: TaskName, path: Path) -> tuple[FewShotExample, ...]:
    form = PROMPT_FORMS[task]
    cue = f"{form.cot_cue} " if form.cot_cue else ""
    try:
        examples = yaml.safe_load(path.read_text("utf-8"))[task]
        return tuple(
            FewShotExample(str(question), f"{cue}{thought} {answer}")
            for question, thought, answer in map(itemgetter(*_EXAMPLE_KEYS), examples)
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"prompts.fewshot: {path} must map {task} to a list of examples, each with the keys"
            f" {', '.join(_EXAMPLE_KEYS)}: {error!r}"
        ) from error


@cache
def _standard_examples(task: TaskName, subject: str) -> tuple[str, tuple[FewShotExample, ...]]:
    if task == "gsm8k":
        samples = _read_task_config("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
        return "", tuple(FewShotExample(row["question"], row["target"]) for row in samples)
    if task == "math":
        samples = _read_returned_literal("minerva_math/utils.py", "list_fewshot_samples")
        return "", tuple(FewShotExample(row["problem"], row["solution"]) for row in samples)
    assert task == "mmlu_stem", f"{task} has no standard examples"
    config = _read_task_config(f"mmlu/flan_cot_fewshot/mmlu_{subject}.yaml")
    examples = tuple(
        FewShotExample(
            _repair_backslashes(row["question"].strip()), _repair_backslashes(row["target"])
        )
        for row in config["fewshot_config"]["samples"]
    )
    return config["description"], examples


def _repair_backslashes(text: str) -> str:
    for pattern, replacement in BACKSLASH_REPAIRS:
        text = re.sub(pattern, replacement, text)
    return text


def _read_installed(path: str) -> str:
    """A file of the installed lm-eval, by its path in the folder of tasks."""
    file = resources.files("lm_eval").joinpath("tasks", *path.split("/"))
    if not file.is_file():
        raise UserError(
            f"the installed lm-eval has no file tasks/{path}; install the locked version"
        )
    return file.read_text("utf-8")


def _read_task_config(path: str) -> dict[str, Any]:
    return yaml.safe_load(_read_installed(path))


def _read_returned_literal(path: str, function: str) -> Any:
    """The literal that a function returns, without importing its module."""
    for node in ast.walk(ast.parse(_read_installed(path))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            (returned,) = (step for step in node.body if isinstance(step, ast.Return))
            assert returned.value is not None
            return ast.literal_eval(returned.value)
    raise UserError(
        f"the installed lm-eval has no function {function} in tasks/{path}; install the locked"
        " version"
    )


def as_text(text: str) -> str:
    """A text in the form in which it is a part of a prompt: no special token in it is one."""
    escaped = text.replace(_ESCAPE, 2 * _ESCAPE)
    return re.sub(_SPECIAL, lambda match: f"{match[0][0]}{_ESCAPE}{match[0][1:]}", escaped)


def render_prompt(
    form: PromptForm,
    description: str,
    examples: Sequence[FewShotExample],
    question: str,
    space: ThoughtSpace,
    ending: str = "",
) -> str:
    """One prompt for `encode_prompt`, without BOS. `ending`, special tokens or `as_text`, follows
    the question, except in latent space and where the task has a cue of its own."""
    prompt = as_text(description)
    for example in examples:
        prompt += f"{form.question_prefix}{as_text(example.question)}{form.question_suffix}"
        if space == "latent":
            thought, answer = example.split_target(form)
            prompt += f"{render_latent(thought)} {as_text(answer)}\n\n"
        else:
            prompt += f" {as_text(example.target)}\n\n"
    prompt += f"{form.question_prefix}{as_text(question)}{form.question_suffix}"
    if space == "latent":
        return prompt + LATENT_START
    if form.cot_cue:
        return f"{prompt} {form.cot_cue}"
    return prompt + ending


def render_latent(thought: str) -> str:
    """SoL Prior Z EoL: a thought with the special tokens that surround it in prior mode."""
    return f"{LATENT_START}{as_text(thought)}{EOL}"


def encode_prompt(coder: TextCoder, prompt: str) -> list[int]:
    """The token ids of special tokens and of texts that `as_text` returned; each text between two
    special tokens is encoded alone."""
    special = coder.special_tokens
    special_ids = dict(
        zip(SPECIAL_TOKENS, (special.sol, special.eol, special.prior, special.post), strict=True)
    )
    ids: list[int] = []
    for piece in re.split(f"({_SPECIAL})", prompt):
        if piece in special_ids:
            ids.append(special_ids[piece])
        else:
            ids += coder.encode(re.sub(f"{_ESCAPE}({_ESCAPE}?)", r"\1", piece))
    return ids


def fit_prompt(
    coder: TextCoder,
    token_budget: int,
    form: PromptForm,
    description: str,
    examples: Sequence[FewShotExample],
    question: str,
    space: ThoughtSpace,
    ending: str = "",
) -> tuple[str, int]:
    """The prompt with as many examples as fit into `token_budget` tokens, BOS included, and their
    number. The first examples are dropped first. If the question alone does not fit, the prompt is
    empty and the number −1."""
    for first in range(len(examples) + 1):
        prompt = render_prompt(form, description, examples[first:], question, space, ending)
        if len(encode_prompt(coder, prompt)) < token_budget:  # one token is for BOS
            return prompt, len(examples) - first
    return "", -1

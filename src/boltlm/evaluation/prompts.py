"""Few-shot prompts: each task's wording, its two sets of shots, and how many of them fit.

Standard shots (Minerva, Wei et al., FLAN) are read from the installed lm-eval; synthetic ones are
this project's (`shots.yaml`). In raw space a prompt with standard shots is lm-eval's own, letter
by letter; in latent space a shot is `question SoL Prior thought EoL answer`, with white space where
training text has it, before the answer.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from boltlm.errors import UserError
from boltlm.tokens import EOL, MARKERS, PRIOR, SOL, TextCoder

Prompts = Literal["standard", "synthetic"]
Space = Literal["latent", "raw"]
OPENING = SOL + PRIOR
NUDGE = "Let's think step by step."
# lm-eval's FLAN shots lost backslashes: \f and \r became control characters or line breaks.
MENDED = (
    (r"[\f\n]actorial\{", r"\\factorial{"),
    (r"[\f\n]rac\{", r"\\frac{"),
    (r"[\r\n]ightarrow", r"\\rightarrow"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a task words a question: what stands before and after it; `nudge`: what raw text says
    before the thought; `answer`: what the part of a shot begins with that is no thought; `shots`:
    how many."""

    before: str
    after: str
    nudge: str
    answer: str
    shots: int


FORMS = {
    "gsm8k": Form(before="Q: ", after="\nA:", nudge="", answer="The answer is", shots=8),
    "math": Form(
        before="Problem:\n",
        after="\n\nSolution:",
        nudge="",
        answer="Final Answer:",
        shots=4,
    ),
    "mmlu_stem": Form(before="Q: ", after="\nA:", nudge=NUDGE, answer="The answer is", shots=4),
    "questions": Form(before="", after="", nudge="", answer="", shots=0),
}


@dataclass(frozen=True, slots=True)
class Shot:
    """A worked question; `target` is all that raw text says behind it."""

    question: str
    target: str

    def parts(self, form: Form) -> tuple[str, str]:
        """The thought and the answer in `target`."""
        thought, mark, answer = self.target.rpartition(form.answer)
        return thought.removeprefix(form.nudge).strip(), (mark + answer).strip()


def shots(task: str, prompts: Prompts, subject: str) -> tuple[str, tuple[Shot, ...]]:
    """What a prompt begins with, and its shots. Raises UserError where there are none."""
    if task == "questions":
        if prompts == "synthetic":
            raise UserError(
                "the corpus's own questions are asked without shots: questions/standard"
            )
        return "", ()
    if prompts == "synthetic":
        return "", _synthetic(task)
    description, found = _standard(task, subject)
    return description, found[: FORMS[task].shots]


@cache
def _synthetic(task: str) -> tuple[Shot, ...]:
    text = resources.files("boltlm.evaluation").joinpath("shots.yaml").read_text("utf-8")
    form = FORMS[task]
    lead = f"{form.nudge} " if form.nudge else ""
    return tuple(
        Shot(one["question"], f"{lead}{one['thought']} {one['answer']}")
        for one in yaml.safe_load(text)[task]
    )


@cache
def _standard(task: str, subject: str) -> tuple[str, tuple[Shot, ...]]:
    if task == "gsm8k":
        samples = _config("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
        return "", tuple(Shot(one["question"], one["target"]) for one in samples)
    if task == "math":
        samples = _returned("minerva_math/utils.py", "list_fewshot_samples")
        return "", tuple(Shot(one["problem"], one["solution"]) for one in samples)
    config = _config(f"mmlu/flan_cot_fewshot/mmlu_{subject}.yaml")
    samples = config["fewshot_config"]["samples"]
    found = tuple(Shot(_mended(one["question"].strip()), _mended(one["target"])) for one in samples)
    return config["description"], found


def _mended(text: str) -> str:
    for broken, whole in MENDED:
        text = re.sub(broken, whole, text)
    return text


def _installed(path: str) -> str:
    file = resources.files("lm_eval").joinpath("tasks", *path.split("/"))
    if not file.is_file():
        raise UserError(f"the installed lm-eval lacks tasks/{path}; install the locked version")
    return file.read_text("utf-8")


def _config(path: str) -> dict[str, Any]:
    return yaml.safe_load(_installed(path))


def _returned(path: str, function: str) -> Any:
    """The literal that a function returns; its module need not be imported."""
    for node in ast.walk(ast.parse(_installed(path))):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            (returned,) = (step for step in node.body if isinstance(step, ast.Return))
            assert returned.value is not None
            return ast.literal_eval(returned.value)
    raise UserError(f"the installed lm-eval's tasks/{path} lacks {function}")


def render(
    form: Form, description: str, found: Sequence[Shot], question: str, space: Space, bare: str = ""
) -> str:
    """One prompt, without BOS. `bare`: what tells a model in raw space that no latent comes."""
    text = description
    for shot in found:
        text += f"{form.before}{shot.question}{form.after}"
        if space == "raw":
            text += f" {shot.target}\n\n"
        else:
            thought, answer = shot.parts(form)
            text += f"{latent(thought)} {answer}\n\n"
    text += f"{form.before}{question}{form.after}"
    if space == "latent":
        return text + OPENING
    return f"{text} {form.nudge}" if form.nudge else text + bare


def latent(thought: str) -> str:
    """A thought between its special tokens, as it stands before a chunk in prior mode."""
    return f"{OPENING}{thought}{EOL}"


def encode(coder: TextCoder, text: str) -> list[int]:
    """A text's ids: what stands between special tokens is encoded alone."""
    pieces = re.split(f"({'|'.join(map(re.escape, MARKERS))})", text)
    m = coder.markers
    named = dict(zip(MARKERS, (m.sol, m.eol, m.prior, m.post), strict=True))
    ids: list[int] = []
    for piece in pieces:
        ids += [named[piece]] if piece in named else coder.encode(piece)
    return ids


def fitting(
    coder: TextCoder,
    room: int,
    form: Form,
    description: str,
    found: Sequence[Shot],
    question: str,
    space: Space,
    bare: str = "",
) -> tuple[str, int]:
    """The prompt with as many shots as `room` tokens take with BOS, whole ones lost from the left,
    and their number; without room for the question alone it is empty, with −1."""
    for first in range(len(found) + 1):
        prompt = render(form, description, found[first:], question, space, bare)
        if len(encode(coder, prompt)) < room:  # BOS
            return prompt, len(found) - first
    return "", -1

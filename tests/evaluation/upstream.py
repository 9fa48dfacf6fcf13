"""lm-eval's own gsm8k_cot, minerva_math and FLAN CoT MMLU on local rows, and a scripted model.

Everything but the source of the rows is lm-eval's.
"""

import gzip
import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from datasets import Dataset
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from boltlm.corpus.benchmarks import STEM_SUBJECTS
from boltlm.evaluation.task_spec import TaskName
from tests import tiny

TASKS = Path(lm_eval.__file__).parent / "tasks"
BENCHMARKS: tuple[TaskName, ...] = ("gsm8k", "math", "mmlu_stem")
GRADERS = {  # lm-eval's filter and metric → our grader
    ("flexible-extract", "exact_match"): "flexible",
    ("strict-match", "exact_match"): "strict",
    ("none", "math_verify"): "math_verify",
    ("get-answer", "exact_match"): "letter",
}
Row = dict[str, Any]

# Text that a template or a strip could change: white space at the ends, braces, line breaks, signs.
_GSM8K = [
    ("Janet’s ducks lay 16 eggs.  How many is that?", "16"),
    (" How many legs do 3 cows have? ", "12"),
    ("It costs $1,000.\nAnd with 1,345 more?\n", "2,345"),
    ("It has 3 °C and falls by 7. What is it then?", "-4"),
    ("What does {{question}} or {% if x %} mean to 8 of us?", "8"),
    ('A "small" shop\tsells 5 × 5 = ? apples', "25"),
    ("What is 10 - 3?", "7"),
    ("What is 10 % 7?", "3"),
    (r"What is \frac{1}{2} of 240?", "120"),
    ("Is A: 1 or B: 2 more? Give the number.", "2"),
    ("[1, 2, 3]", "6"),
    ("11", "11"),
]
MATH = [  # subject, problem, gold answer, an equal answer, a different one
    ("Algebra", "Solve $x + 1 = 3$.", "2", "x = 2", "3"),
    ("Algebra", "Where is $-1 < x \\le 4$?\n", "(-1,4]", r"\left(-1, 4\right]", "(-1,4)"),
    ("Algebra", "Which interval is left of $3$?", r"(-\infty,3)", r"\left(-\infty, 3\right)", "3"),
    ("Counting & Probability", "How likely is a head?", r"\frac{1}{2}", "0.5", r"\frac{1}{3}"),
    ("Counting & Probability", "Choose $2$ of $200$.", "19900", r"19{,}900", "1990"),
    ("Geometry", "How long is it?", r"5\text{ cm}", "5", "6"),
    ("Geometry", " How wide is the angle? ", r"90^\circ", "90", "45"),
    ("Intermediate Algebra", "Factor ${{x}}^2-1$.", "(x-1)(x+1)", "x^2-1", "x^2+1"),
    ("Intermediate Algebra", "Which roots?", r"\{1,-2\}", r"\{-2,1\}", r"\{1,2\}"),
    ("Number Theory", "What is $-7$?", "-7", "-7.0", "7"),
    ("Prealgebra", "[$\\frac34$]", r"\frac{3}{4}", r"\frac{6}{8}", r"\frac{4}{3}"),
    ("Precalculus", "Where is the point?", r"\left(1,\frac{\pi}{2}\right)", r"(1,\pi/2)", "(1,2)"),
]


# Completions, with our graders and lm-eval's that accept them. {g} is the gold answer as in the
# data, {n} the same without commas, {w} another number, {m} its negative with a Unicode minus sign.
FLEXIBLE, STRICT = {"flexible"}, {"strict"}
BOTH, NONE = FLEXIBLE | STRICT, set[str]()
NUMBERS = [
    ("So 7. The answer is {g}.", BOTH, BOTH),
    ("The answer is {w}.", NONE, NONE),
    ("The answer is {g}. Q: Two of 7?", BOTH, BOTH),
    ("The answer is {g}.\n\nThat is less than 99999.", STRICT, STRICT),
    ("The answer is {g}. The answer is {w}.", STRICT, STRICT),
    ("First 3, then {g}.", FLEXIBLE, FLEXIBLE),
    ("The answer is ${n:,}.", FLEXIBLE, FLEXIBLE),
    ("The answer is {g}", FLEXIBLE, FLEXIBLE),
    ("I cannot tell.", NONE, NONE),
    ("", NONE, NONE),
    ("The answer is {w}.</s> The answer is {g}.", NONE, NONE),
    ("The answer is {w}.<|im_end|> The answer is {g}.", NONE, NONE),
    # Intended: numbers are compared as numbers, and a Unicode minus sign is a minus sign.
    ("The answer is {n}.00.", BOTH, NONE),
    ("The answer is {g}...", BOTH, NONE),
    ("The answer is {m}.", NONE, FLEXIBLE),
]
LETTER = {"letter"}
LETTERS = [  # {g} is the gold answer, {w} another letter, {s} the gold answer in lower case
    ("2 > 1. The answer is ({g}).", LETTER, LETTER),
    ("The answer is ({w}).", NONE, NONE),
    ("The answer is {g}.", LETTER, LETTER),
    ("The answer is ({g})", LETTER, LETTER),
    ("the answer is ({s}).", LETTER, LETTER),
    ("The answer is ({g}).\nSo it is.", LETTER, LETTER),
    ("The answer is ({w}) because 2 > 1.", NONE, NONE),
    ("The answer is ({w}). No, the answer is ({g}).", NONE, NONE),
    ("I cannot tell.", NONE, NONE),
    ("", NONE, NONE),
    ("I cannot tell.</s> The answer is ({g}).", NONE, NONE),
    # Intended: text after the letter does not matter, no character is removed from the end of a
    # line, and a new question ends the answer.
    ("The answer is ({g}) because 2 > 1.", LETTER, NONE),
    ("The answer is {g}", LETTER, NONE),
    ("The answer is {g}e", NONE, LETTER),
    ("I cannot tell.\n\nQ: Two of 7?\nA: The answer is ({g}).", NONE, LETTER),
]
VERIFIED = {"math_verify"}
FORMULAS = [  # {g} is the gold answer, {s} an equal one, {w} a different one
    ("So. Final Answer: The final answer is ${g}$. I hope it is correct.", VERIFIED, VERIFIED),
    ("Final Answer: The final answer is ${s}$. I hope it is correct.", VERIFIED, VERIFIED),
    ("Final Answer: The final answer is ${w}$. I hope it is correct.", NONE, NONE),
    (r"Thus it is $\boxed{{{s}}}$. This took a while.", VERIFIED, VERIFIED),
    (r"Thus it is $\boxed{{{w}}}$, not ${g}$.", NONE, NONE),
    ("It is ${g}$.\n\nProblem:\nWhat is $99999$?", VERIFIED, VERIFIED),
    ("I cannot tell.", NONE, NONE),
    ("", NONE, NONE),
]
COMPLETIONS = {"gsm8k": NUMBERS, "math": FORMULAS, "mmlu_stem": LETTERS}


def rows(task: str) -> list[Row]:
    """A dozen synthetic rows, or one per subject, and some real rows where they are available."""
    if task == "math":
        return [
            {
                "problem": problem,
                "level": "Level 1",
                "type": subject,
                "solution": rf"It is $1 + 1$, so $\boxed{{{gold}}}$.",
            }
            for subject, problem, gold, *_ in MATH
        ]
    if task == "gsm8k":
        synthetic = [
            {"question": question, "answer": f"That is <<3+4=7>>7.\n#### {gold}"}
            for question, gold in _GSM8K
        ]
        return synthetic + list(islice(real("gsm8k_test"), 200))
    choices = ["no {{x}}", "(B) ", " 12", "none of the above"]
    mmlu_rows: list[Row] = []
    real_rows = real("mmlu_stem_test")
    for number, subject in enumerate(STEM_SUBJECTS):
        question = f" Which one,\n{number} or {{{{x}}}}? \n"
        row = {"question": question, "choices": choices, "answer": number % 4, "subject": subject}
        others = (other for other in real_rows if other["subject"] == subject)
        mmlu_rows += [row, *islice(others, 10)]
    return mmlu_rows


def real(name: str) -> list[Row]:
    """Rows of the shared data, none where it is missing."""
    path = tiny.SHARED / "eval" / f"{name}.jsonl.gz"
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fields(task: str, row: Row) -> dict[str, Any]:
    """The values of the fields of COMPLETIONS for a row."""
    if task == "math":
        gold, same, wrong = next(entry[2:] for entry in MATH if entry[1] == row["problem"])
        return {"g": gold, "s": same, "w": wrong}
    if task == "mmlu_stem":
        gold = "ABCD"[row["answer"]]
        return {"g": gold, "s": gold.lower(), "w": "BCDA"[row["answer"]]}
    gold = row["answer"].rpartition("#### ")[2]
    number = int(gold.replace(",", ""))
    return {"g": gold, "n": number, "w": number + 1, "m": f"−{abs(number)}"}


def write(folder: Path, task: str, task_rows: Sequence[Row]) -> str:
    """Write a file that our tasks read."""
    path = folder / f"{task}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in task_rows), encoding="utf-8")
    return str(path)


def lm_eval_tasks(task: str, task_rows: Sequence[Row]) -> dict[str, ConfigurableTask]:
    """lm-eval's task for each subject that has rows, in the order of the rows."""
    if task == "gsm8k":
        return {"": _lm_eval_task(TASKS / "gsm8k/gsm8k-cot.yaml", task_rows)}
    column = "type" if task == "math" else "subject"
    by_subject: dict[str, list[Row]] = {}
    for row in task_rows:
        by_subject.setdefault(row[column], []).append(row)
    if task == "mmlu_stem":
        folder = TASKS / "mmlu/flan_cot_fewshot"
        return {
            subject: _lm_eval_task(folder / f"mmlu_{subject}.yaml", subject_rows)
            for subject, subject_rows in by_subject.items()
        }
    files = sorted((TASKS / "minerva_math").glob("minerva_math_*.yaml"))
    by_name = {load_yaml(file, resolve_func=False)["dataset_name"]: file for file in files}
    names = {
        subject: subject.lower().replace("&", "and").replace(" ", "_") for subject in by_subject
    }
    return {
        names[subject]: _lm_eval_task(by_name[names[subject]], subject_rows)
        for subject, subject_rows in by_subject.items()
    }


def _lm_eval_task(file: Path, task_rows: Sequence[Row]) -> ConfigurableTask:
    config: dict[str, Any] = _load_minerva(file) if "minerva" in file.name else load_yaml(file)
    dataset = Dataset.from_list(list(task_rows))
    config["custom_dataset"] = lambda **_: {
        "train": dataset,
        "validation": dataset,
        "test": dataset,
    }
    return ConfigurableTask(config={key: config[key] for key in config if key != "tag"})


def _load_minerva(file: Path) -> dict[str, Any]:
    """A task of minerva_math. Its metric `exact_match` requires another version of antlr, which
    does not matter here: that version is pretended to be installed, and the metric disabled."""
    version = importlib.metadata.version
    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        antlr = "antlr4-python3-runtime"
        patch.setattr(
            importlib.metadata, "version", lambda name: "4.11" if name == antlr else version(name)
        )
        config: dict[str, Any] = load_yaml(file)
    for name in set(sys.modules) - modules:
        if name.endswith("minerva_math.utils"):
            del sys.modules[name]
    config["process_results"].__globals__["is_equiv"] = lambda *_: False
    return config


def requested_prompts(task: Any) -> list[str]:
    """The prompts that lm-eval passes to a model."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args[0] for instance in task.instances]


def last_question(prompt: str) -> str:
    """The text after the prefix of a prompt's last question."""
    return re.split(r"(?:^|\n\n)(?:Q: |Problem:\n)", prompt)[-1]


class ScriptedLM(LM):
    """Answers a prompt with `reply(prompt)` up to the first stop string, as lm-eval's models do,
    and records the requests."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        super().__init__()
        self.reply, self.requests = reply, list[tuple[str, dict[str, Any]]]()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        self.requests += [request.args for request in requests]
        return [self._completion(*request.args) for request in requests]

    def _completion(self, prompt: str, settings: dict[str, Any]) -> str:
        text = self.reply(prompt)
        for stop in settings["until"]:
            text = text.partition(stop)[0]
        return text

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


def lm_eval_verdicts(tasks: dict[str, ConfigurableTask], model: LM) -> dict[str, dict[str, bool]]:
    """The verdicts of lm-eval's metrics on the model's answers, by question and our grader."""
    results: Any = evaluate(model, {"tasks": dict(tasks)}, log_samples=True, bootstrap_iters=0)  # pyright: ignore[reportArgumentType]
    verdicts: dict[str, dict[str, bool]] = {}
    for samples in results["samples"].values():
        for sample in samples:
            question = last_question(sample["arguments"][0][0])
            for (filter_name, metric), grader in GRADERS.items():
                if filter_name == sample["filter"] and metric in sample:
                    verdicts.setdefault(question, {})[grader] = bool(sample[metric])
    return verdicts


def copy_tokenizer(base_folder: Path, folder: Path, context_length: int = 100_000) -> Path:
    """A copy of a model's tokenizer with another context length, by default one in which every
    prompt fits."""
    folder.mkdir(exist_ok=True)
    shutil.copy(base_folder / "tokenizer.json", folder)
    config = json.loads((base_folder / "config.json").read_text("utf-8"))
    config["max_position_embeddings"] = context_length
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

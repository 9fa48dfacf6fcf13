"""Benchmark items: GSM8K, MATH and the STEM subjects of MMLU, from files or the hub."""

import glob
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from boltlm.corpus.readers import is_file_name, read_label, read_rows, read_text, stream_hub
from boltlm.errors import UserError

BenchmarkName = Literal["gsm8k", "math", "mmlu_stem"]
BENCHMARKS: tuple[BenchmarkName, ...] = typing.get_args(BenchmarkName)
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
STEM_SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "college_biology",
    "college_chemistry",
    "college_computer_science",
    "college_mathematics",
    "college_physics",
    "computer_security",
    "conceptual_physics",
    "electrical_engineering",
    "elementary_mathematics",
    "high_school_biology",
    "high_school_chemistry",
    "high_school_computer_science",
    "high_school_mathematics",
    "high_school_physics",
    "high_school_statistics",
    "machine_learning",
)
_CHOICE_LETTERS = "ABCD"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkItem:
    """A question of a benchmark with its gold solution.

    `item_id`: the row's own `id`, or else the benchmark, subject, split and the item's number
    within the subject. `subject`: the name of the hub's config; empty for GSM8K. `level`: the
    difficulty of a problem of MATH, such as "Level 5"; empty where the row has none. `choices`:
    four in MMLU, none elsewhere. `solution`: as the data set has it, which is GSM8K's complete
    `answer`, MATH's `solution` or the letter of MMLU's correct choice.
    """

    item_id: str
    subject: str
    level: str
    question: str
    choices: tuple[str, ...]
    solution: str


_ParsedRow = tuple[str, str, tuple[str, ...], str]  # subject, question, choices, solution


@dataclass(frozen=True, kw_only=True, slots=True)
class _BenchmarkFormat:
    """`columns`: those that each row must have. `configs`: those of the hub's data set, unused for
    files. `subject_column`: the column whose value a config's name replaces, if any."""

    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], _ParsedRow]
    configs: tuple[str, ...]
    subject_column: str | None


def _parse_gsm8k(row: Mapping[str, Any]) -> _ParsedRow:
    if not row["answer"].rpartition("####")[2].strip():
        raise UserError(f"'answer' has no final answer, found {row['answer'][-60:]!r}")
    return "", row["question"], (), row["answer"]


def _parse_math(row: Mapping[str, Any]) -> _ParsedRow:
    subject = re.sub(r"\W+", "_", row["type"].lower().replace("&", "and"))
    if subject not in MATH_SUBJECTS:
        raise UserError(f"type '{row['type']}' is no subject of MATH ({', '.join(MATH_SUBJECTS)})")
    return subject, row["problem"], (), row["solution"]


def _parse_mmlu(row: Mapping[str, Any]) -> _ParsedRow:
    listed, answer = row["choices"], row["answer"]
    choices = tuple(listed) if isinstance(listed, list) else ()
    texts = all(isinstance(choice, str) for choice in choices)
    if (
        not texts
        or isinstance(answer, bool)
        or len(choices) != len(_CHOICE_LETTERS)
        or answer not in range(len(_CHOICE_LETTERS))
    ):
        raise UserError(f"expected four choices and an answer 0 to 3, found {listed!r}, {answer!r}")
    return row["subject"], row["question"], choices, _CHOICE_LETTERS[answer]


_ROW_FORMATS: dict[BenchmarkName, _BenchmarkFormat] = {
    "gsm8k": _BenchmarkFormat(
        columns=("question", "answer"), parse=_parse_gsm8k, configs=("main",), subject_column=None
    ),
    "math": _BenchmarkFormat(
        columns=("problem", "solution", "type"),
        parse=_parse_math,
        configs=MATH_SUBJECTS,
        subject_column="type",
    ),
    "mmlu_stem": _BenchmarkFormat(
        columns=("question", "choices", "answer", "subject"),
        parse=_parse_mmlu,
        configs=STEM_SUBJECTS,
        subject_column="subject",
    ),
}


def read_benchmark(
    name: BenchmarkName, data_path: str, split: str = "test"
) -> Iterator[BenchmarkItem]:
    """The items of a benchmark in the order of its files, or of the hub's configs.

    `data_path`: a path or glob pattern of JSONL (also .gz) or Parquet files, or the name of a data
    set of the hub, which may end in `@<revision>` and of which `split` is read. Subjects of MMLU
    outside STEM are skipped. Raises UserError where a file or column is missing, two items share an
    id, or there is no item.
    """
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for location, row in _rows(name, data_path, split):
        item = _item(name, row, location, counts, split)
        if name == "mmlu_stem" and item.subject not in STEM_SUBJECTS:
            continue
        if item.item_id in seen:
            raise UserError(f"{location}: a second item has the id '{item.item_id}'")
        seen.add(item.item_id)
        yield item
    if not seen:
        raise UserError(f"benchmarks.{name}: '{data_path}' has no item of this benchmark")


def _rows(name: BenchmarkName, data_path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its location for error messages."""
    if is_file_name(data_path):
        paths = sorted(glob.glob(data_path))
        if not paths:
            raise UserError(
                f"benchmarks.{name}: no such file '{data_path}'; give a path or glob pattern, or"
                " the name of a data set of the Hugging Face hub"
            )
        for path in paths:
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(read_rows(path), 1))
        return
    column = _ROW_FORMATS[name].subject_column
    for config in _ROW_FORMATS[name].configs:
        subject = {column: config} if column else {}
        for n, row in enumerate(stream_hub(data_path, config, split), 1):
            yield f"{data_path} ({config}), row {n}", row | subject


def _item(
    name: BenchmarkName, row: Mapping[str, Any], location: str, counts: Counter[str], split: str
) -> BenchmarkItem:
    """The item of a row. `counts`: the items of each subject so far; this one is added."""
    columns = _ROW_FORMATS[name].columns
    for column in columns:
        if column not in row:
            raise UserError(
                f"{location}: no column '{column}'; {name} needs {', '.join(columns)},"
                f" and the row has {', '.join(row)}"
            )
    # The texts; `choices` and `answer` of MMLU are judged where they are parsed.
    for column in set(columns) - ({"choices", "answer"} if name == "mmlu_stem" else set()):
        read_text(row, column, location)
    try:
        subject, question, choices, solution = _ROW_FORMATS[name].parse(row)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    number = counts[subject]
    counts[subject] += 1
    parts = (name, *([subject] if subject else []), split, f"{number:05d}")
    item_id = read_label(row, "id", location) if "id" in row else "-".join(parts)
    return BenchmarkItem(
        item_id=item_id,
        subject=subject,
        level=str(row.get("level") or "") if name == "math" else "",
        question=question,
        choices=choices,
        solution=solution,
    )

"""Benchmarks as plain items: GSM8K, MATH and the STEM subjects of MMLU, from files or the hub."""

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from boltlm.corpus.sources import hub_rows, json_rows, parquet_rows
from boltlm.errors import UserError
from boltlm.params import section

LETTERS = "ABCD"
FILES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
MATH = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
STEM = (
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A question of a benchmark.

    `item_id`: the row's own `id`, or its kind, subject, split and number within the subject.
    `subject`: as the hub's configs are named; empty for GSM8K. `choices`: four in MMLU, else none.
    `solution`: the gold as the data set has it: GSM8K's whole `answer`, MATH's `solution`, MMLU's
    letter.
    """

    item_id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    solution: str


Parts = tuple[str, str, tuple[str, ...], str]  # subject, question, choices, solution


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """`columns`: those that each row must have; `configs`: those of the hub's data set, and
    `subject` the column that they stand for."""

    columns: tuple[str, ...]
    parts: Callable[[Mapping[str, Any]], Parts]
    configs: tuple[str, ...]
    subject: str | None


def _gsm8k(row: Mapping[str, Any]) -> Parts:
    return "", row["question"], (), row["answer"]


def _math(row: Mapping[str, Any]) -> Parts:
    subject = re.sub(r"\W+", "_", row["type"].lower().replace("&", "and"))
    if subject not in MATH:
        raise UserError(f"type '{row['type']}' is no subject of MATH ({', '.join(MATH)})")
    return subject, row["problem"], (), row["solution"]


def _mmlu(row: Mapping[str, Any]) -> Parts:
    choices, answer = tuple(row["choices"]), row["answer"]
    if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
        raise UserError(f"expected four choices and an answer 0 to 3, found {choices}, {answer!r}")
    return row["subject"], row["question"], choices, LETTERS[answer]


_KINDS = {
    "gsm8k": _Kind(columns=("question", "answer"), parts=_gsm8k, configs=("main",), subject=None),
    "math": _Kind(
        columns=("problem", "solution", "type"), parts=_math, configs=MATH, subject="type"
    ),
    "mmlu_stem": _Kind(
        columns=("question", "choices", "answer", "subject"),
        parts=_mmlu,
        configs=STEM,
        subject="subject",
    ),
}
KINDS = tuple(_KINDS)


def chosen(params: Mapping[str, Any]) -> dict[str, str]:
    """Params section `benchmarks`: kind → where it is read from. Raises UserError for another."""
    found = section(params, "benchmarks")
    if not isinstance(found, Mapping) or not all(isinstance(at, str) for at in found.values()):
        raise UserError(
            "params.yaml: benchmarks must map kinds to files or hub names ({}: none),"
            f" found {found!r}"
        )
    for kind in found:
        _kind(kind)
    return dict(found)


def items(kind: str, where: str, split: str = "test") -> Iterator[Item]:
    """The items of a benchmark in the order of its files, or of the hub's configs.

    `where`: a path or glob pattern of JSONL (also .gz) or Parquet, or a data set of the hub, of
    which `split` is read. Subjects of MMLU beyond STEM are passed over. Raises UserError where a
    file or column is missing, two items share an id, or there is none.
    """
    numbers: Counter[str] = Counter()
    seen: set[str] = set()
    for origin, row in _rows(kind, where, split):
        item = _item(kind, row, origin, numbers, split)
        if kind == "mmlu_stem" and item.subject not in STEM:
            continue
        if item.item_id in seen:
            raise UserError(f"{origin}: a second item has the id '{item.item_id}'")
        seen.add(item.item_id)
        yield item
    if not seen:
        raise UserError(f"benchmarks.{kind}: '{where}' holds no item of it")


def _kind(kind: str) -> _Kind:
    if kind not in _KINDS:
        raise UserError(f"params.yaml: unknown benchmark '{kind}'; known: {', '.join(KINDS)}")
    return _KINDS[kind]


def _rows(kind: str, where: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, for messages."""
    known = _kind(kind)
    if where.endswith(FILES):
        paths = sorted(glob.glob(where))
        if not paths:
            raise UserError(
                f"benchmarks.{kind}: no such file '{where}'; give a path or glob pattern, or a"
                " Hugging Face hub name"
            )
        for path in paths:
            rows = parquet_rows(path) if path.endswith(".parquet") else json_rows(path)
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
        return
    for config in known.configs:
        named = {known.subject: config} if known.subject else {}
        rows = hub_rows(where, config, split)
        yield from ((f"{where} ({config}), row {n}", row | named) for n, row in enumerate(rows, 1))


def _item(
    kind: str, row: Mapping[str, Any], origin: str, numbers: Counter[str], split: str
) -> Item:
    known = _kind(kind)
    for column in known.columns:
        if column not in row:
            raise UserError(
                f"{origin}: no column '{column}'; {kind} needs {', '.join(known.columns)},"
                f" and the row has {', '.join(row)}"
            )
    try:
        subject, question, choices, solution = known.parts(row)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    number = numbers[subject]
    numbers[subject] += 1
    parts = (kind, *([subject] if subject else []), split, f"{number:05d}")
    item_id = str(row["id"]) if "id" in row else "-".join(parts)
    return Item(
        item_id=item_id, subject=subject, question=question, choices=choices, solution=solution
    )

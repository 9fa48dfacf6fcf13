"""Benchmarks: the same items from every file format and from the hub, with unchanged solutions."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boltlm.corpus import benchmarks
from boltlm.corpus.benchmarks import (
    BENCHMARKS,
    MATH_SUBJECTS,
    STEM_SUBJECTS,
    BenchmarkItem,
    BenchmarkName,
    read_benchmark,
)
from boltlm.corpus.readers import DATA_FILE_TYPES
from boltlm.errors import UserError
from tests import tiny

Rows = list[dict[str, Any]]
GSM8K: Rows = [
    {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    {"question": "And now?", "answer": "#### 3"},
]
PROBLEMS: Rows = [
    {"problem": f"Find $x_{n}$.", "solution": f"\\boxed{{{n}}}", "level": "Level 5", "type": kind}
    for n, kind in enumerate(
        ["Counting & Probability", "Algebra", "Intermediate Algebra", "Algebra"]
    )
]
MMLU: Rows = [
    {"subject": subject, "question": f"{n}?", "choices": ["w", "x", "y", "z"], "answer": n % 4}
    for n, subject in enumerate(["anatomy", "philosophy", "astronomy", "anatomy"])
]
ROWS: dict[BenchmarkName, Rows] = {"gsm8k": GSM8K, "math": PROBLEMS, "mmlu_stem": MMLU}


def write(path: Path, rows: Rows) -> str:
    """Write the rows in the format that the path's suffix names; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_items_of_each_benchmark(tmp_path: Path) -> None:
    """Exactly, because graders and hashes use these strings. Subjects outside STEM are skipped."""
    items = {
        name: list(read_benchmark(name, write(tmp_path / f"{name}.jsonl", ROWS[name])))
        for name in BENCHMARKS
    }
    assert items["gsm8k"][0] == BenchmarkItem(
        item_id="gsm8k-test-00000",
        subject="",
        level="",
        question="How many?",
        choices=(),
        solution="1 + 1 = <<1+1=2>>2\n#### 2",
    )
    assert items["math"][0] == BenchmarkItem(
        item_id="math-counting_and_probability-test-00000",
        subject="counting_and_probability",
        level="Level 5",
        question="Find $x_0$.",
        choices=(),
        solution="\\boxed{0}",
    )
    assert items["mmlu_stem"][1] == BenchmarkItem(
        item_id="mmlu_stem-astronomy-test-00000",
        subject="astronomy",
        level="",
        question="2?",
        choices=("w", "x", "y", "z"),
        solution="C",
    )
    assert [item.item_id[-5:] for item in items["gsm8k"]] == ["00000", "00001"]
    subjects = ["counting_and_probability", "algebra", "intermediate_algebra", "algebra"]
    assert [item.subject for item in items["math"]] == subjects
    assert [item.item_id[-5:] for item in items["math"]] == ["00000", "00000", "00000", "00001"]
    assert [item.subject for item in items["mmlu_stem"]] == ["anatomy", "astronomy", "anatomy"]
    assert [item.solution for item in items["mmlu_stem"]] == ["A", "C", "D"]


@pytest.mark.parametrize("suffix", DATA_FILE_TYPES)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_file_format_gives_the_same_items(
    tmp_path: Path, name: BenchmarkName, suffix: str
) -> None:
    """Lists in Parquet and lists in JSON become the same choices."""
    expected = list(read_benchmark(name, write(tmp_path / "plain.jsonl", ROWS[name])))
    assert list(read_benchmark(name, write(tmp_path / f"other{suffix}", ROWS[name]))) == expected


def test_a_glob_pattern_is_one_data_set(tmp_path: Path) -> None:
    """MATH has one file for each subject; items are numbered across files."""
    expected = list(read_benchmark("math", write(tmp_path / "all.jsonl", PROBLEMS)))
    for index, row in enumerate(PROBLEMS):
        write(tmp_path / "parts" / f"{index}.jsonl", [row])
    assert list(read_benchmark("math", str(tmp_path / "parts" / "*.jsonl"))) == expected


def test_the_id_of_a_row_is_preserved(tmp_path: Path) -> None:
    """It does not depend on the other rows; two items with one id would be merged."""
    rows = [{**row, "id": f"row/{index}"} for index, row in enumerate(GSM8K)]
    items = read_benchmark("gsm8k", write(tmp_path / "a.jsonl", rows))
    assert [item.item_id for item in items] == ["row/0", "row/1"]
    with pytest.raises(UserError, match=r"a\.jsonl, row 3: .*'row/0'"):
        list(read_benchmark("gsm8k", write(tmp_path / "a.jsonl", [*rows, rows[0]])))


def test_a_revision_of_the_hub_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    """`<owner>/<name>@<revision>` pins a commit, tag or branch; without it the latest is read."""
    requests: list[tuple[str, str | None]] = []

    def load_dataset(name: str, *_: Any, revision: str | None, **__: Any) -> list[dict[str, Any]]:
        requests.append((name, revision))
        return ROWS["gsm8k"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pinned = list(read_benchmark("gsm8k", "some/name@0a1b2c"))
    assert pinned == list(read_benchmark("gsm8k", "some/name"))
    assert requests == [("some/name", "0a1b2c"), ("some/name", None)]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_read_config_by_config(
    name: BenchmarkName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub has one config for each subject, read in alphabetical order; the split is passed."""
    requests: list[tuple[str, str | None, str]] = []

    def stream_hub(dataset: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        requests.append((dataset, config, split))
        yield from (dict(row) for row in ROWS[name][:2])

    monkeypatch.setattr(benchmarks, "stream_hub", stream_hub)
    items = list(read_benchmark(name, "some/name", "train"))
    configs = {
        "gsm8k": ["main"],
        "math": sorted(MATH_SUBJECTS),
        "mmlu_stem": sorted(STEM_SUBJECTS),
    }[name]
    assert requests == [("some/name", config, "train") for config in configs]
    subjects = [""] if name == "gsm8k" else configs
    assert [item.subject for item in items] == [subject for subject in subjects for _ in range(2)]
    assert len({item.item_id for item in items}) == len(items)
    assert all("-train-" in item.item_id for item in items)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [GSM8K[0], {"question": "?"}], r"row 2: no column 'answer'.*has question"),
        ("math", [{"problem": "?", "solution": "!"}], r"row 1: no column 'type'"),
        ("math", [{**PROBLEMS[0], "type": "Topology"}], r"row 1: type 'Topology'.*prealgebra"),
        ("mmlu_stem", [{**MMLU[0], "answer": 4}], r"row 1: .*answer 0 to 3.*4"),
        ("mmlu_stem", [{**MMLU[0], "choices": ["x"]}], r"row 1: expected four choices"),
        ("mmlu_stem", [MMLU[1]], r"benchmarks\.mmlu_stem.*has no item"),
        ("gsm8k", [], r"benchmarks\.gsm8k.*has no item"),
    ],
)
def test_malformed_rows_are_named(
    tmp_path: Path, name: BenchmarkName, rows: Rows, message: str
) -> None:
    """With the row of the file, and what was expected there."""
    with pytest.raises(UserError, match=message):
        list(read_benchmark(name, write(tmp_path / "a.jsonl", rows)))


def test_a_missing_file_is_not_searched_on_the_hub(tmp_path: Path) -> None:
    """A wrong path must not end in a network error."""
    with pytest.raises(UserError, match=r"benchmarks\.math: no such file.*absent\.jsonl\.gz"):
        list(read_benchmark("math", str(tmp_path / "absent.jsonl.gz")))


def test_the_stem_subjects_are_those_of_lm_eval() -> None:
    """The average over subjects is then comparable with lm-eval's."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    subjects: list[str] = []
    for path in sorted(folder.glob("mmlu_*.yaml")):
        text = path.read_text("utf-8")
        if re.search(r"^tag: mmlu_flan_cot_fewshot_stem$", text, re.MULTILINE):
            subjects += re.findall(r"^dataset_name: (\w+)$", text, re.MULTILINE)
    assert list(STEM_SUBJECTS) == sorted(subjects)
    assert len(STEM_SUBJECTS) == 19


@pytest.mark.parametrize(
    ("name", "file_name", "count"),
    [("gsm8k", "gsm8k_test", 1319), ("mmlu_stem", "mmlu_stem_test", 3153)],
)
def test_the_original_sets_are_read_completely(
    name: BenchmarkName, file_name: str, count: int
) -> None:
    """As many items as the papers report, of every subject, each with a solution."""
    path = tiny.SHARED / "eval" / f"{file_name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} does not exist; it is not part of the repository")
    items = list(read_benchmark(name, str(path)))
    assert len({item.item_id for item in items}) == len(items) == count
    if name == "gsm8k":
        assert all("\n#### " in item.solution for item in items)
    else:
        assert set(Counter(item.subject for item in items)) == set(STEM_SUBJECTS)
        assert {item.solution for item in items} == set("ABCD")

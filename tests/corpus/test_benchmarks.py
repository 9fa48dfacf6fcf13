"""Benchmarks: the same items from every kind of file and from the hub, each gold as it is given."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boltlm.corpus import benchmarks
from boltlm.corpus.benchmarks import KINDS, MATH, STEM, Item, items
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
ROWS = {"gsm8k": GSM8K, "math": PROBLEMS, "mmlu_stem": MMLU}


def write(path: Path, rows: Rows) -> str:
    """The rows as the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def test_items_of_each_kind(tmp_path: Path) -> None:
    """To the letter: graders and hashes work on these strings. What is beyond STEM is no item."""
    found = {
        kind: list(items(kind, write(tmp_path / f"{kind}.jsonl", ROWS[kind]))) for kind in KINDS
    }
    assert found["gsm8k"][0] == Item(
        item_id="gsm8k-test-00000",
        subject="",
        question="How many?",
        choices=(),
        solution="1 + 1 = <<1+1=2>>2\n#### 2",
    )
    assert found["math"][0] == Item(
        item_id="math-counting_and_probability-test-00000",
        subject="counting_and_probability",
        question="Find $x_0$.",
        choices=(),
        solution="\\boxed{0}",
    )
    assert found["mmlu_stem"][1] == Item(
        item_id="mmlu_stem-astronomy-test-00000",
        subject="astronomy",
        question="2?",
        choices=("w", "x", "y", "z"),
        solution="C",
    )
    assert [one.item_id[-5:] for one in found["gsm8k"]] == ["00000", "00001"]
    subjects = ["counting_and_probability", "algebra", "intermediate_algebra", "algebra"]
    assert [one.subject for one in found["math"]] == subjects
    assert [one.item_id[-5:] for one in found["math"]] == ["00000", "00000", "00000", "00001"]
    assert [one.subject for one in found["mmlu_stem"]] == ["anatomy", "astronomy", "anatomy"]
    assert [one.solution for one in found["mmlu_stem"]] == ["A", "C", "D"]


@pytest.mark.parametrize("ending", benchmarks.FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_the_same_items(tmp_path: Path, kind: str, ending: str) -> None:
    """Parquet's lists and JSON's are read alike."""
    wanted = list(items(kind, write(tmp_path / "plain.jsonl", ROWS[kind])))
    assert list(items(kind, write(tmp_path / f"other{ending}", ROWS[kind]))) == wanted


def test_a_glob_pattern_is_one_data_set(tmp_path: Path) -> None:
    """MATH comes as a file a subject; numbers go on from file to file."""
    whole = list(items("math", write(tmp_path / "whole.jsonl", PROBLEMS)))
    for index, row in enumerate(PROBLEMS):
        write(tmp_path / "parts" / f"{index}.jsonl", [row])
    assert list(items("math", str(tmp_path / "parts" / "*.jsonl"))) == whole


def test_a_row_keeps_its_own_id(tmp_path: Path) -> None:
    """It is the same whatever else the file holds; two of one id would be taken for one item."""
    rows = [{**row, "id": f"own/{index}"} for index, row in enumerate(GSM8K)]
    found = items("gsm8k", write(tmp_path / "a.jsonl", rows))
    assert [one.item_id for one in found] == ["own/0", "own/1"]
    with pytest.raises(UserError, match=r"a\.jsonl, row 3: .*'own/0'"):
        list(items("gsm8k", write(tmp_path / "a.jsonl", [*rows, rows[0]])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_is_read_config_by_config(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has a config a subject, in alphabetical order here; the split is handed on."""
    asked: list[tuple[str, str | None, str]] = []

    def hub_rows(name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
        asked.append((name, config, split))
        yield from (dict(row) for row in ROWS[kind][:2])

    monkeypatch.setattr(benchmarks, "hub_rows", hub_rows)
    found = list(items(kind, "some/name", "train"))
    configs = {"gsm8k": ["main"], "math": sorted(MATH), "mmlu_stem": sorted(STEM)}[kind]
    assert asked == [("some/name", config, "train") for config in configs]
    subjects = [""] if kind == "gsm8k" else configs
    assert [one.subject for one in found] == [subject for subject in subjects for _ in range(2)]
    assert len({one.item_id for one in found}) == len(found)
    assert all("-train-" in one.item_id for one in found)


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        ("gsm8k", [GSM8K[0], {"question": "?"}], r"row 2: no column 'answer'.*has question"),
        ("math", [{"problem": "?", "solution": "!"}], r"row 1: no column 'type'"),
        ("math", [{**PROBLEMS[0], "type": "Topology"}], r"row 1: type 'Topology'.*prealgebra"),
        ("mmlu_stem", [{**MMLU[0], "answer": 4}], r"row 1: .*answer 0 to 3.*4"),
        ("mmlu_stem", [{**MMLU[0], "choices": ["x"]}], r"row 1: expected four choices"),
        ("mmlu_stem", [MMLU[1]], r"benchmarks\.mmlu_stem.*holds no item"),
        ("gsm8k", [], r"benchmarks\.gsm8k.*holds no item"),
        ("arc", GSM8K, r"unknown benchmark 'arc'; known: gsm8k, math, mmlu_stem"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, kind: str, rows: Rows, said: str) -> None:
    """Somebody else's file, with the row and what to do."""
    with pytest.raises(UserError, match=said):
        list(items(kind, write(tmp_path / "a.jsonl", rows)))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    """A mistaken path must not end in a network error."""
    with pytest.raises(UserError, match=r"benchmarks\.math: no such file.*absent\.jsonl\.gz"):
        list(items("math", str(tmp_path / "absent.jsonl.gz")))


def test_the_section_of_params_is_checked() -> None:
    """Before anything is read."""
    assert benchmarks.chosen({"benchmarks": {}}) == {}
    assert benchmarks.chosen({"benchmarks": {"math": "a/b"}}) == {"math": "a/b"}
    for wrong in (None, ["math"], {"math": None}):
        with pytest.raises(UserError, match="benchmarks must map kinds"):
            benchmarks.chosen({"benchmarks": wrong})
    with pytest.raises(UserError, match="unknown benchmark 'mmlu'"):
        benchmarks.chosen({"benchmarks": {"mmlu": "a/b"}})


def test_stem_is_what_lm_eval_takes_for_it() -> None:
    """Our average over subjects is theirs."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    found: list[str] = []
    for path in sorted(folder.glob("mmlu_*.yaml")):
        text = path.read_text("utf-8")
        if re.search(r"^tag: mmlu_flan_cot_fewshot_stem$", text, re.MULTILINE):
            found += re.findall(r"^dataset_name: (\w+)$", text, re.MULTILINE)
    assert list(STEM) == sorted(found)
    assert len(STEM) == 19


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [("gsm8k", "gsm8k_test", 1319), ("mmlu_stem", "mmlu_stem_test", 3153)],
)
def test_the_real_sets_are_read_whole(kind: str, name: str, count: int) -> None:
    """As many items as their papers say, of every subject, and a gold for each."""
    path = tiny.SHARED / "eval" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    found = list(items(kind, str(path)))
    assert len({one.item_id for one in found}) == len(found) == count
    if kind == "gsm8k":
        assert all("\n#### " in one.solution for one in found)
    else:
        assert set(Counter(one.subject for one in found)) == set(STEM)
        assert {one.solution for one in found} == set("ABCD")

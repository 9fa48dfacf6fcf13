"""Params: a wrong key or value is an error that names it, and nothing is made up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from boltlm.errors import UserError
from boltlm.params import build, load, section


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    kind: Literal["plain", "fancy"]
    inner: Inner
    count: int | None
    names: tuple[str, ...]
    others: dict[str, Inner]
    free: dict[str, Any]
    flag: bool

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 0:
            raise UserError(f"count must be 0 or more, found {self.count}")


GOOD: dict[str, Any] = {
    "kind": "plain",
    "inner": {"size": 3, "rate": 0.5},
    "count": None,
    "names": ["a", "b"],
    "others": {"x": {"size": 1, "rate": 2}},
    "free": {"anything": [1, "two"]},
    "flag": True,
}


def test_a_section_becomes_its_dataclass() -> None:
    """Nested sections, lists and mappings included; a whole number is a fine float."""
    made = build(Outer, GOOD, "outer")
    assert made == Outer(
        kind="plain",
        inner=Inner(size=3, rate=0.5),
        count=None,
        names=("a", "b"),
        others={"x": Inner(size=1, rate=2.0)},
        free={"anything": [1, "two"]},
        flag=True,
    )
    assert isinstance(made.others["x"].rate, float)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(key: str) -> None:
    """There are no defaults in code: a number that is nowhere is an error, not a guess."""
    values = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(UserError, match=rf"params\.yaml: missing key outer\.{key}$"):
        build(Outer, values, "outer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sise": 1}, r"unknown key outer\.sise; known here: kind, inner"),
        ({"inner": {"size": 3, "rate": 1, "x": 1}}, r"unknown key outer\.inner\.x"),
        ({"inner": {"size": 3}}, r"missing key outer\.inner\.rate"),
        ({"inner": 3}, r"outer\.inner must be a mapping, found 3"),
        (
            {"inner": {"size": 3.5, "rate": 1}},
            r"outer\.inner\.size must be of type int, found 3\.5",
        ),
        ({"inner": {"size": True, "rate": 1}}, r"outer\.inner\.size must be of type int"),
        ({"inner": {"size": 3, "rate": True}}, r"outer\.inner\.rate must be of type float"),
        ({"inner": {"size": 3, "rate": "1e-4"}}, r"outer\.inner\.rate .* float, found '1e-4'"),
        (
            {"inner": {"size": None, "rate": 1}},
            r"outer\.inner\.size must be of type int, found None",
        ),
        ({"kind": "odd"}, r"outer\.kind must be plain \| fancy, found 'odd'"),
        ({"count": "many"}, r"outer\.count must be of type int, found 'many'"),
        ({"names": "a"}, r"outer\.names must be"),
        ({"names": ["a", 2]}, r"outer\.names\[1\] must be of type str, found 2"),
        ({"others": {"x": {"size": 1}}}, r"missing key outer\.others\.x\.rate"),
        ({"others": [1]}, r"outer\.others must be"),
        ({"free": None}, r"outer\.free must be"),
        ({"flag": 1}, r"outer\.flag must be of type bool, found 1"),
        ({"count": -1}, r"outer: count must be 0 or more, found -1"),
    ],
)
def test_a_wrong_value_names_its_key(change: dict[str, Any], message: str) -> None:
    """The message is all that a user of a long params.yaml has to go by."""
    with pytest.raises(UserError, match=message):
        build(Outer, {**GOOD, **change}, "outer")


def test_values_that_are_no_mapping_are_an_error() -> None:
    """A section left empty in YAML is None."""
    with pytest.raises(UserError, match="outer must be a mapping, found None"):
        build(Outer, None, "outer")


def test_section_walks_dotted_keys() -> None:
    """A missing step names the whole key and what is there instead."""
    params = {"a": {"b": {"c": 0}, "d": None}}
    assert section(params, "a.b.c") == 0
    assert section(params, "a.d") is None
    for key, message in (
        ("a.x", r"no key 'a\.x' \(a has: b, d\)"),
        ("x", r"no key 'x' \(params\.yaml has: a\)"),
        ("a.b.c.d", r"no key 'a\.b\.c\.d' \(a\.b\.c has: nothing\)"),
        ("a.d.e", r"no key 'a\.d\.e'"),
    ):
        with pytest.raises(UserError, match=message):
            section(params, key)


def test_load_reads_a_mapping(tmp_path: Path) -> None:
    """A file that is absent, broken or something else is named."""
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError, match=r"params\.yaml: no such params file"):
        load(path)
    path.write_text("a: {b: 1}\n", encoding="utf-8")
    assert load(path) == {"a": {"b": 1}}
    for text, message in (("a: [", "not YAML"), ("- a\n", "found list"), ("", "found NoneType")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load(path)

"""What the values of params.yaml may be, as types of the fields of settings.

    PositiveInt                                     1, 2, …
    Annotated[float, Above(0), AtMost(1)]           a number in (0, 1]
    Annotated[tuple[str, ...], Distinct()]          a list without duplicates
    Annotated[str, NewName("base")]                 the name that an entry gets, but not "base"
    Annotated[str, EntryName("models", "base")]     the name of an entry of `models`, or "base"
    Annotated[str, EntryPath(latents="latents")]    latents/<an entry of `latents`>
    Annotated[TrainConfig, Overlay("train")]        the section `train` with some keys changed

`boltlm.params` checks values against them, so every stage and `boltlm check` do.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The least value that a number may have."""

    minimum: float

    def allows(self, value: Any) -> bool:
        return value >= self.minimum


@dataclass(frozen=True, slots=True)
class Above:
    """A value that a number must exceed."""

    minimum: float

    def allows(self, value: Any) -> bool:
        return value > self.minimum


@dataclass(frozen=True, slots=True)
class AtMost:
    """The greatest value that a number may have."""

    maximum: float

    def allows(self, value: Any) -> bool:
        return value <= self.maximum


@dataclass(frozen=True, slots=True)
class Below:
    """A value that a number must stay under."""

    maximum: float

    def allows(self, value: Any) -> bool:
        return value < self.maximum


Bound = AtLeast | Above | AtMost | Below


def describe_bounds(bounds: Iterable[Bound]) -> str:
    """Bounds as words: "1 or more", "above 0", "in [0, 1)"."""
    low = next((bound for bound in bounds if isinstance(bound, AtLeast | Above)), None)
    high = next((bound for bound in bounds if isinstance(bound, AtMost | Below)), None)
    if low and high:
        left, right = (
            "[" if isinstance(low, AtLeast) else "(",
            "]" if isinstance(high, AtMost) else ")",
        )
        return f"in {left}{low.minimum}, {high.maximum}{right}"
    if low:
        return f"{low.minimum} or more" if isinstance(low, AtLeast) else f"above {low.minimum}"
    assert high is not None
    return f"{high.maximum} or less" if isinstance(high, AtMost) else f"below {high.maximum}"


@dataclass(frozen=True, slots=True)
class Distinct:
    """A list in which nothing occurs twice."""


@dataclass(frozen=True, slots=True)
class NonEmpty:
    """A text or a list that has something in it."""


@dataclass(frozen=True, slots=True, init=False)
class EntryName:
    """A string that names an entry of a section of params.yaml, or is one of `others`."""

    section: str
    others: tuple[str, ...]

    def __init__(self, section: str, *others: str) -> None:
        object.__setattr__(self, "section", section)
        object.__setattr__(self, "others", others)


@dataclass(frozen=True, slots=True, init=False)
class EntryPath:
    """A string `<folder>/<entry>`, where the entry belongs to the section of that folder."""

    sections: Mapping[str, str]

    def __init__(self, **sections: str) -> None:
        object.__setattr__(self, "sections", sections)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A mapping that changes keys of a section, nested mappings key by key. One of another `kind`
    than the section stands alone."""

    section: str


@dataclass(frozen=True, slots=True, init=False)
class NewName:
    """A name that the user gives to an entry. It becomes part of paths and of shell commands, so it
    is a letter followed by letters, digits, - and _. `reserved` names have another meaning."""

    reserved: tuple[str, ...]

    def __init__(self, *reserved: str) -> None:
        object.__setattr__(self, "reserved", reserved)

    def allows(self, text: str) -> bool:
        """Whether an entry may have this name."""
        return _NAME.fullmatch(text) is not None and text not in self.reserved

    def describe(self) -> str:
        """What is allowed, in words."""
        but = f", and not {' or '.join(self.reserved)}" if self.reserved else ""
        return f"a letter followed by letters, digits, - and _{but}"


@dataclass(frozen=True, slots=True)
class InShellCommand:
    """A text that dvc.yaml puts into a shell command between single quotes."""

    def allows(self, text: str) -> bool:
        """Whether it has nothing that would end the quotation or the line."""
        return not set(text) & set("'\n\r\0")


NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
Fraction = Annotated[float, AtLeast(0), AtMost(1)]  # [0, 1]
PositiveFraction = Annotated[float, Above(0), AtMost(1)]  # (0, 1]
ProperFraction = Annotated[float, AtLeast(0), Below(1)]  # [0, 1)
Text = Annotated[str, NonEmpty()]
Name = Annotated[str, NewName()]  # of an entry
CommandText = Annotated[str, NonEmpty(), InShellCommand()]  # a path in a command of dvc.yaml
Precision = Literal["float32", "bfloat16"]  # floating-point type of weights or of arithmetic

"""A value of params.yaml becomes what the type of a settings field wants, or a finding."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from boltlm.errors import UserError
from boltlm.param_types import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Distinct,
    EntryName,
    EntryPath,
    InShellCommand,
    NewName,
    NonEmpty,
    Overlay,
    describe_bounds,
)

_T = TypeVar("_T")
_MAX_INT = 2**63 - 1  # of Arrow, torch and SQLite


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong in params: the key (empty where the message names keys itself), the words
    before it, and those after it."""

    key: str
    after: str
    before: str = ""

    def __str__(self) -> str:
        return f"{self.before}{self.key}{self.after}"


class ParamsError(UserError):
    """What is wrong in params, one line for each finding."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(dict.fromkeys(findings))
        super().__init__("\n".join(f"params.yaml: {finding}" for finding in self.findings))


def each(conversions: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """The results of all conversions. Raises ParamsError with the findings of all that fail."""
    values: dict[Any, Any] = {}
    findings: list[Finding] = []
    for key, convert in conversions.items():
        try:
            values[key] = convert()
        except ParamsError as error:
            findings += error.findings
    if findings:
        raise ParamsError(findings)
    return values


def _refusal(where: str, after: str, *, before: str = "") -> ParamsError:
    return ParamsError([Finding(where, after, before)])


def lookup(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            inside = ".".join(walked) or "params.yaml"
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "nothing"
            raise _refusal(key, f"' ({inside} has: {known})", before="no key '")
        value = value[part]
        walked.append(part)
    return value


def build(
    kind: type[_T], values: Any, where: str, params: Mapping[str, Any] = types.MappingProxyType({})
) -> _T:
    """The dataclass `kind` from the mapping at the key `where`, every field and no more. `params`:
    the whole file, in which names and overlays are looked up. Raises ParamsError as
    `build_settings` does."""
    if not isinstance(values, Mapping):
        raise _refusal(where, f" must be a mapping, found {values!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    known = ", ".join(hints)
    findings = [
        Finding(f"{where}.{key}", f"; known here: {known}", "unknown key ")
        for key in values
        if key not in hints
    ]
    findings += [
        Finding(f"{where}.{key}", "", "missing key ") for key in hints if key not in values
    ]
    try:
        converted = each(
            {
                key: lambda key=key: convert(hints[key], values[key], f"{where}.{key}", params)
                for key in values
                if key in hints
            }
        )
    except ParamsError as error:
        raise ParamsError([*findings, *error.findings]) from error
    if findings:
        raise ParamsError(findings)
    try:
        return kind(**converted)
    except UserError as error:
        raise _refusal(where, f": {error}") from error


def convert(hint: Any, value: Any, where: str, params: Mapping[str, Any]) -> Any:
    """`value`, found at the key `where`, as the type `hint` wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(hint, value, where, params)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where, params)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = " | ".join(map(str, arguments))
            raise _refusal(where, f" must be {allowed}, found {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        items = {
            index: lambda index=index, item=item: convert(
                arguments[0], item, f"{where}[{index}]", params
            )
            for index, item in enumerate(value)
        }
        return tuple(each(items).values())
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key_type, value_type = arguments
        names = {
            key: lambda key=key: convert(key_type, key, f"a key of {where}", params)
            for key in value
        }
        entries = {
            key: lambda key=key, item=item: convert(value_type, item, f"{where}.{key}", params)
            for key, item in value.items()
        }
        each({(0, key): convert for key, convert in names.items()})
        return each(entries)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, params)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _MAX_INT:
        raise _refusal(where, f" must be below 2^63 in size, found {_shortened(value)}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(hint, type) and isinstance(value, hint)
    if fits and not (hint in (int, float) and isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise _refusal(where, f" must be a finite number, found {value!r}")
        if isinstance(value, str) and not value.isascii():
            _check_text(value, where)
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise _refusal(where, f" must be of type {expected}, found {_shortened(value)}")


def _check_text(value: str, where: str) -> None:
    """Raises ParamsError for a text without a UTF-8 encoding: half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refusal(where, f" has half of a surrogate pair, found {value!r}") from None


def _shortened(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**40:  # Python writes no more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _union(options: tuple[Any, ...], value: Any, where: str, params: Mapping[str, Any]) -> Any:
    """A value or None, or one of several dataclasses, told apart by their `kind`."""
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    if len(options) == 1:
        return convert(options[0], value, where, params)
    by_kind = {
        kind: option
        for option in options
        for kind in typing.get_args(typing.get_type_hints(option)["kind"])
    }
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in by_kind:
        allowed = " | ".join(by_kind)
        raise _refusal(f"{where}.kind", f" must be {allowed}, found {kind!r}")
    return build(by_kind[kind], value, where, params)


def _annotated(hint: Any, value: Any, where: str, params: Mapping[str, Any]) -> Any:
    overlays = [extra for extra in hint.__metadata__ if isinstance(extra, Overlay)]
    if overlays:
        (overlay,) = overlays
        merged = _overlaid(overlay.section, value, where, params)
        try:
            return convert(hint.__origin__, merged, where, params)
        except ParamsError as error:
            if merged is value:  # of another kind than the section, so none of it comes from there
                raise
            origins = [_at_its_origin(f, where, value, overlay.section) for f in error.findings]
            raise ParamsError(origins) from error
    converted = convert(hint.__origin__, value, where, params)
    bounds = [x for x in hint.__metadata__ if isinstance(x, AtLeast | Above | AtMost | Below)]
    if not all(bound.allows(converted) for bound in bounds):
        raise _refusal(where, f" must be {describe_bounds(bounds)}, found {value!r}")
    for extra in hint.__metadata__:
        _check_extra(extra, converted, where, params)
    return converted


def _check_extra(extra: Any, value: Any, where: str, params: Mapping[str, Any]) -> None:
    """Raises ParamsError where a value is not what one remark on its type allows."""
    if isinstance(extra, NonEmpty) and not value:
        raise _refusal(where, f" must not be empty, found {value!r}")
    if isinstance(extra, Distinct) and len(set(value)) < len(value):
        double = next(item for index, item in enumerate(value) if item in value[:index])
        raise _refusal(where, f" must not list anything twice, found {double!r} twice")
    if isinstance(extra, NewName) and not extra.allows(value):
        raise _refusal(where, f" must be {extra.describe()}, found {value!r}")
    if isinstance(extra, InShellCommand) and not extra.allows(value):
        raise _refusal(where, f" must have no ' and no line break in it, found {value!r}")
    if isinstance(extra, EntryName):
        known = [*extra.others, *_entries(params, extra.section)]
        if value not in known:
            raise _refusal(
                where,
                f" must name an entry of {extra.section} ({', '.join(map(str, known))}),"
                f" found {value!r}",
            )
    if isinstance(extra, EntryPath):
        folder, _, entry = value.partition("/")
        if folder not in extra.sections:
            forms = (f"{name}/<entry of {section}>" for name, section in extra.sections.items())
            raise _refusal(where, f" must be {' | '.join(forms)}, found {value!r}")
        known = _entries(params, extra.sections[folder])
        if entry not in known:
            raise _refusal(
                where,
                f" names {value!r}, but {extra.sections[folder]} has no entry '{entry}'"
                f" (it has: {', '.join(map(str, known))})",
            )


def _entries(params: Mapping[str, Any], section: str) -> list[Any]:
    """The names of the entries of a section; none where it is not a mapping, as is said there."""
    value = lookup(params, section)
    return list(value) if isinstance(value, Mapping) else []


def _at_its_origin(finding: Finding, where: str, override: Any, section: str) -> Finding:
    """A finding in a mapping that completes a section: at the section, unless the override, which
    stands at the key `where`, sets the key itself."""
    key = finding.key
    if key != where and not key.startswith(f"{where}."):
        return finding
    rest = key[len(where) + 1 :]
    value = override
    for part in filter(None, rest.partition("[")[0].split(".")):
        if not isinstance(value, Mapping) or part not in value:
            return dataclasses.replace(finding, key=f"{section}.{rest}")
        value = value[part]
    return finding if rest or override else dataclasses.replace(finding, key=section)


def _overlaid(section: str, override: Any, where: str, params: Mapping[str, Any]) -> Any:
    base = lookup(params, section)
    if not isinstance(override, Mapping) or not isinstance(base, Mapping):
        raise _refusal(where, f" must be a mapping ({{}}: as `{section}`), found {override!r}")
    if override.get("kind", base.get("kind")) != base.get("kind"):
        return override
    return _merged(base, override)


def _merged(base: Any, changes: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}

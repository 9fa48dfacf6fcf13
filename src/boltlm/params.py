"""params.yaml → frozen dataclasses; an unknown, missing or ill-typed key is an error by name."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from boltlm.errors import UserError

T = TypeVar("T")


def load(path: Path) -> dict[str, Any]:
    """The whole of a params file. Raises UserError when it is missing or not a mapping."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file; run from the repository's root") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(params).__name__}")
    return params


def section(params: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key. Raises UserError naming the key where it is missing."""
    value: Any = params
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            inside = ".".join(walked) or "params.yaml"
            known = ", ".join(map(str, value)) if isinstance(value, Mapping) else "nothing"
            raise UserError(f"params.yaml: no key '{key}' ({inside} has: {known})")
        value = value[part]
        walked.append(part)
    return value


def build(kind: type[T], values: Any, where: str) -> T:
    """Make the dataclass `kind` of the mapping `values`, found at the params key `where`.

    Nested dataclasses, `X | None`, tuples (from lists) and dicts of dataclasses are followed.
    Raises UserError naming the key when it is unknown, missing or of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"params.yaml: {where} must be a mapping, found {values!r}")
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in fields:
            known = ", ".join(fields)
            raise UserError(f"params.yaml: unknown key {where}.{key}; known here: {known}")
    for name in fields:
        if name not in values:
            raise UserError(f"params.yaml: missing key {where}.{name}")
    made = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return kind(**made)
    except UserError as error:
        raise UserError(f"params.yaml: {where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = " | ".join(map(str, arguments))
            raise UserError(f"params.yaml: {where} must be {allowed}, found {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint in (int, float) and isinstance(value, bool))
    ):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UserError(f"params.yaml: {where} must be of type {wanted}, found {value!r}")

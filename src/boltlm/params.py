"""params.yaml becomes frozen settings: one dataclass for each stage, built where the stage starts.

Each field is read from the key of its own name or from that of `from_key("latents.{name}")`, in
which `{name}` is the entry that the stage works on, as is a field `name`. Types say what may be:

    Annotated[str, EntryName("models", "base")]     the name of an entry of `models`, or "base"
    Annotated[str, EntryPath(latents="latents")]    latents/<an entry of `latents`>
    Annotated[TrainConfig, Overlay("train")]        the section `train` with some keys changed

Anything else is a UserError that names the key, the value and what is allowed.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from boltlm.errors import UserError

_T = TypeVar("_T")
_KEY = "params_key"


@dataclass(frozen=True, slots=True)
class AtLeast:
    """The least value that a number may have."""

    minimum: float


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


NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveInt = Annotated[int, AtLeast(1)]
Precision = Literal["float32", "bfloat16"]  # floating-point type of weights or of arithmetic


def from_key(key: str) -> Any:
    """A settings field that is read from this key of params.yaml."""
    return dataclasses.field(metadata={_KEY: key})


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


def load_settings(kind: type[_T], path: Path, *, name: str = "") -> _T:
    """`build_settings` of a params file. `name`: the entry that the stage works on."""
    return build_settings(kind, load(path), name=name)


def build_settings(kind: type[_T], params: Mapping[str, Any], *, name: str = "") -> _T:
    """The settings dataclass `kind` from params as they were read. Raises UserError naming the key
    where it is missing, ill-typed, or names an entry that params do not have."""
    hints = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {"name": name} if "name" in hints else {}
    for field, key in _field_keys(kind):
        where = key.format(name=name)
        values[field] = _convert(hints[field], _lookup(params, where), where, params)
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"params.yaml: {error}") from error


def settings_keys(kind: type[Any]) -> set[str]:
    """The keys of params.yaml whose values a settings dataclass holds, `{name}` unfilled: what a
    stage depends on. Sections that are only looked up to check a name are not among them."""
    keys = {key for _, key in _field_keys(kind)}
    return keys | {overlay.section for overlay in _overlays(kind)}


def flatten_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested params as dotted keys with their values as text; lists as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten_params(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def require_positive(config: object, *names: str) -> None:
    """Raises UserError where one of the named fields is 0 or less; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} must be above 0, found {value}")


def _field_keys(kind: type[Any]) -> list[tuple[str, str]]:
    """Each field of a settings dataclass but `name`, with its key."""
    fields = dataclasses.fields(typing.cast(Any, kind))
    return [(f.name, f.metadata.get(_KEY, f.name)) for f in fields if f.name != "name"]


def _overlays(hint: Any) -> Iterable[Overlay]:
    """The overlays in a type and in the dataclasses that it is made of."""
    if typing.get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Overlay))
    for inner in typing.get_args(hint):
        yield from _overlays(inner)
    if dataclasses.is_dataclass(hint):
        for inner in typing.get_type_hints(hint, include_extras=True).values():
            yield from _overlays(inner)


def _lookup(params: Mapping[str, Any], key: str) -> Any:
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


def build(
    kind: type[_T], values: Any, where: str, params: Mapping[str, Any] = types.MappingProxyType({})
) -> _T:
    """The dataclass `kind` from the mapping at the key `where`, every field and no more. `params`:
    the whole file, in which names and overlays are looked up. Raises UserError as
    `build_settings` does."""
    if not isinstance(values, Mapping):
        raise UserError(f"params.yaml: {where} must be a mapping, found {values!r}")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in values:
        if key not in hints:
            known = ", ".join(hints)
            raise UserError(f"params.yaml: unknown key {where}.{key}; known here: {known}")
    for key in hints:
        if key not in values:
            raise UserError(f"params.yaml: missing key {where}.{key}")
    converted = {
        key: _convert(hints[key], value, f"{where}.{key}", params) for key, value in values.items()
    }
    try:
        return kind(**converted)
    except UserError as error:
        raise UserError(f"params.yaml: {where}: {error}") from error


def _convert(hint: Any, value: Any, where: str, params: Mapping[str, Any]) -> Any:
    """`value`, found at the key `where`, as the type `hint` wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(hint, value, where, params)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where, params)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = " | ".join(map(str, arguments))
            raise UserError(f"params.yaml: {where} must be {allowed}, found {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(
            _convert(arguments[0], item, f"{where}[{index}]", params)
            for index, item in enumerate(value)
        )
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            _convert(arguments[0], key, f"a key of {where}", params): _convert(
                arguments[1], item, f"{where}.{key}", params
            )
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, params)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(hint, type) and isinstance(value, hint)
    if fits and not (hint in (int, float) and isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"params.yaml: {where} must be a finite number, found {value!r}")
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UserError(f"params.yaml: {where} must be of type {expected}, found {value!r}")


def _union(options: tuple[Any, ...], value: Any, where: str, params: Mapping[str, Any]) -> Any:
    """A value or None, or one of several dataclasses, told apart by their `kind`."""
    if value is None and types.NoneType in options:
        return None
    options = tuple(option for option in options if option is not types.NoneType)
    if len(options) == 1:
        return _convert(options[0], value, where, params)
    by_kind = {
        kind: option
        for option in options
        for kind in typing.get_args(typing.get_type_hints(option)["kind"])
    }
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind not in by_kind:
        allowed = " | ".join(by_kind)
        raise UserError(f"params.yaml: {where}.kind must be {allowed}, found {kind!r}")
    return build(by_kind[kind], value, where, params)


def _annotated(hint: Any, value: Any, where: str, params: Mapping[str, Any]) -> Any:
    for extra in hint.__metadata__:
        if isinstance(extra, Overlay):
            value = _overlaid(extra.section, value, where, params)
    converted = _convert(hint.__origin__, value, where, params)
    for extra in hint.__metadata__:
        if isinstance(extra, AtLeast) and converted < extra.minimum:
            raise UserError(
                f"params.yaml: {where} must be {extra.minimum} or more, found {value!r}"
            )
        if isinstance(extra, EntryName):
            known = [*extra.others, *_lookup(params, extra.section)]
            if converted not in known:
                raise UserError(
                    f"params.yaml: {where} must name an entry of {extra.section}"
                    f" ({', '.join(known)}), found {value!r}"
                )
        if isinstance(extra, EntryPath):
            _check_path(extra, converted, where, params)
    return converted


def _check_path(paths: EntryPath, value: str, where: str, params: Mapping[str, Any]) -> None:
    """Raises UserError where `value` is not a known folder and an entry of its section."""
    folder, _, entry = value.partition("/")
    if folder not in paths.sections:
        allowed = " | ".join(f"{folder}/<entry of {of}>" for folder, of in paths.sections.items())
        raise UserError(f"params.yaml: {where} must be {allowed}, found {value!r}")
    known = _lookup(params, paths.sections[folder])
    if entry not in known:
        raise UserError(
            f"params.yaml: {where} names {value!r}, but {paths.sections[folder]} has no entry"
            f" '{entry}' (it has: {', '.join(known)})"
        )


def _overlaid(section: str, override: Any, where: str, params: Mapping[str, Any]) -> Any:
    base = _lookup(params, section)
    if not isinstance(override, Mapping) or not isinstance(base, Mapping):
        raise UserError(f"params.yaml: {where} must be a mapping ({{}}: as `{section}`)")
    if override.get("kind", base.get("kind")) != base.get("kind"):
        return override
    return _merged(base, override)


def _merged(base: Any, changes: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**base, **{key: _merged(base.get(key), value) for key, value in changes.items()}}

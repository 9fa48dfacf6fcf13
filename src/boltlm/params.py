"""params.yaml becomes frozen settings: one dataclass for each stage, built where the stage starts.

Each field is read from the key of its own name or from that of `from_key("latents.{name}")`, in
which `{name}` is the entry that the stage works on, as is a field `name`. Its type says what may be
there (`boltlm.param_types`). Anything else is a ParamsError, whose findings name the key, the value
and what is allowed: all that are wrong, not only the first.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml

from boltlm.errors import UserError
from boltlm.param_types import Overlay
from boltlm.param_values import Finding, ParamsError, convert, each, lookup

_T = TypeVar("_T")
_KEY = "params_key"


def from_key(key: str) -> Any:
    """A settings field that is read from this key of params.yaml."""
    return dataclasses.field(metadata={_KEY: key})


class _StrictSafeLoader(yaml.SafeLoader):
    """YAML without duplicate keys, of which the last would win in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, value in enumerate(values):
            if value in values[:index]:
                where = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key '{value}' twice", problem_mark=where)
        return super().construct_mapping(node, deep)


def load(path: Path) -> dict[str, Any]:
    """The whole of a params file. Raises UserError when it is missing, is not YAML in UTF-8, has a
    key twice, or is not a mapping."""
    try:
        params = yaml.load(path.read_text(encoding="utf-8"), _StrictSafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such params file; run from the repository's root") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); save it"
            " with the encoding UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not YAML: {reason}") from error
    if not isinstance(params, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(params).__name__}")
    return params


def load_settings(kind: type[_T], path: Path, *, name: str = "") -> _T:
    """`build_settings` of a params file. `name`: the entry that the stage works on."""
    return build_settings(kind, load(path), name=name)


def build_settings(kind: type[_T], params: Mapping[str, Any], *, name: str = "") -> _T:
    """The settings dataclass `kind` from params as they were read. Raises ParamsError naming the
    keys that are missing, ill-typed, out of range, or name an entry that params do not have."""
    hints = typing.get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {"name": name} if "name" in hints else {}
    keys = {field: key.format(name=name) for field, key in _field_keys(kind)}
    values |= each(
        {
            field: lambda field=field, key=key: convert(
                hints[field], lookup(params, key), key, params
            )
            for field, key in keys.items()
        }
    )
    try:
        return kind(**values)
    except ParamsError:
        raise
    except UserError as error:
        raise ParamsError([Finding("", str(error))]) from error


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


def _field_keys(kind: type[Any]) -> list[tuple[str, str]]:
    """Each field of a settings dataclass but `name`, with its key."""
    fields = dataclasses.fields(typing.cast(Any, kind))
    return [(f.name, f.metadata.get(_KEY, f.name)) for f in fields if f.name != "name"]


def _overlays(hint: Any) -> Iterable[Overlay]:
    """The overlays in a type and in the dataclasses that it is made of."""
    if typing.get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Overlay))
        hint = hint.__origin__
    for inner in typing.get_args(hint):
        yield from _overlays(inner)
    if dataclasses.is_dataclass(hint):
        for inner in typing.get_type_hints(hint, include_extras=True).values():
            yield from _overlays(inner)

"""params.yaml becomes settings: a wrong key or value is an error that names it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from boltlm.errors import UserError
from boltlm.param_types import EntryName, EntryPath, NonNegativeInt, Overlay, PositiveInt
from boltlm.params import (
    build_settings,
    flatten_params,
    from_key,
    load,
    load_settings,
    settings_keys,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    kind: Literal["cosine", "wsd"]
    warmup: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    rate: float
    schedule: Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    kind: Literal["files"]
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    kind: Literal["hub"]
    name: str
    config: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    size: PositiveInt
    source: Annotated[FileSource | HubSource, Overlay("source")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    parent: Annotated[str, EntryName("models", "base")]
    data: Annotated[str, EntryPath(latents="latents", split="corpora")]
    train: Annotated[Optimization, Overlay("train")]
    shuffle: bool

    def __post_init__(self) -> None:
        if self.train.rate > 1:
            raise UserError(f"rate must be 1 or less, found {self.train.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    name: str
    seed: NonNegativeInt
    model: Model = from_key("models.{name}")
    corpora: Mapping[str, Corpus]
    extra: tuple[Annotated[str, EntryName("corpora")], ...] = from_key("evaluate.extra")
    benchmarks: Mapping[Literal["gsm8k", "math"], str]

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise UserError("seed must not be 13")


PARAMS: dict[str, Any] = {
    "seed": 1,
    "train": {"rate": 0.5, "schedule": {"kind": "cosine", "warmup": 0.1}},
    "source": {"kind": "files", "path": "all.jsonl"},
    "corpora": {
        "em": {"size": 10, "source": {}},
        "web": {"size": 5, "source": {"kind": "hub", "name": "c4", "config": None}},
    },
    "latents": {"em1": {}},
    "models": {
        "m0": {"parent": "base", "data": "split/em", "train": {}, "shuffle": True},
        "m1": {
            "parent": "m0",
            "data": "latents/em1",
            "train": {"rate": 1, "schedule": {"warmup": 0.2}},
            "shuffle": False,
        },
    },
    "evaluate": {"extra": ["web"], "other": 1},
    "benchmarks": {"gsm8k": "test.jsonl"},
}


def changed(key: str, value: Any, params: Any = None) -> dict[str, Any]:
    """PARAMS with another value at a dotted key; `...` removes the key."""
    params = PARAMS if params is None else params
    first, _, rest = key.partition(".")
    inner = changed(rest, value, params[first]) if rest else value
    if inner is ...:
        return {name: old for name, old in params.items() if name != first}
    return {**params, first: inner}


def test_settings_hold_typed_values_from_wherever_they_are() -> None:
    """Sections, scalars, dotted keys, entries of a name, mappings, lists and unions by `kind`."""
    cosine = Schedule(kind="cosine", warmup=0.2)
    settings = build_settings(Settings, PARAMS, name="m1")
    assert settings == Settings(
        name="m1",
        seed=1,
        model=Model(
            parent="m0",
            data="latents/em1",
            train=Optimization(rate=1.0, schedule=cosine),
            shuffle=False,
        ),
        corpora={
            "em": Corpus(size=10, source=FileSource(kind="files", path="all.jsonl")),
            "web": Corpus(size=5, source=HubSource(kind="hub", name="c4", config=None)),
        },
        extra=("web",),
        benchmarks={"gsm8k": "test.jsonl"},
    )
    assert isinstance(settings.model.train.rate, float)
    unchanged = build_settings(Settings, PARAMS, name="m0").model.train
    assert unchanged == Optimization(rate=0.5, schedule=replace(cosine, warmup=0.1))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", ..., r"no key 'seed' \(params\.yaml has: "),
        ("seed", "one", r"seed must be of type int, found 'one'"),
        ("seed", True, r"seed must be of type int, found True"),
        ("seed", None, r"seed must be of type int, found None"),
        ("seed", 1.5, r"seed must be of type int, found 1\.5"),
        ("seed", -1, r"seed must be 0 or more, found -1"),
        ("seed", 13, r"^params\.yaml: seed must not be 13$"),
        ("models.m1", ..., r"no key 'models\.m1' \(models has: m0\)"),
        ("models.m1", 3, r"models\.m1 must be a mapping, found 3"),
        ("models.m1.parent", "m9", r"models\.m1\.parent must name .*\(base, m0, m1\), found 'm9'"),
        ("models.m1.data", "latent/em1", r"data must be latents/<entry of latents> \| split/"),
        ("models.m1.data", "latents/em9", r"latents has no entry 'em9' \(it has: em1\)"),
        ("models.m1.data", "em1", r"models\.m1\.data must be .*found 'em1'"),
        ("models.m1.shuffle", 1, r"models\.m1\.shuffle must be of type bool, found 1"),
        ("models.m1.train", None, r"models\.m1\.train must be a mapping \(\{\}: as `train`\)"),
        (
            "models.m1.train.rat",
            1,
            r"unknown key models\.m1\.train\.rat; known here: rate, schedule",
        ),
        ("models.m1.train.rate", "1e-4", r"models\.m1\.train\.rate .* float, found '1e-4'"),
        ("models.m1.train.rate", True, r"models\.m1\.train\.rate must be of type float"),
        ("models.m1.train.rate", math.nan, r"models\.m1\.train\.rate must be a finite number"),
        ("models.m1.train.rate", 2, r"models\.m1: rate must be 1 or less, found 2"),
        (
            "models.m1.train.schedule.kind",
            "odd",
            r"schedule\.kind must be cosine \| wsd, found 'odd'",
        ),
        ("train", ..., r"no key 'train'"),
        ("corpora", [1], r"corpora must be of type"),
        ("corpora.em.size", 0, r"corpora\.em\.size must be 1 or more, found 0"),
        ("corpora.em.size", ..., r"missing key corpora\.em\.size"),
        ("corpora.em.source", {"kind": "web"}, r"source\.kind must be files \| hub, found 'web'"),
        ("corpora.em.source", {"kind": "hub"}, r"missing key corpora\.em\.source\.name"),
        ("corpora.em.source", {"name": "c4"}, r"unknown key corpora\.em\.source\.name"),
        ("evaluate.extra", "web", r"evaluate\.extra must be"),
        ("evaluate.extra", ["web", "dclm"], r"evaluate\.extra\[1\] must name .*found 'dclm'"),
        ("evaluate", 3, r"no key 'evaluate\.extra' \(evaluate has: nothing\)"),
        ("benchmarks", {"mmlu": "x"}, r"a key of benchmarks must be gsm8k \| math, found 'mmlu'"),
        ("benchmarks.gsm8k", 3, r"benchmarks\.gsm8k must be of type str, found 3"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: Any, message: str) -> None:
    """The message is all that the user of a long params.yaml has."""
    with pytest.raises(UserError, match=message):
        build_settings(Settings, changed(key, value), name="m1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletedSettings:
    """A model whose keys are completed from two sections."""

    model: Annotated[Model, Overlay("defaults")] = from_key("models.{name}")


def test_overlays_are_merged_at_every_depth() -> None:
    """A key of `defaults.train.schedule` is kept by an entry that changes another key there."""
    params = {
        "train": {"rate": 0.5, "schedule": {"kind": "cosine", "warmup": 0.1}},
        "defaults": {"data": "split/em", "shuffle": True, "train": {"schedule": {"kind": "wsd"}}},
        "models": {"a": {"parent": "base", "train": {"schedule": {"warmup": 0.2}}}},
        "corpora": {"em": {}},
        "latents": {},
    }
    model = build_settings(CompletedSettings, params, name="a").model
    assert model.train == Optimization(rate=0.5, schedule=Schedule(kind="wsd", warmup=0.2))
    assert (model.data, model.shuffle) == ("split/em", True)


def test_an_overlay_of_another_kind_stands_alone() -> None:
    """Keys of the section would be unknown to it."""
    source = {"kind": "hub", "name": "c4", "config": "en"}
    settings = build_settings(Settings, changed("corpora.em.source", source), name="m0")
    assert settings.corpora["em"].source == HubSource(kind="hub", name="c4", config="en")
    other = {"path": "some.jsonl"}
    settings = build_settings(Settings, changed("corpora.em.source", other), name="m0")
    assert settings.corpora["em"].source == FileSource(kind="files", path="some.jsonl")


def test_the_keys_of_settings_are_those_whose_values_they_hold() -> None:
    """Overlays are values; sections in which a name is only looked up are not."""
    assert settings_keys(Settings) == {
        "seed",
        "models.{name}",
        "corpora",
        "evaluate.extra",
        "benchmarks",
        "train",
        "source",
    }


def test_flat_params_are_text_under_dotted_keys() -> None:
    """As MLflow shows them."""
    flat = flatten_params({"a": {"b": 1, "c": {}}, "d": [1, None], "e": "text", "f": True})
    assert flat == {"a.b": "1", "a.c": "{}", "d": "[1, null]", "e": "text", "f": "true"}


def test_load_reads_a_mapping(tmp_path: Path) -> None:
    """A file that is absent, malformed or something else is named."""
    path = tmp_path / "params.yaml"
    with pytest.raises(UserError, match=r"params\.yaml: no such params file"):
        load(path)
    path.write_text("kind: cosine\nwarmup: 0.1\n", encoding="utf-8")
    assert load(path) == {"kind": "cosine", "warmup": 0.1}
    assert load_settings(Schedule, path) == Schedule(kind="cosine", warmup=0.1)
    for text, message in (("a: [", "not YAML"), ("- a\n", "found list"), ("", "found NoneType")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load(path)

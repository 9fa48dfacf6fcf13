"""The graph that the entries of params.yaml form: cycles, and what is measured on what was trained
on."""

import graphlib
from collections.abc import Iterator, Mapping
from typing import Any

from boltlm.param_values import Finding
from boltlm.preflight.settings import section_entries

# The keys of an entry of each section that name the artefacts, of the given folder, it is made of.
_DEPENDENCIES = {
    "models": {"parent": "models/", "data": ""},
    "latents": {"model": "models/", "previous": "", "previous_model": "models/"},
}
# The keys that name corpora which models are trained on or latents are drawn for.
_TRAINING_CORPORA = {
    "teachers": ("corpus",),
    "models": ("corpus",),
    "latents": ("corpus",),
    "finetune.runs": ("corpus",),
}


def graph_findings(params: Mapping[str, Any]) -> Iterator[Finding]:
    """Cycles, evaluation corpora that are trained on, and sources that are read twice."""
    yield from _cycles(params)
    yield from _trained_on(params)
    yield from _read_twice(params)


def _text(entry: Any, key: str) -> str | None:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    return value if isinstance(value, str) else None


def _cycles(params: Mapping[str, Any]) -> Iterator[Finding]:
    """One finding for each circle; a circle is broken up to find the next one."""
    edges: dict[str, dict[str, str]] = {}  # from an artefact to those it is made of, and the key
    for section, keys in _DEPENDENCIES.items():
        for name, entry in section_entries(params, section).items():
            sources = edges.setdefault(f"{section}/{name}", {})
            for key, folder in keys.items():
                if value := _text(entry, key):
                    sources[f"{folder}{value}"] = f"{section}.{name}.{key}"
    while True:
        try:
            graphlib.TopologicalSorter(edges).prepare()
            return
        except graphlib.CycleError as error:
            circle: list[str] = error.args[1]  # each one is needed for the next
            key = edges[circle[1]].pop(circle[0])
            yield Finding(key, f" closes a circle: {' → '.join(circle)}; name an earlier entry")


def _evaluation_corpora(params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The key and the name of each corpus that models are evaluated on."""
    places = [("evaluate", params.get("evaluate"))]
    for name, entry in section_entries(params, "curves").items():
        changes = entry.get("evaluate") if isinstance(entry, Mapping) else None
        places.append((f"curves.{name}.evaluate", changes))
    for where, config in places:
        if corpus := _text(config, "corpus"):
            yield f"{where}.corpus", corpus
        extra = config.get("extra_corpora") if isinstance(config, Mapping) else None
        for index, corpus in enumerate(extra if isinstance(extra, list) else []):
            if isinstance(corpus, str):
                yield f"{where}.extra_corpora[{index}]", corpus


def _training_corpora(params: Mapping[str, Any]) -> dict[str, str]:
    """The corpora that models learn from, each with the first key that says so."""
    keys = {"base": "base"}
    for section, names in _TRAINING_CORPORA.items():
        for name, entry in section_entries(params, section).items():
            for key in names:
                if corpus := _text(entry, key):
                    keys.setdefault(corpus, f"{section}.{name}.{key}")
    defaults = section_entries(params, "model_defaults")
    for name, entry in section_entries(params, "models").items():
        mixes = isinstance(entry, Mapping) and entry.get("mix_raw", defaults.get("mix_raw"))
        corpus = _text(entry, "mix_corpus") or _text(defaults, "mix_corpus")
        if mixes and corpus:
            keys.setdefault(corpus, f"models.{name}.mix_corpus")
    return keys


def _trained_on(params: Mapping[str, Any]) -> Iterator[Finding]:
    training = _training_corpora(params)
    for key, corpus in _evaluation_corpora(params):
        if corpus in training:
            yield Finding(
                key,
                f" is {corpus!r}, which {training[corpus]} is for too: it is not held out; give"
                " the evaluation a corpus of its own",
            )


def _read_twice(params: Mapping[str, Any]) -> Iterator[Finding]:
    """An evaluation corpus whose source reads the same files or data set as a training corpus, but
    in another way, so that the two take the same documents. Corpora with equal sources take
    consecutive documents."""
    corpora, default = section_entries(params, "corpora"), section_entries(params, "corpus")
    sources: dict[str, dict[str, Any]] = {}
    for name, entry in corpora.items():
        own = section_entries(entry, "source") if isinstance(entry, Mapping) else {}
        same_kind = own.get("kind", default.get("kind")) == default.get("kind")
        sources[name] = {**default, **own} if same_kind else dict(own)
    training = set(_training_corpora(params))
    for key, heldout in _evaluation_corpora(params):
        for name in sorted(training & sources.keys()) if heldout in sources else ():
            ours, theirs = sources[heldout], sources[name]
            names = ("kind", "path", "name", "config", "split")
            data = [tuple(str(source.get(n)) for n in names) for source in (ours, theirs)]
            if ours.get("kind") != "generated" and data[0] == data[1] and ours != theirs:
                yield Finding(
                    f"corpora.{heldout}.source",
                    f" reads the data of corpora.{name}.source in another way, so the corpora share"
                    f" documents, and {key} is not held out; make the two sources equal, then they"
                    " take different documents",
                )

"""The part of each model in the experiment: the EM chain, its controls and the baselines."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from boltlm.errors import UserError
from boltlm.estep.config import PAPER_OPTIONS, LatentsEntry
from boltlm.evaluation.config import CurveEntry
from boltlm.evaluation.finetune_config import FinetuneRun
from boltlm.param_types import EntryName, Name, NewName, PositiveInt
from boltlm.params import from_key
from boltlm.teachers.config import AnyTeacher, ImportTeacherConfig
from boltlm.training.config import CompletedModelEntry

Role = Literal["base", "iteration", "frozen", "teacher", "raw", "other"]
# The model of the stage `base`, from which all others descend. It is no entry of `models`.
BASE_MODEL = "base"
ModelName = Annotated[str, NewName(BASE_MODEL)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportSettings:
    """The entries of params.yaml whose results are reported."""

    teachers: Mapping[Name, AnyTeacher]
    latents: Mapping[Name, LatentsEntry]
    models: Mapping[ModelName, CompletedModelEntry]
    curves: Mapping[Annotated[str, EntryName("models")], CurveEntry]
    finetune_runs: Mapping[Name, FinetuneRun] = from_key("finetune.runs")
    k_samples: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A model and its role in the experiment.

    `iteration` is the index t of M_t in the EM chain: the longest sequence of models in which each
    one sampled the latents that the next one is trained on (of equally long sequences, the first
    one in params.yaml). Models outside the chain have the role `frozen` if they are trained on
    latents sampled by a model of the chain, `teacher` if on latents from a teacher, `raw` if on
    text alone, and `other` in all remaining cases (mixtures with raw text, second chains). The role
    `base` is that of BASE_MODEL.
    `latents` is the entry of `latents` that the model is trained on, `generator` the model that
    sampled it; imported latents have no entry, but a generator, in whose place another model drew
    them. `note` says how these latents differ from those of the chain, and the seed of the
    training where it is the model's own.
    """

    name: str
    role: Role
    format: str
    iteration: int | None
    latents: str | None
    generator: str | None
    note: str = ""
    training_of: str | None = None
    parent: str | None = None
    mix_raw: float = 0
    k_samples: int | None = None

    @property
    def description(self) -> str:
        """The role in a few words, for labels and tables."""
        if self.iteration is not None:
            return f"iteration {self.iteration}"
        if self.role in ("base", "raw"):
            return "base model" if self.role == "base" else f"raw text{self.note}"
        if self.format == "paraphrase":
            return f"paraphrases{self.note}"
        source = "teacher latents" if self.generator is None else f"latents by {self.generator}"
        source += self.note
        return source if self.format == "latent" else f"{self.format}, {source}"


def experiment_arms(settings: ReportSettings) -> tuple[Arm, ...]:
    """Every entry of `models`, in the order of params.yaml, and the base model.

    If no model is trained on sampled latents there is no chain, and every model trained on latents
    from a teacher has the role `teacher`. Raises UserError if models sample latents for each other
    in a circle.
    """
    lineages = [_lineage(settings, name) for name in settings.models]
    longest = max(lineages, key=len, default=[])
    chain = longest if len(longest) > 1 else []
    base = Arm(
        name=BASE_MODEL, role="base", format="raw", iteration=None, latents=None, generator=None
    )
    return (*(_arm(settings, name, chain) for name in settings.models), base)


def em_chain(arms: Sequence[Arm]) -> list[Arm]:
    """M_0, M_1, …; empty if there is no chain."""
    return sorted(
        (arm for arm in arms if arm.iteration is not None), key=lambda arm: arm.iteration or 0
    )


def control_arms(arms: Sequence[Arm]) -> list[Arm]:
    """The models outside the chain, in the order of params.yaml."""
    return [arm for arm in arms if arm.iteration is None]


def is_continual(arms: Sequence[Arm]) -> bool:
    """Whether the iterations of the chain go on from each other's weights."""
    chain = em_chain(arms)
    pairs = list(itertools.pairwise(chain))
    return bool(pairs) and all(later.parent == earlier.name for earlier, later in pairs)


def ordered_arms(arms: Sequence[Arm]) -> list[Arm]:
    """The chain, then the models outside it."""
    return [*em_chain(arms), *control_arms(arms)]


def training_of(entries: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The first of the `entries` of models that differs from the entry `name` by its seed alone."""

    def without_seed(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key != "seed"}

    own = without_seed(entries[name])
    return next(other for other in entries if without_seed(entries[other]) == own)


def _arm(settings: ReportSettings, name: str, chain: Sequence[str]) -> Arm:
    latents, generator = _latents_source(settings, name)
    sequence_format = settings.models[name].format
    role: Role = "other"
    if name in chain:
        role = "iteration"
    elif sequence_format == "raw":
        role, latents, generator = "raw", None, None
    elif sequence_format == "latent" and generator in chain:
        role = "frozen"
    elif sequence_format == "latent" and latents is None:
        role = "teacher"
    entries = {other: asdict(entry) for other, entry in settings.models.items()}
    first = training_of(entries, name)
    return Arm(
        name=name,
        role=role,
        format=sequence_format,
        iteration=chain.index(name) if name in chain else None,
        latents=latents,
        generator=generator,
        note=_note(settings, name, latents, generator),
        training_of=None if first == name else first,
        parent=settings.models[name].parent,
        mix_raw=settings.models[name].mix_raw,
        k_samples=_k_variant(settings, name, chain),
    )


def _k_variant(settings: ReportSettings, name: str, chain: Sequence[str]) -> int | None:
    """The K of M_1, or of a model that differs from it by the K of its latents alone."""
    sources = [settings.models[model].data.partition("/") for model in (name, *chain[1:2])]
    if len(sources) < 2 or any(folder != "latents" for folder, _, _ in sources):
        return None
    own, first = (settings.latents[entry] for _, _, entry in sources)
    model, m_1 = settings.models[name], settings.models[chain[1]]
    is_variant = replace(own, k_samples=first.k_samples) == first
    is_variant = is_variant and replace(model, data=m_1.data, seed=m_1.seed) == m_1
    return (own.k_samples or settings.k_samples) if is_variant else None


def _note(settings: ReportSettings, name: str, latents: str | None, generator: str | None) -> str:
    parts: list[str] = []
    if latents is not None:
        entry = settings.latents[latents]
        parts += [f"K = {entry.k_samples}"] if entry.k_samples else []
        parts += [
            f"{option} {value}"
            for option, value in asdict(entry.options).items()
            if value != getattr(PAPER_OPTIONS, option)
        ]
    elif generator is not None:
        parts.append("imported")
    if mix := settings.models[name].mix_raw:
        parts.append(f"{mix:.0%} raw")
    if (seed := settings.models[name].seed) is not None:
        parts.append(f"seed {seed}")
    return "".join(f", {part}" for part in parts)


def _latents_source(settings: ReportSettings, name: str) -> tuple[str | None, str | None]:
    """The entry of `latents` that a model is trained on, and the model that sampled it or in whose
    place another one did (the teacher `import`); None where there is none."""
    folder, _, entry = settings.models[name].data.partition("/")
    if folder == "teacher":
        teacher = settings.teachers[entry]
        return None, teacher.drawn_by if isinstance(teacher, ImportTeacherConfig) else None
    if folder != "latents":
        return None, None
    return entry, settings.latents[entry].model


def _lineage(settings: ReportSettings, name: str) -> list[str]:
    """The models of the latent format from the first one down to `name`, each of which sampled the
    latents of the next; empty if `name` has another format."""
    lineage: list[str] = []
    ancestor: str | None = name
    while ancestor is not None and settings.models[ancestor].format == "latent":
        if ancestor in lineage:
            circle = " ← ".join([*reversed(lineage), ancestor])
            raise UserError(f"params.yaml: models sample latents for each other: {circle}")
        lineage.insert(0, ancestor)
        _, ancestor = _latents_source(settings, ancestor)
    return lineage

"""Which model is what, read from params.yaml: the EM chain, its controls and the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from boltlm.errors import UserError
from boltlm.params import section

Role = Literal["iteration", "frozen", "teacher", "raw", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A model and its part in the experiment.

    `iteration`: M_t's place t in the EM chain, the longest line of models each of which drew the
    latents of the next (of equally long ones the first in params.yaml). Off the chain: `frozen`
    learns from latents that a model of the chain drew, `teacher` from a teacher's, `raw` from
    text alone; `other` is the rest (unpaired mixes, second chains). `latents`: the entry of
    `latents` it learns from, `generator`: the model that drew them.
    """

    name: str
    role: Role
    format: str
    iteration: int | None
    latents: str | None
    generator: str | None

    @property
    def what(self) -> str:
        """Its part in a few words."""
        if self.iteration is not None:
            return f"iteration {self.iteration}"
        if self.role == "raw":
            return "raw text"
        source = "teacher's latents" if self.generator is None else f"latents by {self.generator}"
        return source if self.format == "latent" else f"{self.format}, {source}"


def arms(params: Mapping[str, Any]) -> tuple[Arm, ...]:
    """Every entry of `models`, in the order of params.yaml.

    Without a model that learns from drawn latents there is no chain, and every model with a
    teacher's latents is of role `teacher`. Raises UserError where latents or a format that a
    model names do not exist, or where models draw latents for each other in a circle.
    """
    names = list(section(params, "models"))
    lines = [_line(params, name) for name in names]
    longest = max(lines, key=len, default=[])
    chain = longest if len(longest) > 1 else []
    return tuple(_arm(params, name, chain) for name in names)


def chain(found: Sequence[Arm]) -> list[Arm]:
    """M_0, M_1, …; empty where there is no chain."""
    return sorted(
        (arm for arm in found if arm.iteration is not None), key=lambda arm: arm.iteration or 0
    )


def controls(found: Sequence[Arm]) -> list[Arm]:
    """What the chain is compared with, in the order of params.yaml."""
    return [arm for arm in found if arm.iteration is None]


def ordered(found: Sequence[Arm]) -> list[Arm]:
    """The chain, then what it is compared with."""
    return [*chain(found), *controls(found)]


def _arm(params: Mapping[str, Any], name: str, chain: Sequence[str]) -> Arm:
    latents, generator = _source(params, name)
    form = _form(params, name)
    role: Role = "other"
    if name in chain:
        role = "iteration"
    elif form == "raw":
        role, latents, generator = "raw", None, None
    elif form == "latent" and generator in chain:
        role = "frozen"
    elif form == "latent" and latents is None:
        role = "teacher"
    return Arm(
        name=name,
        role=role,
        format=form,
        iteration=chain.index(name) if name in chain else None,
        latents=latents,
        generator=generator,
    )


def _source(params: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """The entry of `latents` that a model's data is, and the model that drew it; or neither."""
    kind, _, entry = section(params, f"models.{name}.data").partition("/")
    if kind != "latents":
        return None, None
    return entry, section(params, f"latents.{entry}.model")


def _form(params: Mapping[str, Any], name: str) -> str:
    return section(params, f"models.{name}.format")


def _line(params: Mapping[str, Any], name: str) -> list[str]:
    """From the first model of the latent format down to this one; empty for other formats."""
    models = section(params, "models")
    line: list[str] = []
    found: str | None = name
    while found is not None and found in models and _form(params, found) == "latent":
        if found in line:
            circle = " ← ".join([*reversed(line), found])
            raise UserError(f"params.yaml: models draw latents for each other: {circle}")
        line.insert(0, found)
        _, found = _source(params, found)
    return line

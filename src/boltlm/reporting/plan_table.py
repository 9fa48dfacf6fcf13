"""The plan of an experiment as text."""

from collections.abc import Callable, Mapping, Sequence

from boltlm.reporting.plan import StagePlan
from boltlm.reporting.plan_config import Accelerator

_BEGINNING = """\
Sizes come from the section `plan` of params.yaml and from nothing else: {chunk} tokens in a chunk,
{latent} in a latent. Times: {count} × {device}; {source}.
"""
_END = """\
Questions of benchmarks count with answers of full length and without their prompts. Disk: one copy;
DVC's cache has a second one unless cache.type links it. Costs are the expected ones; the limit of a
teacher is its max_cost_usd."""


def plan_text(
    stages: Sequence[StagePlan],
    *,
    device: tuple[str, Accelerator, int],
    sizes: tuple[int, int],
    done: frozenset[str],
    measured: Mapping[str, StagePlan] | None,
) -> str:
    """A table with one line a stage, and totals. `device`: name, speeds, number; `sizes`: tokens of
    a chunk and of a latent; `done`: the stages that need not run again; `measured`: recorded
    figures, each in a line below that of its stage (None: not wanted)."""
    name, accelerator, count = device
    rows = [["stage", *(heading for heading, _ in COLUMNS.values()), "state"]]
    for stage in stages:
        rows.append([stage.stage, *_cells(stage), "done" if stage.stage in done else "to do"])
        if measured is not None and stage.stage in measured:
            rows.append(["  recorded", *_cells(measured[stage.stage]), ""])
    open_stages = [stage for stage in stages if stage.stage not in done]
    rows += [_total("total", stages), _total("still to do", open_stages)]
    lines = _aligned(rows)
    lines.insert(-2, lines[1])
    hours = sum(stage.seconds or 0 for stage in stages) * count / 3600
    beginning = _BEGINNING.format(
        chunk=sizes[0], latent=sizes[1], count=count, device=name, source=accelerator.source
    )
    note = f"Together {hours:,.1f} device hours.\n"
    if stages[0].disk_bytes is None:
        note = (
            "The size of the base model is not known, and so neither are FLOPs and times: set"
            " plan.checkpoint.\n"
        )
    return "\n".join([beginning, *lines, "", note + _END])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, with a rule below the first; columns without any value are left out."""
    columns = [column for column in zip(*rows, strict=True) if {*column[1:]} - {"", "–"}]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _total(label: str, stages: Sequence[StagePlan]) -> list[str]:
    """The sums of what can be added up."""
    cells: list[str] = []
    for field, (_, formatted) in COLUMNS.items():
        values = [value for stage in stages if (value := getattr(stage, field)) is not None]
        adds_up = field in SUMS
        cells.append(formatted(sum(values)) if values and adds_up else "")
    return [label, *cells, ""]


def _cells(stage: StagePlan) -> list[str]:
    return [
        "–" if (value := getattr(stage, field)) is None else formatted(value)
        for field, (_, formatted) in COLUMNS.items()
    ]


def short_count(value: float) -> str:
    """A number with at most four digits: 8,123, 33.2k, 1.916B."""
    for unit_size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= max(unit_size, 1e4):
            return f"{value / unit_size:.4g}{unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def short_size(value: float) -> str:
    """Bytes with at most three digits: 363 GB, 8.1 kB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value / 1e3:.0f} kB"


COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "documents": ("documents", short_count),
    "chunks": ("chunks", short_count),
    "raw_tokens": ("raw tokens", short_count),
    "latent_tokens": ("latent tokens", short_count),
    "training_tokens": ("training tokens", short_count),
    "steps": ("steps", short_count),
    "requests": ("requests", short_count),
    "usd": ("US dollars", lambda value: f"{value:,.2f}"),
    "flops": ("FLOPs", lambda value: f"{value:.1e}".replace("e+", "e")),
    "seconds": ("time", _duration),
    "disk_bytes": ("disk", short_size),
}
SUMS = ("training_tokens", "steps", "requests", "usd", "flops", "seconds", "disk_bytes")

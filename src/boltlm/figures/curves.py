"""Training curves, and how the weights of the drawn latents are spread."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from boltlm.figures.arms import chain, ordered
from boltlm.figures.drawing import Drawn, LeftOut, Look, looks, panels
from boltlm.figures.results import Results

RARE = 0.001  # share of the weights at each end that the axis leaves out


def training(results: Results) -> Drawn | LeftOut:
    """Loss against tokens of every model with a curve; what models start from in a panel of its
    own, for it reads other text for longer."""
    models = {arm.name: f"{arm.name}: {arm.what}" for arm in ordered(results.arms)}
    known = {name: lines for name, lines in results.curves.items() if lines}
    if not known:
        return LeftOut("no model has a training curve")
    starts = {name: lines for name, lines in known.items() if name not in models}
    rest = {name: known[name] for name in models if name in known}
    shown = [part for part in (starts, rest) if part]
    figure, ((*columns,),) = panels(4.2 * len(shown), 3.4, 1, len(shown))
    seen = looks(results.arms) | {name: Look("#555555", "solid") for name in starts}
    for axes, part in zip(columns, shown, strict=True):
        _curves(axes, {models.get(name, name): (seen[name], part[name]) for name in part})
        if part is starts:
            axes.legend(loc="upper right")
        else:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    columns[0].set_ylabel("training loss, nats per token")
    figure.subplots_adjust(wspace=0.22)
    rows = [
        {"model": name, "step": line["step"], "tokens": line["tokens"], "loss": line["loss"]}
        for name, lines in known.items()
        for line in lines
    ]
    return Drawn(figure, rows)


def _curves(axes: Axes, curves: Mapping[str, tuple[Look, list[dict[str, float]]]]) -> None:
    for label, (look, lines) in curves.items():
        axes.plot(
            [line["tokens"] for line in lines],
            [line["loss"] for line in lines],
            color=look.color,
            linestyle=look.dash,
            linewidth=1.3,
            label=label,
        )
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


MEASURED = {  # columns of the curves: axis label, and what is better
    "heldout_elbo": ("held-out bound, nats per token", np.maximum),
    "heldout_nll": ("held-out −log p of raw text, nats per token", np.minimum),
}


def heldout(results: Results) -> Drawn | LeftOut:
    """Held-out measures against tokens for every model that was measured in training: points as
    they were, and as a line the best so far, which is how the paper draws its curves."""
    models = {arm.name: f"{arm.name}: {arm.what}" for arm in ordered(results.arms)}
    known = {
        name: [line for line in results.curves.get(name, []) if MEASURED.keys() & line.keys()]
        for name in models
    }
    known = {name: lines for name, lines in known.items() if lines}
    if not known:
        return LeftOut("no model was measured in training (train.evaluate)")
    columns = [c for c in MEASURED if any(c in line for lines in known.values() for line in lines)]
    figure, ((*axes,),) = panels(4.6 * len(columns), 3.4, 1, len(columns))
    seen = looks(results.arms)
    rows: list[dict[str, str | float]] = []
    for place, column in zip(axes, columns, strict=True):
        label, better = MEASURED[column]
        for name, lines in known.items():
            found = [line for line in lines if column in line]
            tokens = [line["tokens"] for line in found]
            values = [line[column] for line in found]
            best = better.accumulate(values) if values else []
            look = seen[name]
            place.plot(tokens, values, ".", color=look.color, markersize=4)
            place.plot(tokens, best, color=look.color, linestyle=look.dash, label=models[name])
            rows += [
                {"model": name, "measure": column, "tokens": t, "value": v, "best": float(b)}
                for t, v, b in zip(tokens, values, best, strict=True)
            ]
        place.set_xlabel("training tokens")
        place.set_ylabel(label)
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.subplots_adjust(wspace=0.3)
    return Drawn(figure, rows)


def log_weight(results: Results) -> Drawn | LeftOut:
    """How log w is spread in the latents that each iteration learns from; those of unfinished
    draws are −∞ and are told as a share. The axis leaves out what is rarer than 0.1 %."""
    entries = {
        arm.latents: (f"iteration {arm.iteration}, drawn by {arm.generator}", arm.name)
        for arm in chain(results.arms)
        if arm.latents is not None and results.histograms.get(arm.latents)
    }
    if not entries:
        return LeftOut("no latents of an EM chain have a histogram")
    seen = looks(results.arms)
    figure, ((axes,),) = panels(6.0, 3.4)
    for entry, (label, model) in entries.items():
        bins = results.histograms[entry]
        edges = [line["from_nats"] for line in bins] + [bins[-1]["to_nats"]]
        counts = np.array([line["count"] for line in bins])
        lost = results.diagnostics[entry].get("unfinished_fraction", 0.0)
        axes.stairs(
            counts / counts.sum(),
            edges,
            color=seen[model].color,
            linewidth=1.5,
            label=f"{label}\n{lost:.1%} unfinished",
        )
    shown = [line for entry in entries for line in results.histograms[entry]]
    rare = RARE * sum(line["count"] for line in shown)
    axes.set_xlim(*_bulk(shown, rare))
    axes.set_xlabel("log w = log p(Z) + log p(X | Z) − log q(Z | X), nats per chunk")
    axes.set_ylabel("share of finished draws in a bin")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    rows = [{"latents": entry, **line} for entry in entries for line in results.histograms[entry]]
    return Drawn(figure, rows)


def _bulk(bins: list[dict[str, float]], rare: float) -> tuple[float, float]:
    """The range outside which, at either end, fewer than `rare` draws lie."""
    rising = sorted(bins, key=lambda line: line["from_nats"])
    ends: list[float] = []
    for lines, edge in ((rising, "from_nats"), (rising[::-1], "to_nats")):
        passed = 0.0
        for line in lines:
            passed += line["count"]
            if passed > rare:
                ends.append(line[edge])
                break
    return ends[0], ends[1]

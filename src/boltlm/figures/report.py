"""All pictures, and a report with the numbers: `metrics/` becomes `metrics/figures/`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from boltlm.figures import curves, iterations
from boltlm.figures.arms import ordered
from boltlm.figures.drawing import STYLE, Drawn, LeftOut, save
from boltlm.figures.results import Number, Numbers, Results, read

NOTHING = "–"
CAPTIONS = {
    "elbo": "Held-out bound per token by iteration, with standard errors; lines are controls.",
    "accuracy": "Held-out questions answered correctly by iteration.",
    "parts": "Utility, simplicity and diversity on held-out chunks by iteration.",
    "diagnostics": "The draws of each iteration's model on held-out chunks.",
    "training": "Training loss, each on the token stream of its own format.",
    "heldout": "Held-out measures during training: points as measured, lines the best so far.",
    "log_weight": "log w of the latents that each iteration learns from; the outermost bins hold"
    " all beyond.",
}

ABOUT_MODELS = (
    "ELBO: importance-weighted bound with the largest K; NLL: of the raw text without latents; both"
    " in nats per token on held-out documents. No bound: groups of K draws that all failed, which"
    " the bound leaves out. Exact: draws that are the data's own latent to the letter. ESS:"
    " effective sample size of the K draws."
)
ABOUT_LATENTS = (
    "Spread: standard deviation of log w within a chunk. Tokens per second are of the draws made in"
    " the last run; shards found in the work folder do not count."
)

ABOUT_FINETUNED = (
    "Accuracy: mean over questions, samples and seeds, with the standard error over questions;"
    " behind it the standard errors over trainings and over samples."
)


def make(params: Mapping[str, Any], *, metrics: Path, out: Path) -> None:
    """Write every picture that there are numbers for, the CSV behind each, and `report.md`,
    which names the ones left out and why."""
    results = read(params, metrics)
    out.mkdir(parents=True, exist_ok=True)
    draw: dict[str, Callable[[], Drawn | LeftOut]] = {
        "elbo": lambda: iterations.elbo(results),
        "accuracy": lambda: iterations.accuracy(results),
        "parts": lambda: iterations.parts(results),
        "diagnostics": lambda: iterations.diagnostics(results),
        "training": lambda: curves.training(results),
        "heldout": lambda: curves.heldout(results),
        "log_weight": lambda: curves.log_weight(results),
    }
    pictures: dict[str, Drawn | LeftOut] = {}
    for stem, picture in draw.items():
        with rc_context(dict(STYLE)):
            pictures[stem] = picture()
        save(out, stem, pictures[stem])
    (out / "report.md").write_text(report(results, pictures), encoding="utf-8")


def report(results: Results, pictures: Mapping[str, Drawn | LeftOut]) -> str:
    """The report's Markdown."""
    blocks = [
        "# Results",
        "Written by the stage `figures` from the files in `metrics/`; ± is one standard error.",
        "## Models",
        _models(results),
        ABOUT_MODELS,
    ]
    if results.bound_sizes():
        blocks += ["### Bound by number of draws K, nats per token", _bounds(results)]
    if tasks := results.tasks():
        blocks += ["### Answers by task", _tasks(results, tasks)]
    if any(results.finetuned.values()):
        blocks += ["## Fine-tuned", _finetuned(results), ABOUT_FINETUNED]
    if results.diagnostics:
        blocks += [
            "## Latents",
            _latents(results),
            ABOUT_LATENTS,
        ]
    blocks.append("## Pictures")
    for stem, picture in pictures.items():
        if isinstance(picture, LeftOut):
            blocks.append(f"`{stem}.png` is left out: {picture.reason}.")
        else:
            caption = CAPTIONS[stem]
            numbers = f"Numbers: [{stem}.csv]({stem}.csv)"
            blocks.append(f"![{caption}]({stem}.png)\n\n{caption} {numbers}")
    return "\n\n".join(blocks) + "\n"


def _models(results: Results) -> str:
    sizes = results.bound_sizes()
    failed = f"elbo_failed_fraction_k{sizes[-1]}" if sizes else ""
    columns: dict[str, Callable[[str], str]] = {
        "ELBO": lambda name: _nats(results.number(name, "elbo_per_token")),
        "NLL": lambda name: _nats(results.number(name, "nll_per_token")),
        "answers, thought first": lambda name: _share(results.number(name, iterations.LATENT)),
        "answers at once": lambda name: _share(results.number(name, iterations.NONE)),
        "exact": lambda name: _share(results.number(name, "exact_fraction")),
        "ESS": lambda name: _plain(results.measures[name], "ess_mean", 2),
        "unfinished": lambda name: _share(results.number(name, "unfinished_fraction")),
        "no bound": lambda name: _share(results.number(name, failed)),
    }
    return _table(
        ["model", "what", *columns],
        [
            [arm.name, arm.what, *(cell(arm.name) for cell in columns.values())]
            for arm in ordered(results.arms)
        ],
    )


def _bounds(results: Results) -> str:
    sizes = results.bound_sizes()
    names = [f"elbo_per_token_k{size}" for size in sizes]
    return _table(
        ["model", *(f"K = {size}" for size in sizes)],
        [
            [arm.name, *(_nats(results.number(arm.name, name)) for name in names)]
            for arm in ordered(results.arms)
            if any(name in results.measures[arm.name] for name in names)
        ],
    )


def _tasks(results: Results, tasks: Sequence[str]) -> str:
    return _table(
        ["model", *tasks],
        [
            [arm.name, *(_share(results.number(arm.name, f"{task}/accuracy")) for task in tasks)]
            for arm in ordered(results.arms)
        ],
    )


def _finetuned(results: Results) -> str:
    rows: list[list[str]] = []
    for run, facts in results.finetuned.items():
        for name in (key for key in facts if key.endswith("/accuracy")):
            number = Number(value=facts[name], se=facts.get(f"{name}_se"))
            errors = [_percent(facts, f"{name}_se_{over}") for over in ("seeds", "samples")]
            sizes = [_plain(facts, key, 0) for key in ("seeds", "samples")]
            rows.append([run, name.removesuffix("/accuracy"), _share(number), *errors, *sizes])
    head = ["run", "task", "accuracy", "± seeds", "± samples", "seeds", "samples"]
    return _table(head, rows)


def _latents(results: Results) -> str:
    columns: dict[str, Callable[[Numbers], str]] = {
        "chunks": lambda facts: _plain(facts, "chunks", 0),
        "draws": lambda facts: _plain(facts, "samples", 0),
        "ESS": lambda facts: _plain(facts, "ess_mean", 2),
        "largest weight": lambda facts: _plain(facts, "max_weight_mean", 2),
        "spread, nats": lambda facts: _plain(facts, "log_weight_spread_mean", 2),
        "unfinished": lambda facts: _percent(facts, "unfinished_fraction"),
        "exact": lambda facts: _percent(facts, "exact_fraction"),
        "exact, kept": lambda facts: _percent(facts, "exact_fraction_kept"),
        "tokens a latent": lambda facts: _plain(facts, "latent_tokens_mean", 1),
        "tokens/s": lambda facts: _rate(facts),
    }
    return _table(
        ["latents", "drawn by", *columns],
        [
            [name, results.generators[name], *(cell(facts) for cell in columns.values())]
            for name, facts in results.diagnostics.items()
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its numbers flush right."""
    marks = ["---", *("---:" if row_is_number else "---" for row_is_number in _numeric(head, rows))]
    lines = [head, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    return [
        all(row[place][:1].isdigit() or row[place][:1] in "−–" for row in rows)
        for place in range(1, len(head))
    ]


def _nats(number: Number | None) -> str:
    if number is None:
        return NOTHING
    error = "" if number.se is None else f" ± {number.se:.3f}"
    return f"{number.value:.3f}{error}".replace("-", "−")


def _share(number: Number | None) -> str:
    if number is None:
        return NOTHING
    error = "" if number.se is None else f" ± {number.se:.1%}"
    return f"{number.value:.1%}{error}"


def _percent(facts: Numbers, metric: str) -> str:
    return f"{facts[metric]:.1%}" if metric in facts else NOTHING


def _plain(facts: Numbers, metric: str, digits: int) -> str:
    return f"{facts[metric]:,.{digits}f}" if metric in facts else NOTHING


def _rate(facts: Numbers) -> str:
    return _plain(facts, "sampled_tokens_per_second", 0) if facts.get("seconds") else NOTHING

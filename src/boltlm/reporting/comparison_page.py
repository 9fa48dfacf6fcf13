"""The comparison of two models as a small HTML page: `boltlm compare --html`.

The page loads nothing and runs nothing; all text of the experiment is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.special import stdtrit

from boltlm.evaluation.compare import PairedDifference
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.shard_store import atomic_write

_HEAD = (
    "<!DOCTYPE html>\n"
    '<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'\">"
    "<title>{title}</title><style>"
    "body{{margin:0 auto;max-width:70rem;padding:0 .7rem 3rem;color:#1a1a1a;background:#fff;"
    "font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}}"
    "h1{{font-size:1.5rem}}h2{{font-size:1.2rem}}.scroll{{overflow-x:auto}}"
    "table{{border-collapse:collapse;font-size:.9rem}}"
    "th,td{{border-bottom:1px solid #d0d0d0;padding:.2rem .6rem;text-align:left;"
    "vertical-align:top}}th{{white-space:nowrap}}"
    "td.number{{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}}"
    "details{{border:1px solid #d0d0d0;border-radius:6px;margin:.4rem 0;padding:.3rem .7rem}}"
    "summary{{cursor:pointer}}pre{{white-space:pre-wrap;background:#f5f5f5;padding:.4rem;"
    "margin:.2rem 0 .6rem}}"
    ".columns{{display:grid;gap:.8rem;"
    "grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}}"
    "</style></head><body>"
)
MAX_PROMPT_CHARACTERS = 800  # of the end of a prompt, which is the question
_UNITS = {"accuracy": "fraction of questions"}


def write_comparison(
    one: Path,
    other: Path,
    differences: Mapping[str, PairedDifference],
    pairs: Sequence[tuple[TaskAnswer, TaskAnswer]],
    out: Path,
) -> None:
    """Write the page: a table of the paired differences, and every question of whose two answers
    exactly one is correct."""
    names = one.name, other.name
    title = html.escape(f"{names[0]} compared with {names[1]}")
    body = [_HEAD.format(title=title), f"<h1>{title}</h1>"]
    if differences:
        body += ["<h2>Paired differences</h2>", _differences_table(names, differences)]
    body.append(f"<h2>{len(pairs)} pairs of verdicts of which only one is correct</h2>")
    for index, (answer_index, verdict) in enumerate(((0, "first"), (1, "second"))):
        chosen = [pair for pair in pairs if pair[answer_index].correct]
        label = names[index] if names[0] != names[1] else f"the {verdict} grader"
        body.append(f"<h3>Correct only by {html.escape(label)}: {len(chosen)}</h3>")
        body += [_disagreement(names, pair) for pair in chosen]
    body.append("</body></html>\n")
    with atomic_write(out) as temporary:
        temporary.write_text("\n".join(body), encoding="utf-8")


def _differences_table(names: tuple[str, str], differences: Mapping[str, PairedDifference]) -> str:
    head = ("metric", f"{names[0]} − {names[1]}", "95 % interval", "unit", "pairs", "clusters")
    rows = [f"<tr>{''.join(f'<th>{html.escape(text)}</th>' for text in head)}</tr>"]
    for name, difference in differences.items():
        reach = stdtrit(difference.clusters - 1, 0.975) * difference.standard_error
        low, high = difference.value - reach, difference.value + reach
        verdict = " *" if low > 0 or high < 0 else ""
        unit = _UNITS.get(name.rpartition("/")[2], "nats per token")
        numbers = (
            f"{difference.value:+.4f} ± {difference.standard_error:.4f}{verdict}",
            f"[{low:+.4f}, {high:+.4f}]",
        )
        cells = [f"<td>{html.escape(name)}</td>"]
        cells += [f'<td class="number">{_minus(number)}</td>' for number in numbers]
        cells.append(f"<td>{unit}</td>")
        counts = (difference.pairs, difference.clusters)
        cells += [f'<td class="number">{count:,}</td>' for count in counts]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "<p>± one standard error over documents or questions, paired; the interval is that of the t"
        " distribution over clusters. * the interval does not contain 0. Intervals do not cover"
        " training seeds.</p>"
    )
    return f'{note}<div class="scroll"><table>{"".join(rows)}</table></div>'


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _disagreement(names: tuple[str, str], pair: tuple[TaskAnswer, TaskAnswer]) -> str:
    """A question with both answers; its end and the completions show when it is opened."""
    first = pair[0]
    question = first.prompt[-MAX_PROMPT_CHARACTERS:].strip()
    title = f"{first.question_id} ({first.metric_prefix}), gold answer: {first.gold}"
    columns = [
        f"<div><strong>{html.escape(name)}</strong>, {html.escape(answer.grader)}:"
        f" {'correct' if answer.correct else 'wrong'},"
        f" answer {html.escape(str(answer.extracted))}"
        f"<pre>{html.escape(answer.completion.strip())}</pre></div>"
        for name, answer in zip(names, pair, strict=True)
    ]
    return (
        f"<details><summary>{html.escape(title)}</summary>"
        f'<pre>{html.escape(question)}</pre><div class="columns">{"".join(columns)}</div></details>'
    )

"""One self-contained HTML page for an experiment: summary, warnings, tables, figures, the latent
browser, and where the numbers come from (docs/reporting.md).

Nothing on the page is loaded from elsewhere, and its policy forbids it. Text of the experiment is
escaped where it is part of the HTML; that of documents and latents is JSON in a script element.
"""

import base64
import hashlib
import html
import json
import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from boltlm.reporting.browser_documents import DataFolders
from boltlm.reporting.experiment_identity import FACTS_FILE
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.latent_browser import browser_data
from boltlm.reporting.lockfile import LockedFile, LockedStage, locked_stages
from boltlm.reporting.provenance import changed_metrics, stage_costs, versions
from boltlm.reporting.results import read_results
from boltlm.reporting.summary import Summary, find_warnings
from boltlm.shard_store import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")
MD5_CHARACTERS = 12  # of a hash, in the table of stages
_SCROLL = '<div class="scroll" tabindex="0">'  # wide tables scroll, the page does not
ABOUT_GRAPH = (
    "Each stage after those that it reads, with the beginning of the MD5 hash that dvc.lock has of"
    " each output."
)
ABOUT_COST = (
    "Seconds were measured where the stage ran. Tokens: trained on, run through the model, or, of a"
    " teacher, in its latents. A dash: not measured, or it does not apply."
)
COST_HEAD = ("stage", "seconds", "FLOPs", "tokens", "US dollars")
MORE_DOCUMENTS = "Other documents: boltlm browse data/latents/<entry> --doc <id>."


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentPaths:
    """What the report reads: the metrics, `metrics/figures`, the wall-clock figures, dvc.lock, and
    the folders `data` and `models`."""

    metrics: Path
    figures: Path
    timings: Path
    lock: Path
    data: Path
    models: Path

    @property
    def evaluations(self) -> Path:
        return self.data / "evaluate"


def write_html_report(settings: HtmlReportSettings, paths: ExperimentPaths, out: Path) -> None:
    """Write the page to the file `out`, completely or not at all, and beside it its summary,
    warnings and versions as JSON."""
    results = read_results(settings, paths.metrics, paths.timings)
    stages = locked_stages(settings, paths.lock)
    warnings = find_warnings(settings, results, paths.metrics)
    warnings += [
        f"{path} is not what dvc.lock says; run dvc repro."
        for path in changed_metrics(stages, paths.lock.parent)
    ]
    sentences = Summary(settings, results, paths.evaluations).sentences()
    report = paths.figures / "report.md"
    before = [
        _section("Summary", _items("ol", sentences)),
        _section("Warnings", _items("ul", warnings or ["None."]), "warnings"),
        f"<section>{markdown_html(report)}</section>" if report.is_file() else "",
    ]
    facts = versions()
    costs = stage_costs(settings, results, paths.metrics)
    after = [
        _section("Graph", f"<p>{ABOUT_GRAPH}</p>{_stage_table(stages)}"),
        _section("Cost and time", f"<p>{ABOUT_COST}</p>{html_table(COST_HEAD, costs)}"),
        _section("Versions", html_table(["of this machine", "version"], list(facts.items()))),
    ]
    data = browser_data(settings, DataFolders(paths.data, paths.models))
    data["more"] = MORE_DOCUMENTS
    page = render_page(
        f"Experiment {out.parent.name}", data, before="".join(before), after="".join(after)
    )
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_write(out.with_name(FACTS_FILE)) as temporary:
        content = {"summary": sentences, "warnings": warnings, "versions": facts}
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def render_page(title: str, data: Mapping[str, Any], *, before: str = "", after: str = "") -> str:
    """The template with its slots filled. `data`: of the latent browser; `before` and `after`: HTML
    around it."""
    template = TEMPLATE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    slots = {
        "title": html.escape(title),
        "script_hash": f"sha256-{digest}",
        "before": before,
        "after": after,
        "data": script_json(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)


def script_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment,
    and it is ASCII."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def markdown_html(path: Path) -> str:
    """A Markdown file as HTML, one heading level lower, with the images beside it as data URIs.
    HTML in it is text; links, which lead to files that a lone page does not have, are text too."""
    markdown = (
        MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "autolink"])
    )
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"(?<!!)\[([^\]\n]*)\]\([^)\n]*\)", r"\1", text)
    tokens = markdown.parse(re.sub(r"^#", "##", text, flags=re.M))
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                child.attrs["src"] = _data_uri(path.parent / str(child.attrs["src"]))
    body = markdown.renderer.render(tokens, markdown.options, {})
    return body.replace("<table>", f"{_SCROLL}<table>").replace("</table>", "</table></div>")


def _data_uri(path: Path) -> str:
    """The content of an image; an empty one where there is no such file."""
    content = path.read_bytes() if path.is_file() else b""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped; line breaks in a cell are kept."""
    lines = [_cells("th", head), *(_cells("td", row) for row in rows)]
    return f"{_SCROLL}<table>{''.join(lines)}</table></div>"


def _stage_table(stages: Sequence[LockedStage]) -> str:
    rows = [
        [stage.name, ", ".join(stage.parents), "\n".join(map(_describe_file, stage.outputs))]
        for stage in stages
    ]
    return html_table(["stage", "reads the outputs of", "outputs"], rows)


def _describe_file(file: LockedFile) -> str:
    return f"{file.path} {file.md5[:MD5_CHARACTERS]} ({file.size:,} bytes)"


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{html.escape(title)}</h2>{body}</section>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    cells = (html.escape(text).replace("\n", "<br>") for text in texts)
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _items(tag: str, texts: Sequence[str]) -> str:
    return f"<{tag}>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</{tag}>"

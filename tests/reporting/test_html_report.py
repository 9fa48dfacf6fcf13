"""The HTML page: sentences, warnings and hashes, and that no text of a document becomes code."""

import base64
import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.reporting.html_report import (
    ExperimentPaths,
    markdown_html,
    render_page,
    write_html_report,
)
from boltlm.reporting.lockfile import locked_stages
from boltlm.reporting.provenance import changed_metrics, stage_costs
from boltlm.reporting.results import Results, read_results
from boltlm.reporting.summary import Summary, find_warnings
from boltlm.timing import timing_path, write_timing
from tests.evaluation.test_compare import write_model
from tests.reporting.experiment import chain_params, write_metrics
from tests.reporting.latents import (
    CHAIN,
    HOSTILE,
    LONG_WORD,
    page_settings,
    write_models,
    write_tables,
)


class PageParser(HTMLParser):
    """Collects every element with its attributes, and the content of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self.in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data
        self.text += data


def results_of(root: Path) -> Results:
    write_metrics(chain_params(CHAIN), root)
    return read_results(page_settings(), root / "metrics")


def paths_of(root: Path) -> ExperimentPaths:
    return ExperimentPaths(
        metrics=root / "metrics",
        figures=root / "metrics/figures",
        timings=root / "timings",
        lock=root / "dvc.lock",
        data=root / "data",
        models=root / "models",
    )


def write_hostile(root: Path) -> str:
    """The page of an experiment whose texts, figures and captions are hostile."""
    write_metrics(chain_params(CHAIN), root)
    write_tables(root, (HOSTILE, LONG_WORD))
    write_models(root)
    figures = root / "metrics/figures"
    figures.mkdir(parents=True)
    (figures / "a.png").write_bytes(b"pixels")
    rows = f"# Results\n\n| a | b |\n| --- | ---: |\n| {HOSTILE.replace('|', '')} | 1 |\n"
    text = f"{rows}\n{HOSTILE}\n\n![caption](a.png)\n\ncaption [a.csv](javascript:alert(3))\n"
    (figures / "report.md").write_text(text, encoding="utf-8")
    out = root / "reports" / "index.html"
    write_html_report(page_settings(), paths_of(root), out)
    return out.read_text(encoding="utf-8")


def test_text_never_becomes_code(tmp_path: Path) -> None:
    """A hostile document, table and caption: two scripts, both ours, no handler, and nothing that
    is loaded from elsewhere; the policy allows the second script only."""
    page = write_hostile(tmp_path)
    parsed = PageParser(page)
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == 2
    assert "-->" not in page
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert tag not in ("a", "link", "iframe", "base", "object")
        assert (attributes.get("src") or "data:").startswith("data:")
    images = [attributes["src"] for tag, attributes in parsed.elements if tag == "img"]
    assert images == [f"data:image/png;base64,{base64.b64encode(b'pixels').decode()}"]
    data = json.loads(parsed.scripts[0])
    assert {document["chunks"][0]["text"] for document in data["documents"]} == {HOSTILE}
    assert data["documents"][0]["chunks"][1]["text"] == LONG_WORD
    assert parsed.text.count("<script>alert(1)</script>") == 2, "as text, in the table and below"
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv")) or ""
    digest = base64.b64encode(hashlib.sha256(parsed.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_page_is_laid_out_for_phones_and_for_print() -> None:
    """The width is that of the screen, long words break, wide tables scroll, print has rules."""
    page = render_page("Title", {"entries": [], "documents": [], "notes": []})
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    for rule in ("overflow-wrap: anywhere", "overflow-x: auto", "@media print", "max-width: 100%"):
        assert rule in page
    assert "{{" not in page


def test_a_slot_in_a_text_is_not_filled() -> None:
    data = {"entries": [], "documents": [], "notes": ["{{before}}"]}
    assert render_page("{{data}}", data, before="<p>once</p>").count("<p>once</p>") == 1


def test_markdown_has_its_tables_and_a_missing_image_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text("# One\n\n| a |\n| --- |\n| −1 |\n\n![x](no.png)\n", encoding="utf-8")
    body = markdown_html(path)
    assert "<h2>One</h2>" in body
    assert "<td>−1</td>" in body
    assert 'src="data:image/png;base64,"' in body


def test_filters_and_orders_in_the_browser(tmp_path: Path) -> None:
    """The script of the page under node, with a document object of its own."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed on this machine")
    scripts = PageParser(write_hostile(tmp_path)).scripts
    data: dict[str, Any] = json.loads(scripts[0])
    facts = {"d0": (1.0, 0.5), "d1": (None, 0.3), "d2": (5.0, 0.9), "d3": (-2.0, 0.8)}
    for document in data["documents"]:
        document["gain"], document["ess"] = facts.get(document["id"], (0.5, 0.4))
    (tmp_path / "script.js").write_text(scripts[1], encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    program = Path(__file__).with_name("browser_script.js")
    command = [node, str(program), str(tmp_path / "script.js"), str(tmp_path / "data.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert sorted(found["reading"]) == [f"d{index}" for index in range(6)]
    assert found["gain"][0] == "d2"
    assert found["gain"][-2:] == ["d3", "d1"], "a document without a gain is last"
    assert found["ess"][0] == "d1"
    assert found["ess"][-1] == "d2"
    assert found["change"][0] == "d2"
    assert (found["invalid"], found["invalidCount"]) == (["d1"], "1 of 6 documents")
    assert (found["search"], found["nothing"]) == (["d2"], [])
    assert found["text"].count(HOSTILE) > 4
    assert not {"script", "img"} & set(found["tags"])
    assert "all 3 draws" in found["text"]
    assert "in proportion to the weights: its weight is 66.5 %, rank 1 of 3" in found["text"]
    assert found["opened"] == "?doc=a%20b%26c"


def test_the_summary_compares_the_last_model_pair_by_pair(tmp_path: Path) -> None:
    """m2 against m0 and m1, and the best control; paired where the tables are there. The models of
    `write_model` differ by 0.05 nats per token and by 20 points of accuracy."""
    results = results_of(tmp_path)
    for name, shift, accuracy, seed in (("m0", 0.0, 0.5, 2), ("m2", -0.05, 0.7, 3)):
        write_model(tmp_path / "evaluate" / name, shift, seed, accuracy=accuracy)
    evaluate = replace(page_settings().evaluate, corpus="held")  # that of the tables
    settings = replace(page_settings(), evaluate=evaluate)
    sentences = Summary(settings, results, tmp_path / "evaluate").sentences()
    assert len(sentences) == 5
    assert "m0 → m1 → m2 has 2 iterations with K = 4" in sentences[0]
    assert "of m2 is −2.375, 0.05" in sentences[1]
    assert "above that of m0 (−2.625)" in sentences[1]
    assert "paired over 100 clusters: significant" in sentences[1]
    assert "0.125 above that of m1 (−2.500)" in sentences[2]
    assert "difference +0.068 to +0.182, not paired: significant" in sentences[2]
    assert "20.0 percentage points above that of m0" in sentences[3]
    assert "the best model outside the chain" in sentences[4]


def test_a_difference_within_its_error_is_not_significant(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    for name, value in (("m1", -3.5), ("m2", -3.49)):
        metrics = {"elbo_per_token_k4": value, "elbo_per_token_k4_se": 0.1, "heldout_clusters": 44}
        (tmp_path / f"metrics/eval/{name}.json").write_text(json.dumps(metrics))
    results = read_results(page_settings(), tmp_path / "metrics")
    sentence = Summary(page_settings(), results, tmp_path / "none").sentences()[2]
    assert sentence.endswith("−0.275 to +0.295, not paired: not significant.")


def test_the_summary_without_numbers(tmp_path: Path) -> None:
    results = read_results(page_settings(), tmp_path)
    sentences = Summary(page_settings(), results, tmp_path).sentences()
    assert "Fewer than two models have a likelihood" in sentences[1]


def test_warnings_name_what_speaks_against_the_numbers(tmp_path: Path) -> None:
    """Each where its cause is there, and not where it is not."""
    results_of(tmp_path)
    metrics = tmp_path / "metrics"
    low = {"ess_mean": 1.2, "candidates": 400, "chunks": 100, "forced_fraction": 0.3}
    good = {"ess_mean": 3.2, "candidates": 400, "chunks": 100, "forced_fraction": 0.01}
    for name, facts in (("by_m0", low), ("by_m1", good), ("fixed", good)):
        (metrics / f"latents/{name}.json").write_text(json.dumps(facts))
    task = {
        "gsm8k/standard/latent/lost_shots_fraction": 0.5,
        "gsm8k/x/latent/invalid_fraction": 0.2,
    }
    (metrics / "eval/m1.json").write_text(json.dumps(task))
    split = {"contamination/heldout/overlapping_items": 3, "contamination/heldout/items": 9}
    (metrics / "split.json").write_text(json.dumps({**split, "cut_chunks": 2}))
    (metrics / "teacher").mkdir()
    (metrics / "teacher/some.json").write_text(json.dumps({"chunks": 9, "latents": 5}))
    settings = page_settings()
    warnings = "\n".join(find_warnings(settings, read_results(settings, metrics), metrics))
    for text in (
        "seed 1 only",
        "by_m0: low effective sample size, 1.20 of 4",
        "by_m0: 30.0% of the draws",
        "m1: 50.0% of the prompts of gsm8k/standard/latent lost shots",
        "m1: 20.0% of the answers of gsm8k/x/latent are invalid",
        "3 of 9 items of heldout",
        "2 chunks were cut",
        "teacher some: 4 chunks have no latent",
        "finetune absent: not measured",
    ):
        assert text in warnings
    assert "by_m1" not in warnings
    (metrics / "split.json").write_text(json.dumps({**split, "em/dropped_contaminated": 3}))
    assert "items of heldout" not in "\n".join(
        find_warnings(settings, read_results(settings, metrics), metrics)
    )


def test_stages_are_those_of_the_experiment_each_after_what_it_reads(tmp_path: Path) -> None:
    """A stage that another preset left in dvc.lock is not among them; a metrics file that was
    changed by hand is noticed."""
    good = tmp_path / "metrics/eval/m0.json"
    good.parent.mkdir(parents=True)
    good.write_text("{}")
    out = {"md5": hashlib.md5(b"{}").hexdigest(), "size": 2}
    stages = {
        "evaluate@m0": {
            "deps": [{"path": "models/m0"}],
            "outs": [{"path": "metrics/eval/m0.json", **out}],
        },
        "evaluate@other": {"deps": [], "outs": []},
        "train@m0": {"deps": [{"path": "data/x/em"}], "outs": [{"path": "models/m0", **out}]},
        "split": {"deps": [], "outs": [{"path": "data/x", **out}]},
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    found = locked_stages(page_settings(), tmp_path / "dvc.lock")
    assert [(stage.name, stage.parents) for stage in found] == [
        ("split", ()),
        ("train@m0", ("split",)),
        ("evaluate@m0", ("train@m0",)),
    ]
    assert changed_metrics(found, tmp_path) == []
    good.write_text('{"elbo_per_token": 0}')
    assert changed_metrics(found, tmp_path) == ["metrics/eval/m0.json"]
    assert locked_stages(page_settings(), tmp_path / "none") == []


def test_cost_and_time_of_each_stage(tmp_path: Path) -> None:
    results_of(tmp_path)
    metrics = tmp_path / "metrics"
    (metrics / "teacher").mkdir()
    (metrics / "teacher/some.json").write_text(json.dumps({"latent_tokens": 70, "cost_usd": 1.5}))
    curve = metrics / "train/m1.csv"
    write_timing(timing_path(tmp_path, "train", "m1"), curve, [{"seconds": 1.0}, {"seconds": 9.5}])
    facts = {"training_flops": 2.5e9, "training_tokens": 1200}
    (metrics / "train/m1.json").write_text(json.dumps(facts))
    results = read_results(page_settings(), metrics, tmp_path)
    costs = {cost.stage: cost[1:] for cost in stage_costs(page_settings(), results, metrics)}
    assert costs["teacher@some"] == ("–", "–", "70", "1.50")
    assert costs["train@m1"] == ("9.5", "2.50e+09", "1,200", "–")
    assert costs["train@m2"] == ("–", "–", "300", "–")

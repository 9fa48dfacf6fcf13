"""Pictures and report show the numbers of the metrics files, for models of any name."""

import csv
import json
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from boltlm.errors import UserError
from boltlm.figures import curves, iterations
from boltlm.figures.arms import arms, chain
from boltlm.figures.drawing import Drawn
from boltlm.figures.report import make
from boltlm.figures.results import parts, points, read

LAPTOP = ("warmstart", "em1", "em2", "em3", "em4")
RENAMED = ("gpt", "first", "second")
PICTURES = {"elbo", "accuracy", "parts", "diagnostics", "training", "heldout", "log_weight"}


def model(data: str, form: str = "latent", parent: str = "base") -> dict[str, Any]:
    return {"parent": parent, "corpus": "em", "data": data, "format": form}


def experiment(line: Sequence[str]) -> dict[str, Any]:
    """Params of a chain of these models, its controls listed before it and among it."""
    drawn = {f"by_{one}": {"model": one, "corpus": "em"} for one in line[:-1]}
    chained = {two: model(f"latents/by_{one}") for one, two in pairwise(line)}
    return {
        "latents": {"ice": {"model": line[0], "corpus": "em"}, **drawn},
        "finetune": {"runs": {"tuned": {}, "absent": {}}},
        "models": {
            "plain": model(f"latents/by_{line[0]}", "raw"),
            "mix": model(f"latents/by_{line[0]}", "mixed"),
            "told": model("teacher/all"),
            line[0]: model("teacher/some"),
            **chained,
            "still": model("latents/ice"),
        },
    }


def measures(place: int, *, raw: bool) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "nll_per_token": 1.5 - place / 64,
        "nll_per_token_se": 0.01,
        "questions/standard/raw/accuracy": 0.1 + place / 64,
        "questions/standard/raw/accuracy_se": 0.01,
    }
    if not raw:
        names = "elbo_per_token_k1 elbo_per_token_k4 elbo_per_token utility simplicity diversity"
        for offset, name in enumerate(names.split()):
            found |= {name: -2 - offset + place / 8, f"{name}_se": 0.02}
        found |= {
            "questions/standard/latent/accuracy": 0.3 + place / 32,
            "exact_fraction": place / 16,
            "math/synthetic/latent/accuracy": 0.1 + place / 64,
        }
        found |= {"exact_fraction_kept": place / 12, "latent_tokens_mean": 20.0 + place}
        found |= {"ess_mean": 2 + place / 8, "unfinished_fraction": 0.0, "ess_p10": None}
    return found


def write(params: dict[str, Any], root: Path) -> None:
    """Metrics and latents as the stages write them; one draw in eight is unfinished."""
    for folder in ("eval", "finetune", "latents", "train"):
        (root / "metrics" / folder).mkdir(parents=True)
    facts = {"gsm8k/standard/latent/accuracy": 0.25, "gsm8k/standard/latent/accuracy_se": 0.02}
    facts |= {"gsm8k/standard/latent/accuracy_se_seeds": 0.03, "seeds": 5, "samples": 16}
    (root / "metrics/finetune/tuned.json").write_text(json.dumps(facts))
    for place, (name, entry) in enumerate(params["models"].items()):
        facts = measures(place, raw=entry["format"] == "raw")
        (root / "metrics/eval" / f"{name}.json").write_text(json.dumps(facts))
        bound = "" if entry["format"] == "raw" else str(-3 - place)
        told = {1: ",2.5,", 2: ",,", 3: f",{2.75 - place},{bound}"}
        lines = [f"{s},{s * 100},{5 / s + place},0.1,1,9,{s}{told[s]}" for s in (1, 2, 3)]
        head = "step,tokens,loss,lr,grad_norm,tokens_per_second,seconds,heldout_nll,heldout_elbo"
        text = "\n".join([head, *lines])
        (root / "metrics/train" / f"{name}.csv").write_text(text + "\n")
    for place, name in enumerate(params["latents"]):
        facts = {
            "ess_mean": 2.5,
            "samples": 1600,
            "unfinished_fraction": 0.125,
            "seconds": 0.0,
            "exact_fraction": None,
        }
        (root / "metrics/latents" / f"{name}.json").write_text(json.dumps(facts))
        lines = [f"{low / 2},{low / 2 + 0.5},{count}" for low, count in histogram(place)]
        text = "\n".join(["from_nats,to_nats,count", *lines])
        (root / "metrics/latents" / f"{name}.csv").write_text(text + "\n")


def histogram(place: int) -> list[tuple[int, int]]:
    """One draw far below all others, and 1400 between −30 and −10 nats."""
    return [(-2000, 1), *((low + place, 35) for low in range(-60, -20))]


def draw(params: dict[str, Any], root: Path) -> Path:
    out = root / "figures"
    make(params, metrics=root / "metrics", out=out)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("line", [LAPTOP, LAPTOP[:3], RENAMED])
def test_the_chain_is_found_by_who_drew_whose_latents(line: Sequence[str]) -> None:
    found = arms(experiment(line))
    assert [arm.name for arm in chain(found)] == list(line)
    assert [arm.iteration for arm in chain(found)] == list(range(len(line)))
    others = {arm.name: (arm.role, arm.generator) for arm in found if arm.name not in line}
    assert others == {
        "plain": ("raw", None),
        "mix": ("other", line[0]),
        "told": ("teacher", None),
        "still": ("frozen", line[0]),
    }


def test_of_equally_long_chains_the_first_counts() -> None:
    params = experiment(LAPTOP[:2])
    assert [arm.name for arm in chain(arms(params))] == ["warmstart", "em1"]
    params["models"] = dict(reversed(params["models"].items()))
    assert [arm.name for arm in chain(arms(params))] == ["warmstart", "still"]


def test_without_drawn_latents_there_is_no_chain() -> None:
    params = {"latents": {}, "models": {"a": model("teacher/x"), "b": model("split/x", "raw")}}
    assert [arm.role for arm in arms(params)] == ["teacher", "raw"]


def test_models_that_draw_for_each_other_are_refused_by_name() -> None:
    params = {
        "latents": {"x": {"model": "b"}, "y": {"model": "a"}},
        "models": {"a": model("latents/x"), "b": model("latents/y")},
    }
    with pytest.raises(UserError, match="a ← b ← a"):
        arms(params)


@pytest.mark.parametrize("line", [LAPTOP, RENAMED])
def test_beside_every_picture_lies_a_table_of_the_very_numbers(
    tmp_path: Path, line: Sequence[str]
) -> None:
    params = experiment(line)
    write(params, tmp_path)
    out = draw(params, tmp_path)
    assert {path.stem for path in out.glob("*.png")} == PICTURES
    assert {path.stem for path in out.glob("*.csv")} == PICTURES
    for stem in ("elbo", "accuracy", "parts", "diagnostics"):
        for row in rows(out / f"{stem}.csv"):
            facts = json.loads((tmp_path / f"metrics/eval/{row['model']}.json").read_text())
            assert float(row["value"]) == facts[row["metric"]]
            assert row["se"] == str(facts.get(f"{row['metric']}_se", ""))
    bound = {row["model"]: row for row in rows(out / "elbo.csv")}
    assert set(bound) == set(params["models"])
    assert [bound[name]["iteration"] for name in line] == [str(t) for t in range(len(line))]
    assert bound["plain"]["metric"] == "nll_per_token"
    spaces = {(row["model"], row["metric"].split("/")[2]) for row in rows(out / "accuracy.csv")}
    assert spaces >= {(name, space) for name in line for space in ("latent", "raw")}
    assert len(rows(out / "parts.csv")) == 3 * len(line)
    assert len(rows(out / "diagnostics.csv")) == 5 * len(line)
    losses = [float(row["loss"]) for row in rows(out / "training.csv") if row["model"] == "mix"]
    assert losses == [6.0, 3.5, 5 / 3 + 1]


def test_the_histogram_shows_the_bulk_and_the_table_all(tmp_path: Path) -> None:
    """A single outlier must not squeeze the picture, nor vanish from the numbers."""
    params = experiment(RENAMED)
    write(params, tmp_path)
    table = rows(draw(params, tmp_path) / "log_weight.csv")
    assert {row["latents"] for row in table} == {"by_gpt", "by_first"}
    for name in ("by_gpt", "by_first"):
        assert sum(float(row["count"]) for row in table if row["latents"] == name) == 1401
    drawn = curves.log_weight(read(params, tmp_path / "metrics"))
    assert isinstance(drawn, Drawn)
    low, _ = drawn.figure.axes[0].get_xlim()
    assert low > -32


def test_controls_are_drawn_at_their_bound_or_at_minus_their_nll(tmp_path: Path) -> None:
    params = experiment(RENAMED)
    write(params, tmp_path)
    results = read(params, tmp_path / "metrics")
    drawn = iterations.elbo(results)
    assert isinstance(drawn, Drawn)
    axes = drawn.figure.axes[0]
    heights = {
        float(np.asarray(line.get_ydata())[0])
        for line in axes.lines
        if list(np.asarray(line.get_xdata())) == [0, 1]
    }
    wanted = {results.measures[name]["elbo_per_token"] for name in ("mix", "told", "still")}
    assert heights == wanted | {-results.measures["plain"]["nll_per_token"]}


def test_labels_of_equal_controls_do_not_touch(tmp_path: Path) -> None:
    params = experiment(RENAMED)
    params["models"] |= {f"raw_{i}": model("split/em", "raw") for i in range(9)}
    write(params, tmp_path)
    for path in (tmp_path / "metrics/eval").glob("raw_*.json"):
        path.write_text(json.dumps({"nll_per_token": 1.5}))
    drawn = iterations.elbo(read(params, tmp_path / "metrics"))
    assert isinstance(drawn, Drawn)
    FigureCanvasAgg(drawn.figure).draw()
    boxes = [text.get_window_extent() for text in drawn.figure.axes[0].texts]
    assert len(boxes) == 13
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    params = experiment(RENAMED)
    write(params, tmp_path)
    first = {path.name: path.read_bytes() for path in draw(params, tmp_path).iterdir()}
    second = {path.name: path.read_bytes() for path in draw(params, tmp_path).iterdir()}
    assert first == second


def test_the_report_names_every_model_and_links_every_picture(tmp_path: Path) -> None:
    params = experiment(RENAMED)
    write(params, tmp_path)
    text = (draw(params, tmp_path) / "report.md").read_text()
    for name in (*params["models"], *params["latents"]):
        assert f"\n| {name} |" in text
    assert all(f"({stem}.png)" in text for stem in PICTURES)
    assert "| second | iteration 2 | −3.375 ± 0.020 | 1.422 ± 0.010 |" in text
    assert "left out" not in text
    assert "| tuned | gsm8k/standard/latent | 25.0% ± 2.0% | 3.0% | – | 5 | 16 |" in text
    assert "absent" not in text
    assert "| second | 17.8% |" in text
    assert "| plain | – |" in text


def test_fine_tunings_are_logged_by_their_names(tmp_path: Path) -> None:
    """For MLflow: a number of the experiment and a part of its own, where the run was made."""
    params = experiment(RENAMED)
    write(params, tmp_path)
    results = read(params, tmp_path / "metrics")
    assert ("finetune/tuned/gsm8k/standard/latent/accuracy", 0.25, 0) in points(results)
    assert ("gsm8k/standard/latent/accuracy", 0.25, 0) in parts(results)["finetune/tuned"]


def test_what_is_missing_is_left_out_and_told(tmp_path: Path) -> None:
    """A part of the graph, a preset without a chain, and nothing at all each give a report."""
    params = experiment(RENAMED)
    write(params, tmp_path)
    out = draw(params, tmp_path)
    (tmp_path / "metrics/eval/first.json").unlink()
    for path in (tmp_path / "metrics/train").iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")
    draw(params, tmp_path)
    assert {path.stem for path in out.glob("*.png")} == PICTURES - {"training", "heldout"}
    assert not (out / "training.csv").exists()
    known = {row["iteration"] for row in rows(out / "elbo.csv") if row["iteration"]}
    assert known == {"0", "2"}
    assert "`training.png` is left out: " in (out / "report.md").read_text()
    params["models"] = {"plain": model("split/em", "raw")}
    draw(params, tmp_path)
    assert not list(out.glob("*.png"))
    assert (out / "report.md").read_text().count("is left out: ") == len(PICTURES)
    assert "| plain | raw text | – | 1.500 ± 0.010 |" in (out / "report.md").read_text()
    empty = tmp_path / "empty"
    assert (draw(experiment(LAPTOP), empty) / "report.md").read_text().count(
        "is left out: "
    ) == len(PICTURES)


def test_the_best_so_far_is_drawn_beside_the_exact_curve(tmp_path: Path) -> None:
    """As the paper draws it: a likelihood that gets worse leaves the line where it was; a model
    that was not measured for a bound has no line for it."""
    write(experiment(LAPTOP), tmp_path)
    make(experiment(LAPTOP), metrics=tmp_path / "metrics", out=tmp_path / "out")
    found = rows(tmp_path / "out" / "heldout.csv")
    by = {(row["model"], row["measure"], row["tokens"]): row for row in found}
    worse, better = by["plain", "heldout_nll", "300.0"], by["mix", "heldout_nll", "300.0"]
    assert (worse["value"], worse["best"]) == ("2.75", "2.5")
    assert (better["value"], better["best"]) == ("1.75", "1.75")
    assert by["mix", "heldout_elbo", "300.0"]["best"] == "-4.0"
    assert ("plain", "heldout_elbo", "300.0") not in by

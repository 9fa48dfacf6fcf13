"""The plan of an experiment: the paper's totals, the laptop's recorded figures, what is done."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.commands.plan import plan_report
from boltlm.errors import UserError
from boltlm.params import build_settings, load
from boltlm.reporting.plan import Planner, StagePlan
from boltlm.reporting.plan_config import ACCELERATORS, PlanSettings, pretrained_size
from boltlm.reporting.plan_table import short_count
from boltlm.training.config import PretrainConfig
from tests import tiny


def planned(path: str, device: str = "h200", count: int = 8) -> dict[str, StagePlan]:
    settings = build_settings(PlanSettings, load(tiny.ROOT / path))
    return {stage.stage: stage for stage in Planner(settings, ACCELERATORS[device], count).stages()}


def test_the_papers_fixed_data_experiment_has_the_papers_totals() -> None:
    """Sec. 6.1: 240 M and 1.92 B raw tokens, 13 B tokens and 33.2 k steps an iteration."""
    stages = planned("presets/paper-fixed.yaml")
    assert stages["teacher@warmstart"].raw_tokens == pytest.approx(240e6, rel=0.02)
    for name in ("em1", "em4"):
        train = stages[f"train@{name}"]
        assert train.raw_tokens == pytest.approx(1.92e9, rel=0.02)
        assert train.training_tokens == pytest.approx(13e9, rel=0.02)
        assert train.steps == pytest.approx(33_200, rel=0.02)
    assert stages["train@raw_tokens"].training_tokens == pytest.approx(3.84e9, rel=0.02)


def test_the_papers_comparison_has_the_papers_totals() -> None:
    """Sec. 5: 480 M raw tokens, 8 B training tokens, 40.7 k steps."""
    stages = planned("presets/paper-compare.yaml")
    arm = stages["train@latent"]
    assert arm.raw_tokens == pytest.approx(480e6, rel=0.02)
    assert arm.training_tokens == 8_000_000_000
    assert arm.steps == pytest.approx(40_700, rel=0.02)
    assert stages["teacher@latent"].usd == pytest.approx(600, rel=0.15)  # as the preset says


@pytest.mark.parametrize(
    "path", sorted((tiny.ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_has_a_plan(path: Path) -> None:
    """Each stage but a checkpoint and teachers without requests takes FLOPs or dollars."""
    stages = planned(f"presets/{path.name}")
    assert {"base", "split", "evaluate_base"} <= stages.keys()
    for stage in stages.values():
        if stage.stage.startswith(("train@", "latents@")):
            assert stage.flops, stage.stage
            assert stage.seconds, stage.stage


def test_the_plan_of_the_laptop_experiment_is_near_to_what_it_recorded() -> None:
    """Tokens and FLOPs of trainings and E-steps, within 15 per cent."""
    stages = planned("params.yaml", "cpu", 1)
    for name in ("warmstart", "em1", "em3", "frozen", "raw_tokens"):
        recorded = json.loads((tiny.ROOT / "metrics" / "train" / f"{name}.json").read_text())
        stage = stages[f"train@{name}"]
        assert stage.training_tokens == pytest.approx(recorded["training_tokens"], rel=0.15)
        assert stage.flops == pytest.approx(recorded["training_flops"], rel=0.15)
    recorded = json.loads((tiny.ROOT / "metrics" / "latents" / "em1.json").read_text())
    assert stages["latents@em1"].flops == pytest.approx(recorded["estep_flops"], rel=0.15)
    assert stages["latents@em1"].chunks == recorded["chunks"]


def test_flops_of_a_token_are_those_of_the_model_that_the_stage_base_makes() -> None:
    """The size from params equals the number of weights of the Llama itself."""
    config = build_settings(PlanSettings, load(tiny.ROOT / "params.yaml")).base
    assert isinstance(config, PretrainConfig)
    size = pretrained_size(config)
    model = tiny.llama(1, vocab_size=448, hidden_size=8)
    small = dataclasses.replace(
        config, hidden_size=8, num_layers=2, intermediate_size=16, vocab_size=448
    )
    assert pretrained_size(small).parameters == sum(p.numel() for p in model.parameters())
    assert size.embedding_parameters == 448 * 128


def test_two_devices_take_half_the_time_and_the_same_flops() -> None:
    """Starting a stage aside."""
    one, two = (planned("presets/paper-fixed.yaml", "a100", n)["train@em1"] for n in (1, 2))
    assert one.flops == two.flops
    assert one.seconds is not None
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.01)


def test_a_corpus_without_a_size_is_named() -> None:
    """An estimate is asked for, not guessed."""
    params = load(tiny.ROOT / "params.yaml")
    del params["plan"]["document_tokens"]["em"]
    with pytest.raises(UserError, match=r"plan\.document_tokens has no entry 'em'"):
        build_settings(PlanSettings, params)


def report(tmp_path: Path, params: dict[str, Any], **changes: Any) -> str:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    values = {"params": tmp_path / "params.yaml", "gpu": None, "gpus": None, "measured": False}
    values |= {"metrics": tmp_path / "metrics", "timings": tmp_path / "timings"}
    return plan_report(argparse.Namespace(**values | {"lock": tmp_path / "dvc.lock"} | changes))


def state(text: str, stage: str) -> str:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [stage]]
    return line.split("  ")[-1].strip()


def test_a_stage_is_done_while_its_params_and_outputs_are_there(tmp_path: Path) -> None:
    """As dvc.lock has it."""
    params = load(tiny.ROOT / "params.yaml")
    locked = {"seed": 1, "models.em1": params["models"]["em1"]}
    stage = {"params": {"params.yaml": locked}, "outs": [{"path": "models/em1"}]}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train@em1": stage}}))
    assert state(report(tmp_path, params), "train@em1") == "to do"
    (tmp_path / "models" / "em1").mkdir(parents=True)
    assert state(report(tmp_path, params), "train@em1") == "done"
    assert state(report(tmp_path, params | {"seed": 2}), "train@em1") == "to do"


def test_recorded_figures_stand_below_those_of_the_plan(tmp_path: Path) -> None:
    """`--measured`, with the metrics of the laptop experiment."""
    params = load(tiny.ROOT / "params.yaml")
    text = report(tmp_path, params, measured=True, metrics=tiny.ROOT / "metrics")
    lines = text.splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.startswith("latents@em1 ")]
    assert lines[index + 1].split()[:2] == ["recorded", "–"]
    assert "2,000" in lines[index + 1]


def test_an_unknown_device_is_an_error(tmp_path: Path) -> None:
    """With those that are known."""
    params = load(tiny.ROOT / "params.yaml")
    with pytest.raises(UserError, match=r"--gpu must be cpu \| h200 .*found 'tpu'"):
        report(tmp_path, params, gpu="tpu")
    with pytest.raises(UserError, match="--gpus must be 1 or more, found 0"):
        report(tmp_path, params, gpus=0)


def test_short_counts() -> None:
    """Four digits at most."""
    numbers = {8123: "8,123", 33_200: "33.2k", 1_916_200_000: "1.916B", 13e9: "13B"}
    assert {number: short_count(number) for number in numbers} == numbers

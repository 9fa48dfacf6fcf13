"""Log-probabilities and weights of the E-step compared with a plain loop in float64."""

from pathlib import Path
from typing import Any

import pytest

from boltlm.estep.verify_weights import verify_weights
from tests.estep.stage_harness import LatentsStage


def errors(base_folder: Path, tmp_path: Path, **sampling: Any) -> dict[str, float]:
    stage = LatentsStage(tmp_path, base_folder, 100)
    stage.params["sampling"] |= sampling
    stage.params["max_latent_tokens"] = 30
    return verify_weights(stage.settings, 8, base_folder, stage.chunks, 30)


def test_float32_weights_are_exact(base_folder: Path, tmp_path: Path) -> None:
    """|Δ log w| < 10⁻³ nats for every sample, and the same distribution of the selection."""
    metrics = errors(base_folder, tmp_path)
    assert metrics["samples"] > 8
    assert metrics["log_weight_error_max"] < 1e-3
    assert metrics["log_q_error_max"] < 1e-3
    assert metrics["total_variation_max"] < 1e-3


@pytest.mark.parametrize("rescore_q", [False, True])
def test_bfloat16_errors_are_detected(base_folder: Path, tmp_path: Path, rescore_q: bool) -> None:
    """The comparison detects the errors of bfloat16; they stay below 1 nat with and without
    `rescore_q`."""
    metrics = errors(base_folder, tmp_path, precision="bfloat16", rescore_q=rescore_q)
    assert 1e-4 < metrics["log_weight_error_max"] < 1.0

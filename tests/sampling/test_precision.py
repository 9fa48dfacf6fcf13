"""Stored log-probabilities against a plain loop in float64."""

from pathlib import Path
from typing import Any

import pytest

from boltlm.sampling.precision import measure
from tests.sampling.test_shards import Stage


def report(base_folder: Path, tmp_path: Path, **sampling: Any) -> dict[str, float]:
    stage = Stage(tmp_path, base_folder, 100)
    stage.params["sampling"] |= sampling
    stage.params |= {"k_samples": 8, "max_latent_tokens": 30}
    return measure(stage.params, base_folder, tmp_path / "chunks" / "em", 30)


def test_in_float32_every_weight_is_exact(base_folder: Path, tmp_path: Path) -> None:
    """|Δ log w| < 10⁻³ nats for every sample, and the same selection."""
    found = report(base_folder, tmp_path)
    assert found["samples"] > 5
    assert found["log_weight_error_max"] < 1e-3
    assert found["log_q_error_max"] < 1e-3
    assert found["total_variation_max"] < 1e-3


@pytest.mark.parametrize("rescore", [False, True])
def test_bfloat16_is_told_from_float32(base_folder: Path, tmp_path: Path, rescore: bool) -> None:
    """The program sees what it is there to see; `rescore_q` keeps the error as small."""
    found = report(base_folder, tmp_path, precision="bfloat16", rescore_q=rescore)
    assert 1e-4 < found["log_weight_error_max"] < 1.0

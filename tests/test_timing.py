"""Wall-clock figures belong to one metrics file and are used with no other."""

from pathlib import Path

import pytest

from boltlm.timing import read_timing, timing_path, write_timing

LINES = [{"step": 10.0, "tokens_per_second": 1200.0}, {"step": 20.0, "tokens_per_second": 1300.0}]


def test_figures_are_read_back_while_the_metrics_are_the_same(tmp_path: Path) -> None:
    """DVC may restore the metrics of another run without running the stage."""
    metrics, path = tmp_path / "em1.csv", tmp_path / "timings" / "em1.json"
    metrics.write_text("step,loss\n10,1.5\n")
    assert read_timing(path, metrics) == []
    write_timing(path, metrics, LINES)
    assert read_timing(path, metrics) == LINES
    metrics.write_text("step,loss\n10,1.4\n")
    assert read_timing(path, metrics) == []
    metrics.unlink()
    assert read_timing(path, metrics) == []


def test_experiments_have_their_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued experiments run at the same time and share the folder."""
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    workspace = timing_path(Path("timings"), "train", "em1")
    monkeypatch.setenv("DVC_EXP_NAME", "noisy-seed")
    queued = timing_path(Path("timings"), "train", "em1")
    assert workspace == Path("timings/workspace/train/em1.json")
    assert queued == Path("timings/noisy-seed/train/em1.json")

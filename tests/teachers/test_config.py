"""The settings of teachers: wrong values are errors that name the key."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boltlm.errors import UserError
from boltlm.params import load
from tests import tiny
from tests.teachers.stage_harness import PRICES, TeacherStage


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "openai",
            {"corpus": "emm"},
            r"teachers\.t\.corpus must name an entry of corpora \(base, em, heldout\)",
        ),
        ("openai", {"task": "sum"}, r"teachers\.t\.task must be latent \| wrap_orig"),
        ("openai", {"task": "solve"}, r"teachers\.t: paraphrases must be 1 or more, found 0"),
        ("openai", {"max_attempts": 0}, r"teachers\.t\.max_attempts must be 1 or more"),
        ("openai", {"max_output_tokens": "64"}, r"max_output_tokens must be of type int"),
        ("openai", {"max_failed_fraction": 1.5}, r"max_failed_fraction must be in \[0, 1\]"),
        ("openai", {"concurrency": 0}, r"concurrency must be 1 or more"),
        ("openai", {"characters_per_token": 0}, r"characters_per_token must be above 0"),
        ("openai", {"expected_output_tokens": 0}, r"expected_output_tokens must be 1 or more"),
        ("openai", {"prices": {}}, r"missing key teachers\.t\.prices\.input_usd"),
        (
            "openai",
            {"prices": {**PRICES, "input_usd": -0.1}},
            r"prices\.input_usd must be 0 or more",
        ),
        ("openai", {"prices": {**PRICES, "output_usd": math.nan}}, r"must be a finite number"),
        ("openai", {"max_cost_usd": -1.0}, r"max_cost_usd must be 0 or more"),
        ("openai", {"max_outage_seconds": 0}, r"max_outage_seconds must be above 0"),
        ("openai", {"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ("openai", {"extra_body": {"n": 2, "stream": True}}, r"extra_body must not set n, stream"),
        ("openai", {"extra_body": {"a": {1, 2}}}, r"extra_body must be JSON"),
        ("openai", {"base_url": "localhost:8000/v1"}, r"base_url must be an address such as http"),
        ("vllm", {"temperature": None}, r"temperature must be a number, found None"),
        (
            "openai_batch",
            {"max_requests_per_batch": 50_001},
            r"must be in \[1, 50000\], found 50001",
        ),
        (
            "openai_batch",
            {"max_bytes_per_batch": 0},
            r"max_bytes_per_batch must be in \[1, 200000000\]",
        ),
        ("openai_batch", {"max_outage_seconds": 0}, r"max_outage_seconds must be above 0"),
        ("openai_batch", {"min_pilot_usable": 1.5}, r"min_pilot_usable must be in \[0, 1\]"),
        ("openai_batch", {"max_pilot_cost_ratio": 0}, r"max_pilot_cost_ratio must be above 0"),
        ("openai_batch", {"concurrency": 4}, r"unknown key teachers\.t\.concurrency"),
        ("vllm", {"max_cost_usd": 1.0}, r"unknown key teachers\.t\.max_cost_usd"),
    ],
)
def test_wrong_values_are_refused(
    kind: str,
    changes: dict[str, Any],
    message: str,
    make_stage: Callable[..., TeacherStage],
) -> None:
    """Before anything is sent."""
    stage = make_stage(documents=2)
    assert stage.configure(kind, None).settings.name == "t"
    with pytest.raises(UserError, match=message):
        _ = stage.configure(kind, None, **changes).settings


@pytest.mark.parametrize(
    "path", sorted((tiny.ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_responses_fit_the_limit_of_latents_in_presets(path: Path) -> None:
    """A teacher's tokens are no shorter than ours, so more of them would be a latent too long."""
    params = load(path)
    for teacher in params["teachers"].values():
        if teacher.get("task") == "latent":
            assert teacher["max_output_tokens"] <= params["max_latent_tokens"]

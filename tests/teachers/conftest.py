"""Fixtures: stages with corpora of the same documents, and mock servers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.teachers.server import KEY
from tests.teachers.stage_harness import ServerProcess, TeacherStage


@pytest.fixture
def make_stage(base_folder: Path, tmp_path: Path) -> Callable[..., TeacherStage]:
    """Makes stages; those of different names have the same documents and separate caches."""

    def make(name: str = "stage", **changes: Any) -> TeacherStage:
        return TeacherStage(tmp_path / name, base_folder, **changes)

    return make


@pytest.fixture
def make_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers, each with a state of its own; the API key is in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    servers: list[ServerProcess] = []

    def make(name: str = "server", **changes: Any) -> ServerProcess:
        servers.append(ServerProcess(tmp_path / f"{name}-state", **changes))
        return servers[-1].start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def server(make_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server without state."""
    return make_server()

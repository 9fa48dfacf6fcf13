"""dvc.lock and metrics/ in git belong to the code and the params in git."""

from pathlib import Path

import pytest
from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")
def test_committed_results_belong_to_the_committed_code_and_params() -> None:
    """Numbers in git that another code made are worse than none: run `make repro` and commit.

    Data and models are not in git; what is there (code, params, metrics) must be as dvc.lock
    says it was.
    """
    stale: list[str] = []
    with Repo(str(ROOT)) as repo:
        for stage in repo.index.stages:
            for item in [*stage.deps, *stage.outs]:
                path = Path(str(item))
                in_git = not path.is_absolute() and path.parts[0] in {"src", "stages", "metrics"}
                if isinstance(item, ParamsDependency):
                    status = item.workspace_status()
                elif in_git:
                    status = item.status()
                else:
                    continue
                if status:
                    stale.append(f"{stage.addressing}: {status}")
    assert not stale, "\n".join(stale)

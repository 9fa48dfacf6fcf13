"""Runs tasks with one model, whose answers are cached by the content of its weights."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boltlm.corpus.benchmarks import BenchmarkName
from boltlm.errors import UserError
from boltlm.estep.config import SamplingConfig
from boltlm.evaluation import downstream
from boltlm.evaluation.downstream import TaskAnswer, TaskOptions
from boltlm.evaluation.generation_cache import CachedLM
from boltlm.evaluation.task_spec import Backend, TaskSpec
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import Question, read_table
from boltlm.tokens import TextCoder


def task_data(spec: TaskSpec, benchmarks: Mapping[BenchmarkName, str], split: Path) -> str:
    """Where a task's questions are: a file or hub name, or the folder `questions` of the split.

    Raises UserError where the split has no questions.
    """
    if spec.task != "questions":
        return benchmarks[spec.task]
    if not next(read_table(split / "questions", Question), None):
        raise UserError(
            "the task 'questions' is to be evaluated, but questions.count is 0; raise"
            " questions.count or remove the task"
        )
    return str(split / "questions")


def task_facts(spec: TaskSpec, data_path: str) -> dict[str, Any]:
    """What a task is, for fingerprints: its name, the digests of the files of its questions (the
    name of a data set of the hub), and its definition for lm-eval. `data_path`: of `task_data`."""
    files = [hash_path(Path(path)) for path in sorted(glob.glob(data_path))]
    definition = (downstream.TASK_DIR / f"{spec.task}.yaml").read_text(encoding="utf-8")
    return {"name": spec.name, "questions": files or data_path, "definition": definition}


class TaskRunner:
    """Answers the questions of tasks with the model in a folder, which is loaded when the first
    answer is not cached. `model_digest` is the digest of the folder, `seed` that of sampled
    answers, `work` the folder of the caches; `label` names the progress displays."""

    def __init__(
        self,
        folder: Path,
        *,
        model_digest: str,
        backend: Backend,
        batch_size: int,
        sampling: SamplingConfig,
        seed: int,
        work: Path,
        label: str,
    ) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.backend: Backend = backend
        self.sampling, self.seed, self.label = sampling, seed, label
        code = ("boltlm.evaluation.generation_cache", "boltlm.evaluation.backends")
        facts = {
            "model": model_digest,
            "backend": backend,
            "precision": sampling.precision,
            "seed": seed,
            "code": [hash_code(module) for module in code],
        }
        self.cache = work / "answers" / fingerprint(facts)
        self.model: Any = None

    def run(self, spec: TaskSpec, options: TaskOptions) -> list[TaskAnswer]:
        """All answers of one task. Outside latent space the special tokens are never
        generated."""
        special = TextCoder(self.folder).special_tokens
        latent_tokens = (special.sol, special.eol, special.prior, special.post)
        model = CachedLM(
            self._load,
            self.cache / f"{spec.name.replace('/', '-')}.jsonl",
            label=f"{self.label}, {spec.name}",
            seed=self.seed,
            batch_size=self.batch_size,
            forbidden=() if spec.space == "latent" else latent_tokens,
        )
        return downstream.run_task(model, spec, options)

    def _load(self) -> Any:
        from boltlm.evaluation import backends

        if self.model is None:
            self.model = backends.load_lm(
                self.backend,
                self.folder,
                self.sampling.precision,
                self.batch_size,
                self.sampling.gpu_memory_utilization,
            )
        return self.model

"""The stage `finetune`: a model is fine-tuned on questions with thoughts and answers, and evaluated
on held-out questions, several samples each (docs/method.md, 6.3).

Shapes: S seeds (trainings), Q questions, N samples of an answer.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boltlm import checkpoint
from boltlm.estep.scoring import token_log_probs
from boltlm.estep.worker_processes import Workers, run_tasks, threads_per_worker
from boltlm.evaluation.clustered_errors import mean_estimate
from boltlm.evaluation.downstream import DecodingConfig, TaskAnswer, TaskOptions, task_metrics
from boltlm.evaluation.finetune_config import FinetuneSettings
from boltlm.evaluation.sft_data import FinetuneExamples, load_examples
from boltlm.evaluation.task_runner import TaskRunner, task_data, task_facts
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import read_shard, shard_name, write_shard
from boltlm.seeds import generator
from boltlm.sequences.sft import SFTDataset
from boltlm.shard_store import (
    atomic_write,
    exclusive_lock,
    is_complete,
    mark_complete,
    publish_shards,
)
from boltlm.tokens import TextCoder
from boltlm.training.checkpointing import CheckpointManager
from boltlm.training.trainer import train_model


@dataclass(frozen=True, slots=True)
class FinetunePaths:
    """The model's folder, the splits of all corpora, the folder of the thoughts, the folder of
    unfinished work, and the output folder of the answers."""

    model: Path
    split: Path
    data: Path
    work: Path
    out: Path


def run_finetuning(settings: FinetuneSettings, paths: FinetunePaths) -> dict[str, float]:
    """Fine-tune the model and evaluate it once for each seed; write every answer, return the
    metrics.

    The seeds are shared by `settings.workers` processes. The results of a seed are stored in
    `paths.work` under a fingerprint of everything that they depend on; an interrupted training
    resumes from its last checkpoint. Raises UserError where no training document has a thought with
    which it fits the context window, or the process of a worker dies.
    """
    label = f"finetune {settings.name}"
    data_path = task_data(settings.task_spec, settings.benchmarks, paths.split)
    weights = checkpoint.final_weights(paths.model)
    examples = load_examples(settings, paths.split, paths.data, TextCoder(weights))
    facts = _fingerprint_facts(settings, weights, examples, data_path)
    work = paths.work / "finetune" / fingerprint(facts)
    runs = [
        _SeedRun(settings, examples, paths.work, work / f"seed-{index}", weights, data_path, index)
        for index in range(1, settings.seeds + 1)
    ]
    missing = {run.label: run for run in runs if not run.is_finished}
    if missing:
        for _ in run_tasks(_SeedRun.run, missing, _workers(settings, len(missing))):
            pass
    losses = [float(run.loss_path.read_text("utf-8")) for run in runs]
    publish_shards([run.answers_path for run in runs], paths.out)
    tables = [read_shard(run.answers_path, TaskAnswer) for run in runs]
    metrics = task_metrics([answer for table in tables for answer in table], label)
    metrics |= accuracy_over_seeds(tables, settings.task_spec.name)
    metrics |= {"examples": len(examples.training), "val_examples": len(examples.heldout)}
    metrics["documents_without_thought"] = examples.documents_without_thought
    metrics["dropped_too_long"] = examples.dropped_too_long
    return metrics | {"val_nll_per_token": float(np.mean(losses))}


def _fingerprint_facts(
    settings: FinetuneSettings, weights: Path, examples: FinetuneExamples, data_path: str
) -> dict[str, Any]:
    """What the results of a seed depend on, JSON-ready."""
    return {
        "model": hash_path(weights),
        "examples": [
            [[*example.prompt], [*example.completion]]
            for example in (*examples.training, *examples.heldout)
        ],
        "task": task_facts(settings.task_spec, data_path),
        "answers": [
            settings.backend,
            settings.max_thought_tokens,
            settings.max_answer_tokens,
            settings.limit,
        ],
        "decoding": asdict(_decoding(settings)),
        "training": [settings.epochs, settings.heldout_fraction, asdict(settings.train)],
        "sampling": [settings.sampling.precision, settings.sampling.batch_tokens],
        "seed": settings.seed,
        "code": hash_code("boltlm.evaluation.finetune"),
    }


def _workers(settings: FinetuneSettings, num_trainings: int) -> Workers:
    """One training at a time, or several, each in a process and, where there are any, on a GPU."""
    count = min(settings.workers, num_trainings)
    return Workers(
        count=count,
        gpus_per_worker=1 if count > 1 and torch.cuda.is_available() else 0,
        threads=threads_per_worker(settings.sampling.threads, settings.workers),
        isolated=settings.backend == "vllm",
        key="finetune.workers",
    )


def _decoding(settings: FinetuneSettings) -> DecodingConfig:
    return DecodingConfig(
        samples=settings.samples,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )


@dataclass(frozen=True, slots=True)
class _SeedRun:
    """One training, number `index` from 1, and its evaluation. `cache` is the folder of unfinished
    work of all stages, `work` that of this training."""

    settings: FinetuneSettings
    examples: FinetuneExamples
    cache: Path
    work: Path
    weights: Path
    data_path: str
    index: int

    @property
    def answers_path(self) -> Path:
        """The shard with the answers, under the name that it has in the output folder."""
        return self.work / shard_name(self.index - 1)

    @property
    def loss_path(self) -> Path:
        return self.work / "val_nll.txt"

    @property
    def seed(self) -> int:
        """The seed of the order of the examples and of the sampled answers."""
        return int(generator(self.settings.seed, "finetune", self.index).integers(2**31))

    @property
    def label(self) -> str:
        return f"finetune {self.settings.name}, seed {self.index}"

    @property
    def is_finished(self) -> bool:
        """Whether there are results, and the weights that they needed are removed."""
        has_results = is_complete(self.answers_path) and is_complete(self.loss_path)
        return has_results and not any(folder.exists() for folder in self._intermediate)

    @property
    def _intermediate(self) -> tuple[Path, Path]:
        """The folders of the weights and of the checkpoints."""
        return self.work / "model", self.work / "steps"

    def run(self, wait: bool) -> bool:
        """Leave the answers, and −log p of the held-out completions per token, in their files; see
        `run_tasks`."""
        model, _ = self._intermediate
        with exclusive_lock(self.work, self.label, wait=wait) as is_held:
            if not is_held:
                return False
            if not (is_complete(self.answers_path) and is_complete(self.loss_path)):
                if not is_complete(model / "training.json"):
                    self._train(model)
                    torch.cuda.empty_cache()  # what PyTorch keeps, vLLM would lack
                self._evaluate(model)
            for folder in self._intermediate:
                shutil.rmtree(folder, ignore_errors=True)
        return True

    def _train(self, out: Path) -> None:
        config = self.settings.train
        dataset = SFTDataset(self.examples.training, self.settings.epochs, self.seed)
        checkpoint.keep_freed_memory()
        model = checkpoint.load_model(self.weights)
        checkpoints = CheckpointManager(self.work / "steps", config.checkpoint_every, self.label)
        result = train_model(
            model,
            dataset,
            config,
            seed=self.seed,
            csv_path=self.work / "curve.csv",
            what=self.label,
            checkpoints=checkpoints,
        )
        facts = {"steps": result.steps, "tokens": result.tokens}
        checkpoint.save_model(model, out, self.weights, facts)
        mark_complete(out / "training.json")
        checkpoints.clear()

    def _evaluate(self, model: Path) -> None:
        settings = self.settings
        runner = TaskRunner(
            model,
            model_digest=hash_path(model),
            backend=settings.backend,
            batch_size=settings.batch_size,
            sampling=settings.sampling,
            seed=self.seed,
            work=self.cache,
            label=self.label,
        )
        options = TaskOptions(
            data_path=self.data_path,
            tokenizer=model,
            max_answer_tokens=settings.max_thought_tokens + settings.max_answer_tokens,
            decoding=_decoding(settings),
            zero_shot=True,
            limit=settings.limit,
        )
        answers = runner.run(settings.task_spec, options)
        loss = self._heldout_loss(model)
        with atomic_write(self.loss_path) as temporary:
            temporary.write_text(repr(loss), encoding="utf-8")
        mark_complete(self.loss_path)
        write_shard(self.answers_path, TaskAnswer, answers)
        mark_complete(self.answers_path)

    def _heldout_loss(self, model: Path) -> float:
        """−log p of the held-out completions per token, nats; NaN where there are none."""
        heldout, sampling = self.examples.heldout, self.settings.sampling
        if not heldout:
            return math.nan
        log_probs = token_log_probs(
            checkpoint.load_model(model, sampling.precision),
            [list(example.prompt) for example in heldout],
            [[list(example.completion)] for example in heldout],
            sampling.batch_tokens,
        )
        num_tokens = sum(len(example.completion) for example in heldout)
        return -sum(float(completions[0].sum()) for completions in log_probs) / num_tokens


def accuracy_over_seeds(tables: Sequence[Sequence[TaskAnswer]], name: str) -> dict[str, float]:
    """The mean accuracy over seeds, questions and samples by the task's first grader, and three
    standard errors.

    `tables` holds the answers of each seed, `name` is the prefix of the metrics. The errors are
    over clusters of questions (`accuracy_se`), over samples of the same questions and trainings
    (`accuracy_se_samples`), and over trainings (`accuracy_se_seeds`); see docs/method.md, 6.3.
    """
    grader = tables[0][0].grader
    correct_by_seed: list[dict[str, list[float]]] = []
    for table in tables:
        correct_by_question: dict[str, list[float]] = {}
        for answer in table:
            if answer.grader == grader:
                correct = correct_by_question.setdefault(answer.question_id, [])
                correct.append(float(answer.correct))
        correct_by_seed.append(correct_by_question)
    clusters = {answer.question_id: answer.cluster for answer in tables[0]}
    correct_SQN = np.array([list(questions.values()) for questions in correct_by_seed])
    accuracy = mean_estimate(correct_SQN.mean((0, 2)), list(clusters.values()))
    num_seeds, num_questions, num_samples = correct_SQN.shape
    metrics = {
        f"{name}/accuracy": accuracy.value,
        f"{name}/accuracy_se": accuracy.standard_error,
        f"{name}/accuracy_se_seeds": _standard_error(correct_SQN.mean((1, 2))),
    }
    if num_samples > 1:
        variance_SQ = correct_SQN.var(2, ddof=1) / num_samples
        metrics[f"{name}/accuracy_se_samples"] = float(
            np.sqrt(variance_SQ.sum()) / (num_seeds * num_questions)
        )
    metrics |= {f"{name}/questions": num_questions, f"{name}/clusters": accuracy.clusters}
    return metrics | {"samples": num_samples, "seeds": num_seeds}


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; NaN for a single one."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else math.nan

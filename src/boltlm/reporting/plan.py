"""The work of an experiment from its params alone: documents, tokens, steps, requests, dollars,
FLOPs, hours and bytes of each stage (`boltlm plan`)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from boltlm.corpus.corpora import BASE_CORPUS
from boltlm.reporting.plan_config import Accelerator, PlanSettings
from boltlm.reporting.plan_tokens import TokenCounts
from boltlm.teachers.model_config import APITeacherConfig, TeacherConfig
from boltlm.training.config import PretrainConfig

# Tokens of a chunk that one CPU core tokenises in a second, and bytes on the disk for a token of
# text (documents, and chunks with their ids) and for a drawn one, as measured on the laptop.
SPLIT_TOKENS_PER_SECOND = 170_000
TEXT_BYTES, DRAW_BYTES, WEIGHT_BYTES = 7, 3, 4
START_SECONDS = 10  # to start a stage: imports, loading a model


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """The work of a stage; None where a number does not apply or is not known. `raw_tokens`: of the
    text that it reads; `latent_tokens`: of the latents that it draws or has written;
    `training_tokens`: of its training stream; `seconds`: on all devices together, so that device
    hours are `seconds` times their number."""

    stage: str
    documents: int | None = None
    chunks: int | None = None
    raw_tokens: int | None = None
    latent_tokens: int | None = None
    training_tokens: int | None = None
    steps: int | None = None
    requests: int | None = None
    usd: float | None = None
    flops: float | None = None
    seconds: float | None = None
    disk_bytes: int | None = None


class Planner:
    """Counts the work of the stages of an experiment on `count` devices."""

    def __init__(self, settings: PlanSettings, device: Accelerator, count: int) -> None:
        self.settings, self.device, self.count = settings, device, count
        self.counts = TokenCounts(settings)
        self.size, self.flops_per_token = settings.model_size, self.counts.flops_per_token

    def stages(self) -> Iterator[StagePlan]:
        """The stages that take time, money or room, each after those that it reads."""
        settings = self.settings
        yield self._base()
        yield self._split()
        for name in settings.teachers:
            yield self._teacher(name)
        for name in settings.models:
            yield self._train(name)
        for name in settings.latents:
            yield self._latents(name)
        for name in ("base", *settings.models):
            yield self._evaluate(name)
        for name in settings.curves:
            yield self._curves(name)
        for name in settings.finetune_runs:
            yield self._finetune(name)

    def _base(self) -> StagePlan:
        base = self.settings.base
        room = self._weights_bytes()
        if not isinstance(base, PretrainConfig):
            return StagePlan(stage="base", disk_bytes=room)
        assert self.size is not None
        documents = self.settings.corpora[BASE_CORPUS].documents
        raw = self.counts.raw_tokens(BASE_CORPUS)
        tokens = (raw + 2 * documents) * base.epochs
        flops = tokens * self.size.flops_per_token(base.sequence_length)
        return StagePlan(
            stage="base",
            documents=documents,
            raw_tokens=raw,
            training_tokens=tokens,
            steps=math.ceil(tokens / (base.train.batch_size * base.sequence_length)),
            flops=flops,
            seconds=self._seconds(flops, self.device.training),
            disk_bytes=room,
        )

    def _split(self) -> StagePlan:
        corpora = [name for name in self.settings.corpora if name != BASE_CORPUS]
        raw = sum(map(self.counts.raw_tokens, corpora))
        return StagePlan(
            stage="split",
            documents=sum(self.settings.corpora[name].documents for name in corpora),
            chunks=sum(map(self.counts.chunks, corpora)),
            raw_tokens=raw,
            seconds=START_SECONDS + raw / SPLIT_TOKENS_PER_SECOND,
            disk_bytes=raw * TEXT_BYTES,
        )

    def _teacher(self, name: str) -> StagePlan:
        teacher = self.settings.teachers[name]
        corpus = teacher.corpus
        documents, chunks = self.settings.corpora[corpus].documents, self.counts.chunks(corpus)
        stage, raw = f"teacher@{name}", self.counts.raw_tokens(corpus)
        if not isinstance(teacher, TeacherConfig):  # it asks no model
            latent = self.counts.latent_tokens(corpus)
            return StagePlan(
                stage=stage,
                documents=documents,
                chunks=chunks,
                raw_tokens=raw,
                latent_tokens=latent,
                disk_bytes=latent * TEXT_BYTES,
            )
        requests = chunks if teacher.task == "latent" else documents * teacher.paraphrases
        shown = self.counts.chunk_tokens(corpus) + self.counts.context_tokens(corpus)
        shown = shown if teacher.task == "latent" else self.counts.document_tokens(corpus)
        written, usd = self.settings.plan.latent_tokens, None
        if isinstance(teacher, APITeacherConfig):
            written = teacher.expected_output_tokens
            asked = self._template_characters(teacher.task) / teacher.characters_per_token + shown
            batch = teacher.kind == "openai_batch"
            usd = requests * teacher.prices.cost(asked, written, batch=batch)
        return StagePlan(
            stage=stage,
            documents=documents,
            chunks=chunks if teacher.task == "latent" else None,
            raw_tokens=raw,
            latent_tokens=requests * written,
            requests=requests,
            usd=usd,
            disk_bytes=requests * written * TEXT_BYTES,
        )

    def _train(self, name: str) -> StagePlan:
        model = self.settings.models[name]
        tokens, steps = self.counts.training_tokens(name), self.counts.steps(name)
        raw = self.counts.raw_tokens(model.corpus)
        latent = (
            self.counts.latent_tokens(model.corpus) if model.format in ("latent", "mixed") else None
        )
        flops = tokens * self.flops_per_token if self.flops_per_token else None
        room, snapshots = self._weights_bytes(), model.train.snapshots
        if room and snapshots:
            factor = 0.5 if snapshots.precision == "bfloat16" else 1
            room += round(room * factor * math.ceil(steps / snapshots.every))
        return StagePlan(
            stage=f"train@{name}",
            documents=self.settings.corpora[model.corpus].documents,
            raw_tokens=raw,
            latent_tokens=latent,
            training_tokens=tokens,
            steps=steps,
            flops=flops,
            seconds=self._seconds(flops, self.device.training),
            disk_bytes=room,
        )

    def _latents(self, name: str) -> StagePlan:
        entry = self.settings.latents[name]
        drawn = self.counts.latent_tokens(entry.corpus) * (
            entry.k_samples or self.settings.k_samples
        )
        flops = self._forward_flops(self.counts.estep_tokens(name))
        return StagePlan(
            stage=f"latents@{name}",
            documents=self.settings.corpora[entry.corpus].documents,
            chunks=self.counts.chunks(entry.corpus),
            raw_tokens=self.counts.raw_tokens(entry.corpus),
            latent_tokens=drawn,
            flops=flops,
            seconds=self._seconds(flops, self.device.estep),
            disk_bytes=drawn * DRAW_BYTES,
        )

    def _evaluate(self, name: str) -> StagePlan:
        flops = self._forward_flops(self.counts.evaluation_tokens(name))
        return StagePlan(
            stage="evaluate_base" if name == "base" else f"evaluate@{name}",
            documents=self.settings.corpora[self.settings.evaluate.corpus].documents,
            raw_tokens=self.counts.raw_tokens(self.settings.evaluate.corpus),
            flops=flops,
            seconds=self._seconds(flops, self.device.estep),
        )

    def _curves(self, name: str) -> StagePlan:
        """The snapshots of a model, each evaluated as the model is."""
        entry, snapshots = self.settings.curves[name], self.settings.models[name].train.snapshots
        count = math.ceil(self.counts.steps(name) / snapshots.every) if snapshots else 0
        tokens = self.counts.evaluation_tokens(
            name, likelihood=entry.likelihood, limit=entry.documents
        )
        flops = self._forward_flops(count * tokens)
        seconds = self._seconds(flops, self.device.estep)
        return StagePlan(stage=f"curves@{name}", flops=flops, seconds=seconds)

    def _finetune(self, name: str) -> StagePlan:
        settings, run = self.settings, self.settings.finetune_runs[name]
        documents = settings.corpora[run.corpus].documents
        seen = documents * (1 - settings.finetune_heldout) * settings.finetune_epochs
        length = self.counts.document_tokens(run.corpus) + settings.plan.latent_tokens
        tokens = round(seen * length * settings.finetune_seeds)
        answers = (
            self.counts.questions(run.task) * settings.finetune_samples * settings.finetune_seeds
        )
        flops = seconds = None
        if self.flops_per_token:
            training = tokens * self.flops_per_token
            answering = answers * self.counts.answer_tokens() * self.flops_per_token / 3
            flops = training + answering
            work = training / self.device.training + answering / self.device.estep
            seconds = START_SECONDS + work / self.count
        return StagePlan(
            stage=f"finetune@{name}",
            documents=documents,
            training_tokens=tokens,
            steps=math.ceil(seen / settings.finetune_train.batch_size) * settings.finetune_seeds,
            flops=flops,
            seconds=seconds,
        )

    def _seconds(self, flops: float | None, speed: float) -> float | None:
        """The time on all devices."""
        return None if flops is None else START_SECONDS + flops / (speed * self.count)

    def _forward_flops(self, tokens: float) -> float | None:
        """FLOPs of forward passes: a third of those of a training step."""
        return tokens * self.flops_per_token / 3 if self.flops_per_token else None

    def _weights_bytes(self) -> int | None:
        return self.size.parameters * WEIGHT_BYTES if self.size else None

    def _template_characters(self, task: str) -> int:
        """The longest template of a task, 0 where the folder has none."""
        paths = Path(self.settings.prompts).glob(f"{task}*.txt")
        return max((path.stat().st_size for path in paths), default=0)

"""All measures of one model: `models.<name>` becomes `metrics/eval/<name>.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from boltlm import engine
from boltlm.errors import UserError
from boltlm.evaluation import downstream, likelihood
from boltlm.evaluation.downstream import Answer, Asking, Spec
from boltlm.evaluation.likelihood import DocumentScore
from boltlm.evaluation.remembering import Remembering
from boltlm.latents.dataset import references
from boltlm.model import checkpoint
from boltlm.params import build, section
from boltlm.records import (
    Chunk,
    Question,
    Sample,
    read,
    read_shard,
    shard_name,
    shards,
    write_shard,
)
from boltlm.sampling.estep import SamplingConfig
from boltlm.sampling.shards import by_chunk, draw
from boltlm.sampling.weights import Summary
from boltlm.tokens import TextCoder

RAW, LATENT, ANSWERS = "raw", "likelihood", "answers"  # tables in a model's folder
CODE = (
    "boltlm.records",
    "boltlm.tokens",
    "boltlm.model.checkpoint",
    "boltlm.sampling",
    "boltlm.evaluation.backends",
    "boltlm.evaluation.likelihood",
    "boltlm.evaluation.prompts",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Params section `evaluate`. `corpus` and `beside`: the held-out corpora; `k_samples`: the K of
    every bound to report (as many latents a chunk are drawn as the largest asks for); `tasks`:
    see Spec; `limit`: the first so many questions of each, null for all."""

    corpus: str
    beside: tuple[str, ...]
    k_samples: tuple[int, ...]
    tasks: tuple[str, ...]
    backend: Literal["hf", "vllm"]
    batch_size: int
    thought_tokens: int
    answer_tokens: int
    limit: int | None

    def __post_init__(self) -> None:
        if not self.k_samples or min(self.k_samples) < 1:
            raise UserError(f"k_samples must list numbers of 1 or more, found {self.k_samples}")
        if min(self.batch_size, self.thought_tokens, self.answer_tokens) < 1:
            raise UserError("batch_size, thought_tokens and answer_tokens must be 1 or more")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a model is measured from: its folder, the splits of all corpora, their chunks; where
    unfinished work is kept, and where the tables go."""

    model: Path
    split: Path
    chunks: Path
    work: Path
    out: Path


def measure(params: Mapping[str, Any], name: str, places: Places) -> dict[str, float]:
    """Measure a model on the held-out corpora and the tasks; write every sample and every answer,
    and return the metrics. Raw models have no bound and are asked in raw space only.

    All is kept in `work` by the content of the model and what else it depends on: nothing is
    measured twice, and a killed evaluation goes on where it was.
    """
    config = build(EvaluateConfig, section(params, "evaluate"), "evaluate")
    latent_format = section(params, f"models.{name}.format") == "latent"
    specs = [Spec.of(task) for task in config.tasks]
    measured: dict[str, float] = {}
    for corpus in (config.corpus, *config.beside):
        found = _corpus(params, name, corpus, places, config.k_samples if latent_format else ())
        prefix = "" if corpus == config.corpus else f"{corpus}/"
        measured |= {f"{prefix}{key}": value for key, value in found.items()}
    specs = [spec for spec in specs if latent_format or spec.space == "raw"]
    folder, seed = checkpoint.final(places.model), section(params, "seed")
    answering = Answering(params, folder, places.work, f"evaluate {name}", seed)
    for place, spec in enumerate(specs):
        wordless = spec.task == "questions" and spec.space == "raw"
        asking = Asking(
            where=where(params, spec, places.split),
            tokenizer=answering.folder,
            answer_tokens=config.answer_tokens + (0 if wordless else config.thought_tokens),
            bare=wordless and latent_format,
            limit=config.limit,
        )
        answers = answering.run(spec, asking)
        write_shard(places.out / ANSWERS / shard_name(place), Answer, answers)
        measured |= downstream.measures(answers, answering.what)
    return measured


def where(params: Mapping[str, Any], spec: Spec, split: Path) -> str:
    """The data of a task. Raises UserError where params do not name it, or there are none."""
    if spec.task != "questions":
        return str(section(params, f"benchmarks.{spec.task}"))
    if not next(read(split / "questions", Question), None):
        raise UserError("evaluate.tasks asks questions, but questions.count is 0; change either")
    return str(split / "questions")


class Answering:
    """A model that is asked questions, loaded when the first is new to it. `seed`: of its draws."""

    def __init__(
        self, params: Mapping[str, Any], folder: Path, work: Path, what: str, seed: int
    ) -> None:
        self.folder, self.what, self.seed = folder, what, seed
        self.config = build(EvaluateConfig, section(params, "evaluate"), "evaluate")
        self.sampling = build(SamplingConfig, section(params, "sampling"), "sampling")
        facts = {
            "model": engine.content(folder),
            "backend": self.config.backend,
            "precision": self.sampling.precision,
            "seed": seed,
            "code": engine.code(CODE),
        }
        self.work = work / "answers" / engine.key(facts)
        self.model: Any = None

    def run(self, spec: Spec, asking: Asking) -> list[Answer]:
        """All answers of one task."""
        m = TextCoder(self.folder).markers
        model = Remembering(
            self._load,
            self.work / f"{spec.name.replace('/', '-')}.jsonl",
            what=f"{self.what}, {spec.name}",
            seed=self.seed,
            batch_size=self.config.batch_size,
            forbidden=(m.sol, m.eol, m.prior, m.post) if spec.space == "raw" else (),
        )
        return downstream.run(model, spec, asking)

    def _load(self) -> Any:
        from boltlm.evaluation import backends

        if self.model is None:
            self.model = backends.load(
                self.config.backend,
                self.folder,
                self.sampling.precision,
                self.config.batch_size,
                self.sampling.vllm_memory_fraction,
            )
        return self.model


def _corpus(
    params: Mapping[str, Any], name: str, corpus: str, places: Places, sizes: Sequence[int]
) -> dict[str, float]:
    """Likelihood measures on one held-out corpus; bounds for the K in `sizes`, if there are any."""
    chunks = places.chunks / corpus
    if not chunks.is_dir():
        raise UserError(f"params.yaml: evaluate names the corpus '{corpus}', which no stage made")
    what = f"evaluate {name}, {corpus}"
    scores = _raw(params, chunks, places, places.out / RAW / corpus, what)
    measured = likelihood.raw_nll(scores)
    measured["heldout_documents"] = len(scores)
    measured["heldout_tokens"] = sum(score.tokens for score in scores)
    if sizes:
        out = places.out / LATENT / corpus
        draw(
            params,
            "evaluate",
            model=places.model,
            chunks=chunks,
            work=places.work,
            out=out,
            draws=max(sizes),
            what=f"{what}, bounds",
        )
        groups = by_chunk(iter(read(out, Sample)))
        lengths = [len(chunk.tokens) for chunk in read(chunks, Chunk)]
        measured |= likelihood.bounds(groups, lengths, sizes)
        summary = Summary(groups, references(places.split / corpus, chunks))
        measured |= summary.diagnostics() | summary.exact_fractions()
    return measured


def _raw(
    params: Mapping[str, Any], chunks: Path, places: Places, out: Path, what: str
) -> list[DocumentScore]:
    """The raw likelihood of every document, a shard at a time."""
    config = build(SamplingConfig, section(params, "sampling"), "sampling")
    folder = checkpoint.final(places.model)
    facts = {
        "model": engine.content(folder),
        "chunks": engine.content(chunks),
        "precision": config.precision,
        "code": engine.code(CODE),
    }
    work = places.work / "evaluate" / engine.key(facts)

    def make(left: list[str]) -> Iterator[None]:
        checkpoint.prepare_cpu()
        model, coder = checkpoint.load(folder, config.precision), TextCoder(folder)
        for shard in left:
            documents = likelihood.documents_of(list(read_shard(chunks / shard, Chunk)))
            scores = likelihood.raw_scores(
                model, coder.markers, documents, coder.window, config.batch_tokens
            )
            write_shard(work / shard, DocumentScore, scores)
            engine.seal(work / shard)
            yield

    names = [path.name for path in shards(chunks)]
    engine.run_shards(names, make, work=work, out=out, what=f"{what}, raw")
    return list(read(out, DocumentScore))

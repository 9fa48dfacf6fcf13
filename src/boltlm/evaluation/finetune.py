"""Fine-tuning evaluation: a model learns thoughts and answers from a training set, with the loss on
these alone, and is asked held-out questions, several samples each (SPEC section 6)."""

import glob
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boltlm import engine
from boltlm.errors import UserError
from boltlm.evaluation.downstream import TASKS, Answer, Asking, Drawing, Spec, measures
from boltlm.evaluation.lessons import Run, divided, examples, thoughts
from boltlm.evaluation.measure import Answering, EvaluateConfig, where
from boltlm.model import checkpoint
from boltlm.model.resume import Checkpoints
from boltlm.model.runs import CODE as TRAINING
from boltlm.model.settings import TrainConfig, positive
from boltlm.model.training import train
from boltlm.params import build, section
from boltlm.records import Document, read, read_shard, shard_name, write_shard
from boltlm.sampling.scoring import token_log_probs
from boltlm.seeds import generator
from boltlm.sequences.examples import Example, Examples
from boltlm.tokens import TextCoder

CODE = (*TRAINING, "boltlm.corpus.chunks", "boltlm.corpus.benchmarks", "boltlm.evaluation")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Params section `finetune`. `heldout_fraction` of the training set is not trained on but
    measured; each of `seeds` trainings is asked every question `samples` times."""

    epochs: int
    heldout_fraction: float
    seeds: int
    samples: int
    temperature: float
    top_k: int
    top_p: float
    train: TrainConfig
    runs: dict[str, Run]

    def __post_init__(self) -> None:
        positive(self, "epochs", "seeds", "samples")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"heldout_fraction lies in [0, 1), found {self.heldout_fraction}")
        if self.temperature < 0:
            raise UserError(f"temperature must be 0 or more, found {self.temperature}")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run reads and writes: the model's folder, the splits of all corpora, the thoughts;
    the work folder; the answers."""

    model: Path
    split: Path
    data: Path
    work: Path
    out: Path


def finetune(params: Mapping[str, Any], name: str, places: Places) -> dict[str, float]:
    """Fine-tune and ask once for each seed; write every answer, return the metrics.

    What a seed gave is kept in `work` under a key of all that it depends on; its training is
    resumed at its last checkpoint, its questions where they were.
    """
    config = build(FinetuneConfig, section(params, "finetune"), "finetune")
    if name not in config.runs:
        raise UserError(f"params.yaml: no key finetune.runs.{name}")
    entry = config.runs[name]
    spec = entry.spec(name)
    questions = where(params, spec, places.split)
    folder = checkpoint.final(places.model)
    coder = TextCoder(folder)
    documents = list(read(places.split / entry.corpus, Document))
    told = thoughts(places.data, documents)
    seed = section(params, "seed")
    trained, heldout = (
        list(examples(coder, part, told, entry))
        for part in divided(documents, config.heldout_fraction, seed)
    )
    if not trained:
        raise UserError(
            f"finetune {name}: not one document to train on has a thought; see"
            f" finetune.runs.{name}.data and finetune.heldout_fraction"
        )
    evaluate = build(EvaluateConfig, section(params, "evaluate"), "evaluate")
    facts = {
        "model": engine.content(folder),
        "examples": [[[*one.prompt], [*one.completion]] for one in (*trained, *heldout)],
        "questions": [engine.content(Path(path)) for path in sorted(glob.glob(questions))]
        or questions,
        "task": (TASKS / f"{spec.task}.yaml").read_text("utf-8"),
        "asked": [
            evaluate.backend,
            evaluate.thought_tokens,
            evaluate.answer_tokens,
            evaluate.limit,
        ],
        "settings": {**asdict(config), "seeds": 0, "runs": 0},
        "sampling": section(params, "sampling"),
        "seed": seed,
        "code": engine.code(CODE),
    }
    work = places.work / "finetune" / engine.key(facts)
    tables: list[list[Answer]] = []
    losses: list[float] = []
    for place in range(1, config.seeds + 1):
        one = _Seed(params, config, spec, coder, folder, places, work / f"seed-{place}", place)
        losses.append(one.run(trained, heldout, f"finetune {name}, seed {place}"))
        tables.append(list(read_shard(one.answers, Answer)))
    if places.out.exists():
        shutil.rmtree(places.out)
    for place, table in enumerate(tables):
        write_shard(places.out / shard_name(place), Answer, table)
    measured = measures([row for table in tables for row in table], f"finetune {name}")
    measured |= spread(tables, spec.name)
    measured |= {"examples": len(trained), "heldout_examples": len(heldout)}
    measured["documents_without_thought"] = sum(not told.get(one.doc_id) for one in documents)
    return measured | {"heldout_nll_per_token": float(np.mean(losses))}


class _Seed:
    """One training and its answers."""

    def __init__(
        self,
        params: Mapping[str, Any],
        config: FinetuneConfig,
        spec: Spec,
        coder: TextCoder,
        folder: Path,
        places: Places,
        work: Path,
        place: int,
    ) -> None:
        self.params, self.config, self.spec, self.coder = params, config, spec, coder
        self.folder, self.places, self.work = folder, places, work
        self.seed = int(generator(section(params, "seed"), "finetune", place).integers(2**31))
        self.answers = work / "answers.parquet"
        self.loss = work / "heldout.json"

    def run(self, trained: list[Example], heldout: list[Example], what: str) -> float:
        """Leave the answers in their file; return −log p of the held-out completions a token."""
        model = self.work / "model"
        with engine.alone(self.work, what):
            if not (engine.is_whole(self.answers) and engine.is_whole(self.loss)):
                if not engine.is_whole(model / "training.json"):
                    self._train(trained, model, what)
                self._measure(heldout, model, what)
            for folder in (model, self.work / "steps"):
                shutil.rmtree(folder, ignore_errors=True)
        return float(self.loss.read_text("utf-8"))

    def _train(self, trained: list[Example], out: Path, what: str) -> None:
        config = self.config.train
        rows = Examples(trained, self.config.epochs, self.seed)
        checkpoint.prepare_cpu()
        model = checkpoint.load(self.folder)
        kept = Checkpoints(self.work / "steps", config.checkpoint_every, what)
        done = train(
            model,
            rows,
            config,
            seed=self.seed,
            csv_path=self.work / "curve.csv",
            what=what,
            kept=kept,
        )
        facts = {"steps": done.steps, "tokens": done.tokens}
        checkpoint.save(model, out, self.folder, facts)
        engine.seal(out / "training.json")
        kept.clear()

    def _measure(self, heldout: list[Example], model: Path, what: str) -> None:
        evaluate = build(EvaluateConfig, section(self.params, "evaluate"), "evaluate")
        answering = Answering(self.params, model, self.places.work, what, self.seed)
        asking = Asking(
            where=where(self.params, self.spec, self.places.split),
            tokenizer=model,
            answer_tokens=evaluate.thought_tokens + evaluate.answer_tokens,
            drawing=Drawing(
                samples=self.config.samples,
                temperature=self.config.temperature,
                top_k=self.config.top_k,
                top_p=self.config.top_p,
            ),
            zero_shot=True,
            limit=evaluate.limit,
        )
        found = answering.run(self.spec, asking)
        loss = math.nan
        if heldout:
            logs = token_log_probs(
                checkpoint.load(model, answering.sampling.precision),
                [list(one.prompt) for one in heldout],
                [[list(one.completion)] for one in heldout],
                answering.sampling.batch_tokens,
            )
            tokens = sum(len(one.completion) for one in heldout)
            loss = -sum(float(log[0].sum()) for log in logs) / tokens
        with engine.whole(self.loss) as part:
            part.write_text(repr(loss), encoding="utf-8")
        engine.seal(self.loss)
        write_shard(self.answers, Answer, found)
        engine.seal(self.answers)


def spread(tables: Sequence[Sequence[Answer]], name: str) -> dict[str, float]:
    """The mean accuracy over seeds, questions and samples by the task's first grader, and its
    standard errors: over questions (the set could be another), over samples (drawn anew), over
    seeds (trained anew)."""
    grader = tables[0][0].grader
    of_seed: list[dict[str, list[float]]] = []
    for table in tables:
        shares: dict[str, list[float]] = {}
        for answer in table:
            if answer.grader == grader:
                shares.setdefault(answer.question_id, []).append(float(answer.correct))
        of_seed.append(shares)
    correct_SQN = np.array([list(shares.values()) for shares in of_seed])
    seeds, questions, samples = correct_SQN.shape
    found = {f"{name}/accuracy": float(correct_SQN.mean())}

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else math.nan

    found[f"{name}/accuracy_se"] = error(correct_SQN.mean((0, 2)))
    found[f"{name}/accuracy_se_seeds"] = error(correct_SQN.mean((1, 2)))
    if samples > 1:
        variance_SQ = correct_SQN.var(2, ddof=1) / samples
        found[f"{name}/accuracy_se_samples"] = float(
            np.sqrt(variance_SQ.sum()) / (seeds * questions)
        )
    return found | {f"{name}/questions": questions, "samples": samples, "seeds": seeds}

"""Fine-tuning evaluation: a model learns thoughts and answers from a training set, with the loss on
these alone, and is asked held-out questions, several samples each (SPEC section 6)."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boltlm import engine
from boltlm.corpus.chunks import sentences
from boltlm.errors import UserError
from boltlm.evaluation import prompts
from boltlm.evaluation.downstream import Answer, Asking, Drawing, Spec
from boltlm.evaluation.measure import Answering, EvaluateConfig, where
from boltlm.evaluation.prompts import FORMS, Space
from boltlm.latents.dataset import document_thought
from boltlm.model import checkpoint
from boltlm.model.resume import Checkpoints
from boltlm.model.runs import CODE as TRAINING
from boltlm.model.settings import TrainConfig, positive
from boltlm.model.training import train
from boltlm.params import build, section
from boltlm.records import Document, Paraphrase, read, read_shard, shard_name, write_shard
from boltlm.sampling.scoring import token_log_probs
from boltlm.seeds import generator, uniform
from boltlm.sequences.examples import Example, Examples
from boltlm.tokens import TextCoder

CODE = (*TRAINING, "boltlm.sequences.examples", "boltlm.evaluation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Params entry `finetune.runs.<name>`. `corpus`: documents that end in an answer (their last
    sentence); `data`: the folder under data/ with the thoughts: teacher/<name> of the task `solve`,
    or split/<corpus>, whose documents carry them; `task`: asked in the end, zero-shot; `space`:
    where the thoughts stand."""

    model: str
    corpus: str
    data: str
    task: str
    space: Space


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
    spec = Spec.of(f"{entry.task}/standard/{entry.space}")
    folder = checkpoint.final(places.model)
    coder = TextCoder(folder)
    documents = list(read(places.split / entry.corpus, Document))
    found = list(examples(coder, documents, thoughts(places.data, documents), entry))
    seed = section(params, "seed")
    trained, heldout = divided(found, config.heldout_fraction, seed)
    facts = {
        "model": engine.content(folder),
        "examples": engine.key({"all": [[list(e.prompt), list(e.completion)] for e in found]}),
        "questions": where(params, spec, places.split),
        "settings": [{**asdict(config), "seeds": 0, "runs": 0}, asdict(entry)],
        "evaluate": section(params, "evaluate"),
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
        write_shard(places.out / shard_name(place - 1), Answer, tables[-1])
    measured = spread(tables, spec.name)
    measured |= {"examples": len(trained), "heldout_examples": len(heldout)}
    return measured | {"heldout_nll_per_token": float(np.mean(losses))}


def thoughts(data: Path, documents: Sequence[Document]) -> dict[str, list[str]]:
    """The thoughts of each document, by its id: a teacher's, or its own."""
    if data.parent.name == "split":
        found = {one.doc_id: document_thought(one) for one in documents}
        return {doc_id: [thought] for doc_id, thought in found.items() if thought}
    told: dict[str, list[str]] = {}
    for row in read(data, Paraphrase):
        if row.text:
            told.setdefault(row.doc_id, []).append(row.text)
    return told


def examples(
    coder: TextCoder, documents: Sequence[Document], told: Mapping[str, Sequence[str]], entry: Run
) -> Iterator[Example]:
    """Each document with each of its thoughts. Raises UserError where there is no thought at all,
    or an example is longer than the window."""
    m, form, known = coder.markers, FORMS[entry.task], 0
    for document in documents:
        *question, answer = sentences(document.text)
        asked = "".join(question)
        if form.after:
            asked, answer = asked.strip(), f" {answer.strip()}"
        prompt = prompts.render(form, "", (), asked, entry.space)
        for thought in told.get(document.doc_id, ()):
            known += 1
            if entry.space == "latent":
                rest = prompts.latent(thought).removeprefix(prompts.OPENING) + answer
            else:
                rest = f" {thought}{answer}"
            one = Example(
                [m.bos, *prompts.encode(coder, prompt)], [*prompts.encode(coder, rest), m.eos]
            )
            if len(one.prompt) + len(one.completion) > coder.window:
                raise UserError(
                    f"document '{document.doc_id}' and its thought take"
                    f" {len(one.prompt) + len(one.completion)} tokens, the window {coder.window};"
                    " leave it out of the corpus"
                )
            yield one
    if not known:
        raise UserError("finetune: not one document has a thought; see finetune.runs.<name>.data")


def divided(
    found: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out."""
    out = [uniform(seed, "finetune, held out", place) < fraction for place in range(len(found))]
    pairs = list(zip(found, out, strict=True))
    return [one for one, o in pairs if not o], [one for one, o in pairs if o]


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
                shutil.rmtree(model)
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
        answering = Answering(self.params, model, self.places.work, what)
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

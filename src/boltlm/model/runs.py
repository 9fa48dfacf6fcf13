"""One training run of the experiment: an entry of `models` becomes `models/<name>`."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from boltlm import engine
from boltlm.errors import UserError
from boltlm.model import checkpoint, parallel, resume
from boltlm.model.curve import Live
from boltlm.model.resume import PREDECAY, Checkpoints
from boltlm.model.settings import TrainConfig
from boltlm.model.training import Hook, Start, Trained, of_model, train
from boltlm.params import build, section
from boltlm.sequences import packing, store
from boltlm.sequences.layouts import Format
from boltlm.sequences.packing import SequenceConfig, Source, Writer
from boltlm.tokens import TextCoder, most_chunk_tokens

CODE = (
    "boltlm.records",
    "boltlm.seeds",
    "boltlm.tokens",
    "boltlm.sequences",
    "boltlm.model.attention",
    "boltlm.model.loss",
    "boltlm.model.parallel",
    "boltlm.model.runs",
    "boltlm.model.schedules",
    "boltlm.model.settings",
    "boltlm.model.training",
)
MOMENTS, FACTS = "optimizer.pt", "training.json"
# What a continual run must share with the one that it goes on from.
SHARED = (
    "optimizer",
    "learning_rate",
    "beta1",
    "beta2",
    "epsilon",
    "weight_decay",
    "clip_norm",
    "batch_rows",
    "length",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to train, in `epochs` of `data`, `tokens` or `steps`. `matched_epochs`: on as many
    tokens as so many epochs of `data` in the latent format have, whatever the format trained on:
    the FLOP-matched baseline."""

    kind: Literal["epochs", "tokens", "steps", "matched_epochs"]
    amount: int

    def __post_init__(self) -> None:
        if self.amount < 1:
            raise UserError(f"amount must be 1 or more, found {self.amount}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """Params entry `models.<name>`. `parent`: the model it starts from; `data`: the folder
    under data/ with the latents or paraphrases (a raw run names its documents, or the latents it
    is matched to); `mix_raw`: share of the tokens that are raw documents of `mix_corpus`, beside
    those of the format; `train`: what it changes in the section `train`."""

    parent: str
    corpus: str
    data: str
    format: Format
    mix_raw: float
    mix_corpus: str
    budget: Budget
    train: dict[str, Any]

    def __post_init__(self) -> None:
        if not 0 <= self.mix_raw < 1:
            raise UserError(f"mix_raw lies in [0, 1), found {self.mix_raw}")
        if self.mix_raw and self.format == "raw" and self.mix_corpus == self.corpus:
            raise UserError("mix_raw must be 0 where the format is raw and mix_corpus the corpus")
        if self.budget.kind == "matched_epochs" and self.format == "paraphrase":
            raise UserError("budget.kind matched_epochs needs latents in `data`, not paraphrases")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a run reads and writes. `chunks`, `mixed`: of the corpus and of `mix_corpus`; `out`:
    the model's folder; `csv`: its curve; `work`: for what is unfinished."""

    parent: Path
    chunks: Path
    mixed: Path
    data: Path
    work: Path
    out: Path
    csv: Path


def run(
    params: Mapping[str, Any],
    name: str,
    paths: Paths,
    *,
    hook: Hook | None = None,
    live: Live | None = None,
) -> None:
    """Train `models.<name>`. With the schedule `wsd` the output holds `final` and `predecay`, and
    a parent that holds `predecay` is gone on from there; else the run starts from the parent's
    weights. Called in every process that the launcher started."""
    entry, config = settings(params, name)
    sequences = build(SequenceConfig, section(params, "sequences"), "sequences")
    here = parallel.machine()
    continual = config.schedule.kind == "wsd"
    before = paths.parent / "predecay"
    folder = before if continual and before.is_dir() else checkpoint.final(paths.parent)
    coder = TextCoder(folder)
    if sequences.length > coder.window:
        raise UserError(
            f"params.yaml: sequences.length {sequences.length} is beyond the window of the base"
            f" model, {coder.window} tokens"
        )
    shared = {**config.settings(), "length": sequences.length}
    start = going_on(before, shared) if folder == before else None
    key = None
    if here.is_main_process:
        facts = {
            "parent": engine.content(folder),
            "chunks": engine.content(paths.chunks),
            "data": engine.content(paths.data) if paths.data.is_dir() else None,
            "mixed": engine.content(paths.mixed) if entry.mix_raw else None,
            "settings": [shared, sequences.layout, entry.format, entry.mix_raw],
            "budget": asdict(entry.budget),
            "rest": [section(params, k) for k in ("seed", "context_chunks", "max_latent_tokens")],
            "code": engine.code(CODE),
        }
        key = engine.key(facts)
    unfinished = paths.work / "train" / str(parallel.told(key))
    with engine.alone(unfinished, f"train {name}", mine=here.is_main_process):
        if here.is_main_process:
            _pack(params, entry, sequences, paths, unfinished, coder, config.batch_rows)
        here.wait_for_everyone()
        rows = packing.open_rows(unfinished, sequences.length, section(params, "seed"))
        checkpoint.prepare_cpu()
        model = checkpoint.load(folder)
        if start is not None and here.is_main_process:
            _check_shapes(model, start.moments)
        kept = Checkpoints(unfinished, config.checkpoint_every, f"train {name}")
        trained = train(
            model,
            rows,
            config,
            seed=section(params, "seed"),
            csv_path=paths.csv,
            what=f"train {name}",
            kept=kept,
            start=start,
            hook=hook,
            live=live,
        )
        if here.is_main_process:
            known = {**packing.facts(unfinished), **shared}
            publish(model, trained, known, unfinished, folder, paths.out, continual=continual)
            kept.clear()
        here.wait_for_everyone()


def settings(params: Mapping[str, Any], name: str) -> tuple[ModelEntry, TrainConfig]:
    """The entry `models.<name>`, and the section `train` as it changes it."""
    where = f"models.{name}"
    entry = build(ModelEntry, section(params, where), where)
    changed = {**section(params, "train"), **entry.train}
    if isinstance(entry.train.get("schedule"), Mapping):
        changed["schedule"] = {**section(params, "train.schedule"), **entry.train["schedule"]}
    return entry, build(TrainConfig, changed, f"{where}.train over train")


def _pack(
    params: Mapping[str, Any],
    entry: ModelEntry,
    sequences: SequenceConfig,
    paths: Paths,
    folder: Path,
    coder: TextCoder,
    batch_rows: int,
) -> None:
    seed, budget = section(params, "seed"), entry.budget

    def writer(form: Format) -> Writer:
        return Writer(
            markers=coder.markers,
            form=form,
            layout=sequences.layout,
            context_chunks=section(params, "context_chunks"),
            room=most_chunk_tokens(coder.window, section(params, "max_latent_tokens")),
            seed=seed,
        )

    def sources(where: Path) -> list[Source]:
        raw = entry.format == "raw" and budget.kind != "matched_epochs"
        texts = (
            store.paraphrases(paths.data, coder)
            if entry.format == "paraphrase"
            else store.texts(paths.chunks, None if raw else paths.data)
        )
        main = store.write(where / "documents", texts)
        found = [Source(main, writer(entry.format), 1 - entry.mix_raw)]
        if entry.mix_raw:
            raw_documents = store.write(where / "raw", store.texts(paths.mixed, None))
            found.append(Source(raw_documents, writer("raw"), entry.mix_raw, ("raw",)))
        return found

    def tokens(found: Sequence[Source], where: Path) -> int:
        if budget.kind == "matched_epochs":
            return Source(found[0].store, writer("latent")).tokens(budget.amount, where)
        if budget.kind == "steps":
            return budget.amount * batch_rows * sequences.length + 1
        return budget.amount

    packing.pack(
        sources,
        folder,
        length=sequences.length,
        seed=seed,
        vocabulary=coder.tokenizer.get_vocab_size(),
        epochs=budget.amount if budget.kind == "epochs" else None,
        tokens=None if budget.kind == "epochs" else tokens,
    )


def going_on(before: Path, shared: Mapping[str, Any]) -> Start:
    """What a run goes on from: the state that its parent had before its decay.

    Raises UserError where that one was trained with other settings.
    """
    facts = json.loads((before / FACTS).read_text(encoding="utf-8"))
    differ = [
        f"{name} ({facts.get(name)} there, {shared[name]} here)"
        for name in SHARED
        if facts.get(name) != shared[name]
    ]
    if differ:
        raise UserError(
            f"{before}: cannot be gone on from, its settings differ: {', '.join(differ)}; give"
            " both runs the same, or start from its final weights with schedule.kind cosine"
        )
    return Start(facts["steps"], facts["tokens"], before / MOMENTS)


def _check_shapes(model: PreTrainedModel, path: Path) -> None:
    """Raises UserError where the moments in a file are not those of the model's parameters."""
    if not engine.is_whole(path):
        raise UserError(f"{path} is torn; train the model that it belongs to again")
    before, state = path.parent, resume.read(path)["state"]
    wanted = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    for name, moments in state.items():
        for moment in moments.values():
            shape = tuple(moment.shape) if isinstance(moment, torch.Tensor) else ()
            if name not in wanted or shape not in ((), (1,), wanted[name]):
                raise UserError(
                    f"{before}: {MOMENTS} is of another model: {name} has {list(shape)} there,"
                    f" {list(wanted.get(name, ()))} in the weights"
                )
    if lacking := wanted.keys() - state.keys():
        raise UserError(f"{before}: {MOMENTS} is of another model, it lacks {min(lacking)}")


def publish(
    model: PreTrainedModel,
    trained: Trained,
    facts: Mapping[str, Any],
    unfinished: Path,
    tokenizer_from: Path,
    out: Path,
    *,
    continual: bool,
) -> None:
    """Write the trained model, and a continual run's state before the decay beside it."""
    told = {**facts, "steps": trained.steps, "tokens": trained.tokens}
    for name in ("final", "predecay"):  # of another schedule's run: they would be used
        shutil.rmtree(out / name, ignore_errors=True)
    place = out / "final" if continual else out
    checkpoint.save(model, place, tokenizer_from, told, trained.weights)
    if continual:
        state = resume.read(unfinished / PREDECAY)
        told |= {"steps": state["steps"], "tokens": state["tokens"]}
        weights = of_model(state["model"])
        checkpoint.save(model, out / "predecay", tokenizer_from, told, weights)
        resume.write(out / "predecay" / MOMENTS, state["optimizers"])

"""A training run of the stage `train`: an entry of `models` becomes a model folder (the M-step)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.fingerprint import fingerprint, hash_code, hash_path
from boltlm.records import write_json
from boltlm.sequences import store
from boltlm.sequences.draws import NEGLIGIBLE_WEIGHT
from boltlm.sequences.formatter import SequenceFormatter
from boltlm.sequences.layouts import DrawChoice, SequenceFormat
from boltlm.sequences.mixing import SequenceSource
from boltlm.sequences.packing import pack_sequences
from boltlm.tokens import TextCoder, chunk_token_budget
from boltlm.training import distributed
from boltlm.training.compute import artifact_key, read_compute, write_compute
from boltlm.training.config import FLOP_MATCHED_KINDS, TrainSettings
from boltlm.training.continual import check_moments, load_continual_state
from boltlm.training.job import PREDECAY_FOLDER, PackingStats, TrainingJob, train_and_publish
from boltlm.training.metrics_logger import LineLogger
from boltlm.training.trainer import ValidationHook

# The smallest weight of a draw that a run reads (`boltlm.sequences.draws`); None: it reads only the
# selected ones. A new choice in each epoch costs nothing for a small weight, a sequence does.
MIN_DRAW_WEIGHTS = {"selected": None, "resampled": 0.0, "weighted": NEGLIGIBLE_WEIGHT}


@dataclass(frozen=True, slots=True)
class TrainPaths:
    """What the stage reads and writes. `parent`: the parent's model folder; `chunks`, `mixed`: the
    chunks of the corpus and of `mix_corpus`; `data`: latents or paraphrases; `work`: the folder of
    unfinished work; `out`: the model folder; `csv`, `timing`: the log and its wall-clock figures;
    `metrics`: the counts of tokens and FLOPs; `snapshots`: the folder of the snapshots.
    """

    parent: Path
    chunks: Path
    mixed: Path
    data: Path
    work: Path
    out: Path
    csv: Path
    timing: Path
    metrics: Path
    snapshots: Path


def run_training(
    settings: TrainSettings,
    paths: TrainPaths,
    *,
    validation_hook: ValidationHook | None = None,
    line_logger: LineLogger | None = None,
) -> None:
    """Train the model `settings.name` and write it to `paths.out`.

    With the schedule `wsd` the output holds `final` and `predecay`; where the parent has a
    `predecay` the run continues from it, and otherwise it starts from the parent's final weights.
    Must be called in every process that the launcher started. Raises UserError for settings that
    do not fit the parent or the data, and where the loss diverges.
    """
    start = _start_folder(settings, paths.parent)
    coder = TextCoder(start)
    job = _training_job(settings, paths, coder, start)

    def load_model() -> PreTrainedModel:
        model = checkpoint.load_model(start)
        if job.continual is not None and distributed.process_state().is_main_process:
            check_moments(model, job.continual.moments)
        return model

    train_and_publish(
        job,
        pack=lambda folder: _pack(settings, paths, coder, folder),
        load_model=load_model,
        record_compute=lambda flops, stats: _record_compute(settings, paths, flops, stats),
        validation_hook=validation_hook,
        line_logger=line_logger,
    )


def _start_folder(settings: TrainSettings, parent: Path) -> Path:
    """The folder of the weights that the run starts from: the parent's before its decay for a
    continual run, else its final ones."""
    predecay = parent / PREDECAY_FOLDER
    is_continual = settings.model.train.schedule.kind == "wsd" and predecay.is_dir()
    return predecay if is_continual else checkpoint.final_weights(parent)


def _training_job(
    settings: TrainSettings, paths: TrainPaths, coder: TextCoder, start: Path
) -> TrainingJob:
    """Raises UserError where the sequences are longer than the model's context, or the settings
    differ from those of the run to continue."""
    config, sequence_length = settings.model.train, settings.sequences.sequence_length
    if sequence_length > coder.context_length:
        raise UserError(
            f"params.yaml: sequences.sequence_length is {sequence_length}, but the context length"
            f" of the base model is {coder.context_length} tokens"
        )
    facts = {**config.result_settings(), "sequence_length": sequence_length}
    is_continual = start == paths.parent / PREDECAY_FOLDER
    continual = load_continual_state(start, facts) if is_continual else None
    if config.snapshots and continual and continual.raw_tokens is None:
        raise UserError(
            f"models.{settings.name}.train.snapshots: the tokens of raw text of the run that it"
            f" continues, {settings.model.parent}, were not counted; give that model snapshots too"
        )
    return TrainingJob(
        what=f"train {settings.name}",
        config=config,
        seed=settings.training_seed,
        sequence_length=sequence_length,
        continual=continual,
        snapshots=config.snapshots,
        snapshots_out=paths.snapshots,
        work=paths.work / "train" / _work_key(settings, paths, start, facts),
        tokenizer=start,
        out=paths.out,
        csv=paths.csv,
        timing=paths.timing,
        facts=facts,
        publish_predecay=config.schedule.kind == "wsd",
    )


def _work_key(
    settings: TrainSettings, paths: TrainPaths, start: Path, train_facts: Mapping[str, Any]
) -> str:
    """The fingerprint of everything that the trained weights depend on, in every process."""
    key = None
    if distributed.process_state().is_main_process:
        model = settings.model
        facts = {
            "parent": hash_path(start),
            "chunks": hash_path(paths.chunks),
            "data": hash_path(paths.data) if paths.data.is_dir() else None,
            "mixed": hash_path(paths.mixed) if model.mix_raw else None,
            "train": dict(train_facts),
            # No setting of the weights, but a run that is resumed with others would lack some.
            "snapshots": model.train.snapshots and asdict(model.train.snapshots),
            "sequences": [asdict(settings.sequences), model.format, model.draws, model.mix_raw],
            "budget": asdict(model.budget),
            "context": [settings.context_chunks, settings.max_latent_tokens],
            "seed": settings.training_seed,
            "code": hash_code("boltlm.training.run"),
        }
        key = fingerprint(facts)
    return str(distributed.broadcast(key))


def _pack(settings: TrainSettings, paths: TrainPaths, coder: TextCoder, folder: Path) -> None:
    """Write the training sequences of the run's budget into `folder`."""
    budget = settings.model.budget
    by_epochs = budget.kind == "epochs"

    def num_tokens(sources: Sequence[SequenceSource], scratch: Path) -> int:
        return _num_tokens(settings, paths, coder, sources, scratch)

    pack_sequences(
        lambda scratch: _sequence_sources(settings, paths, coder, scratch),
        folder,
        sequence_length=settings.sequences.sequence_length,
        seed=settings.training_seed,
        vocab_size=coder.tokenizer.get_vocab_size(),
        epochs=budget.amount if by_epochs else None,
        tokens=None if by_epochs else num_tokens,
        count_raw_tokens=settings.model.train.snapshots is not None,
        mix_unit=settings.sequences.mix_unit,
    )


def _sequence_sources(
    settings: TrainSettings, paths: TrainPaths, coder: TextCoder, scratch: Path
) -> list[SequenceSource]:
    """The documents in the run's format, and the raw documents mixed with them; stored in
    `scratch`."""
    model = settings.model
    if model.format == "paraphrase":
        documents = store.read_paraphrases(paths.data, coder)
    else:
        is_raw = model.format == "raw" and model.budget.kind not in FLOP_MATCHED_KINDS
        data = None if is_raw else paths.data
        documents = store.read_tokenized(paths.chunks, data, MIN_DRAW_WEIGHTS[model.draws])
    main_store = store.write_documents(scratch / "documents", documents)
    formatter = _formatter(settings, coder, model.format, model.draws)
    sources = [SequenceSource(main_store, formatter, 1 - model.mix_raw)]
    if model.mix_raw:
        raw_documents = store.read_tokenized(paths.mixed, None)
        raw_store = store.write_documents(scratch / "raw", raw_documents)
        formatter = _formatter(settings, coder, "raw")
        sources.append(SequenceSource(raw_store, formatter, model.mix_raw, ("raw",)))
    return sources


def _num_tokens(
    settings: TrainSettings,
    paths: TrainPaths,
    coder: TextCoder,
    sources: Sequence[SequenceSource],
    scratch: Path,
) -> int:
    """The number of tokens of a budget that is not in epochs."""
    budget, config = settings.model.budget, settings.model.train
    if budget.kind in FLOP_MATCHED_KINDS:
        formatter = _formatter(settings, coder, "latent")  # with the selected draws
        latent_source = SequenceSource(sources[0].store, formatter)
        tokens = latent_source.num_tokens(budget.amount, scratch)
        if budget.kind == "flop_matched_history":
            data = read_compute(paths.data)
            tokens += -(-data.history_flops // data.flops_per_token)
        return tokens
    if budget.kind == "steps":
        return budget.amount * config.batch_size * settings.sequences.sequence_length + 1
    return budget.amount


def _formatter(
    settings: TrainSettings,
    coder: TextCoder,
    sequence_format: SequenceFormat,
    draws: DrawChoice = "selected",
) -> SequenceFormatter:
    return SequenceFormatter(
        special_tokens=coder.special_tokens,
        sequence_format=sequence_format,
        draws=draws,
        layout=settings.sequences.layout,
        context_loss=settings.sequences.context_loss,
        context_chunks=settings.context_chunks,
        token_budget=chunk_token_budget(coder.context_length, settings.max_latent_tokens),
        seed=settings.training_seed,
    )


def _record_compute(
    settings: TrainSettings, paths: TrainPaths, flops_per_token: int, stats: PackingStats
) -> None:
    """Write the model's ComputeRecord, and the metrics made of it. A raw run takes nothing from its
    data but a number of tokens, so its history is that of its parent."""
    model, (kind, _, _) = settings.model, settings.model.data.partition("/")
    history = [] if model.parent == "base" else [read_compute(paths.parent).lineage]
    if kind == "latents" and model.format != "raw":
        history.append(read_compute(paths.data).lineage)
    if kind == "teacher" and model.format != "raw":
        written = stats["raw_tokens" if model.format == "paraphrase" else "latent_tokens"]
        history.append({artifact_key(model.data, paths.data): written * flops_per_token // 3})
    training_tokens = stats["tokens"] - 1
    record = write_compute(
        paths.out,
        f"models/{settings.name}",
        flops=training_tokens * flops_per_token,
        flops_per_token=flops_per_token,
        history=history,
    )
    metrics = {"training_tokens": training_tokens, "training_flops": record.own_flops}
    write_json(paths.metrics, {**metrics, "history_flops": record.history_flops})

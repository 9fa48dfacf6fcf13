"""One training run of the experiment: an entry of `models` becomes `models/<name>`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from boltlm.errors import UserError
from boltlm.model import checkpoint
from boltlm.model.training import TrainConfig, train
from boltlm.params import build, section
from boltlm.sequences.layouts import Format
from boltlm.sequences.packing import SequenceConfig, Writer, kept_latents, rows, stream, texts
from boltlm.tokens import TextCoder, most_chunk_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to train. `matched_epochs`: on as many tokens as so many epochs of `data` in the
    latent format have, whatever the format trained on: the FLOP-matched baseline."""

    kind: Literal["epochs", "tokens", "matched_epochs"]
    amount: int

    def __post_init__(self) -> None:
        if self.amount < 1:
            raise UserError(f"amount must be 1 or more, found {self.amount}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """Params entry `models.<name>`. `parent`: the model it starts from; `data`: the folder
    under data/ with the latents (a raw run names its documents, or the latents it is matched
    to); `train`: what it changes in the section `train`."""

    parent: str
    corpus: str
    data: str
    format: Format
    budget: Budget
    train: dict[str, Any]


def run(
    params: Mapping[str, Any],
    name: str,
    *,
    parent: Path,
    chunks: Path,
    data: Path,
    work: Path,
    out: Path,
    csv_path: Path,
) -> None:
    """Train `models.<name>` from `parent` and write it to `out`, its curve to `csv_path`; until
    then it is kept in `work`."""
    where = f"models.{name}"
    entry = build(ModelEntry, section(params, where), where)
    sequences = build(SequenceConfig, section(params, "sequences"), "sequences")
    settings = {**section(params, "train"), **entry.train}
    config = build(TrainConfig, settings, f"{where}.train over train")
    seed = section(params, "seed")
    coder = TextCoder(parent)
    if sequences.length > coder.window:
        raise UserError(
            f"params.yaml: sequences.length {sequences.length} is beyond the window of the base"
            f" model, {coder.window} tokens"
        )
    needs_latents = entry.format != "raw" or entry.budget.kind == "matched_epochs"
    corpus = texts(chunks, kept_latents(data) if needs_latents else {})

    def writer(form: Format) -> Writer:
        return Writer(
            markers=coder.markers,
            form=form,
            layout=sequences.layout,
            context_chunks=section(params, "context_chunks"),
            room=most_chunk_tokens(coder.window, section(params, "max_latent_tokens")),
            seed=seed,
        )

    epochs = entry.budget.amount if entry.budget.kind == "epochs" else None
    tokens = entry.budget.amount if entry.budget.kind == "tokens" else None
    if entry.budget.kind == "matched_epochs":
        tokens = len(stream(writer("latent"), corpus, epochs=entry.budget.amount, tokens=None))
    ids = stream(writer(entry.format), corpus, epochs=epochs, tokens=tokens)
    checkpoint.prepare_cpu()
    model = checkpoint.load(parent)
    inputs_RL, labels_RL = rows(ids, sequences.length)
    facts, kept = train(
        model,
        inputs_RL,
        labels_RL,
        config,
        seed=seed,
        csv_path=csv_path,
        what=f"train {name}",
        work=work,
    )
    pairs = [pair for text in corpus for pair in text.pairs]
    facts |= {
        "documents": len(corpus),
        "chunks": len(pairs),
        "chunks_without_latent": sum(pair.latent is None for pair in pairs),
        "raw_tokens": sum(len(pair.text) for pair in pairs),
        "latent_tokens": sum(len(pair.latent or ()) for pair in pairs),
    }
    checkpoint.save(model, out, parent, facts)
    kept.clear()

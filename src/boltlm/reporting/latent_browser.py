"""The latent browser of the report: a sample of documents, the latents of every iteration side by
side, all their draws with their weights, and what each token of the text gains by the latent.

Letters as in docs/method.md: X chunk, C context, Z latent, ŵ normalized weight, K samples of a
chunk. Log-probabilities are in nats.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from boltlm.checkpoint import final_weights
from boltlm.estep.config import LatentsEntry
from boltlm.estep.importance import effective_sample_size, normalized_weights
from boltlm.records import Chunk, Sample
from boltlm.reporting.arms import ReportSettings, em_chain, experiment_arms
from boltlm.reporting.browser_documents import (
    DataFolders,
    Row,
    Shards,
    document_rows,
    sampled_documents,
)
from boltlm.reporting.html_config import HtmlReportSettings
from boltlm.reporting.token_gains import TextScores, score_text, token_pieces
from boltlm.seeds import generator
from boltlm.tokens import TextCoder

MAX_DECIMALS = 3


def ordered_entries(settings: ReportSettings) -> dict[str, int | None]:
    """Every entry of `latents` with the iteration that is trained on it: those of the EM chain by
    iteration, then the others (None) in the order of params.yaml."""
    chain = {arm.latents: arm.iteration for arm in em_chain(experiment_arms(settings))}
    iterations = {name: chain[name] for name in chain if name is not None}
    return {**iterations, **{name: None for name in settings.latents if name not in iterations}}


def corpus_sample(settings: HtmlReportSettings, chunks: Path, corpus: str) -> Shards:
    """The documents of a corpus that the browser shows unless others are named; `chunks`: the
    folder of its chunks."""
    random = generator(settings.seed, "report", corpus)
    return sampled_documents(chunks, settings.report.documents, random)


def browser_data(
    settings: HtmlReportSettings, folders: DataFolders, wanted: Mapping[str, Shards] | None = None
) -> dict[str, Any]:
    """What the page shows, ready for JSON: `entries`, `documents`, and `notes` on what is missing.

    `wanted`: the documents of each corpus; None: a sample of every corpus that has latents. What
    is not on this machine is left out, and `notes` say so.
    """
    order = ordered_entries(settings)
    present = [name for name in order if folders.latents(name).is_dir()]
    notes = [
        f"{folders.latents(name)} is not on this machine (dvc pull gets it)."
        for name in order
        if name not in present
    ]
    documents: list[dict[str, Any]] = []
    gain_notes: dict[str, str] = {}
    for corpus in dict.fromkeys(settings.latents[name].corpus for name in present):
        chunks = folders.chunks(corpus)
        if wanted is not None and corpus not in wanted:
            continue
        if not chunks.is_dir():
            notes.append(f"{chunks} is not on this machine (dvc pull gets it).")
            continue
        shards = wanted[corpus] if wanted else corpus_sample(settings, chunks, corpus)
        names = [name for name in present if settings.latents[name].corpus == corpus]
        reader = _CorpusReader(settings, folders, corpus, names)
        documents += reader.documents(shards, order)
        gain_notes |= reader.gain_notes
    documents, dropped = _within_size(documents, settings.report.max_megabytes * 2**20)
    if dropped:
        notes.append(
            f"{dropped} sampled documents are left out, because the page would be larger than"
            f" report.max_megabytes = {settings.report.max_megabytes}."
        )
    entries = [
        _entry_facts(settings, name, order[name], gain_notes.get(name, "")) for name in present
    ]
    return {"entries": entries, "documents": documents, "notes": notes}


def _entry_facts(
    settings: HtmlReportSettings, name: str, iteration: int | None, gain_note: str
) -> dict[str, Any]:
    entry: LatentsEntry = settings.latents[name]
    return {
        "name": name,
        "model": entry.model,
        "iteration": iteration,
        "corpus": entry.corpus,
        "k": entry.k_samples or settings.k_samples,
        "method": entry.options.method,
        "selection": entry.options.selection,
        "gain_note": gain_note,
    }


class _CorpusReader:
    """Reads documents of one corpus with the latents of the entries `names`."""

    def __init__(
        self,
        settings: HtmlReportSettings,
        folders: DataFolders,
        corpus: str,
        names: Sequence[str],
    ) -> None:
        self.settings, self.folders, self.names = settings, folders, names
        self.chunks = folders.chunks(corpus)
        self.corpus = corpus
        self.gain_notes: dict[str, str] = {}  # why an entry has no token gains

    def documents(self, shards: Shards, order: Mapping[str, int | None]) -> list[dict[str, Any]]:
        """The documents of these shards in reading order."""
        chunks = document_rows(self.chunks, Chunk, shards)
        if not chunks:
            return []
        scores: dict[str, Mapping[tuple[str, int], TextScores]] = {}
        tables: dict[str, dict[tuple[str, int], list[Row]]] = {}
        for name in self.names:
            tables[name] = _by_chunk(document_rows(self.folders.latents(name), Sample, shards))
            scores[name] = self._scores(name, chunks, tables[name])
        coder = self._coder()
        documents: list[dict[str, Any]] = []
        for doc_id, rows in groupby(chunks, lambda row: row["doc_id"]):
            shown = [
                {
                    "text": row["text"],
                    "pieces": token_pieces(coder, row["text"], row["tokens"]) if coder else [],
                    "latents": {
                        name: _draws(tables[name][key], scores[name].get(key))
                        for name in self.names
                        if (key := (row["doc_id"], row["chunk"])) in tables[name]
                    },
                }
                for row in rows
            ]
            facts = _document_facts(shown, [name for name in self.names if order[name] is not None])
            documents.append({"id": doc_id, "corpus": self.corpus, "chunks": shown, **facts})
        return documents

    def _coder(self) -> TextCoder | None:
        """The tokenizer, which all models share; None where no entry has token gains."""
        for name in self.names:
            if name not in self.gain_notes:
                return TextCoder(final_weights(self._model(name)))
        return None

    def _model(self, name: str) -> Path:
        """The model that drew the entry `name`."""
        return self.folders.models / self.settings.latents[name].model

    def _scores(
        self, name: str, chunks: Sequence[Row], samples: Mapping[tuple[str, int], list[Row]]
    ) -> Mapping[tuple[str, int], TextScores]:
        """log p of every token of the text with the selected latent and without one, under the
        model that drew it; empty, with a note, where it is not computed."""
        entry, settings = self.settings.latents[name], self.settings
        model = self._model(name)
        note = ""
        if not settings.report.token_gains:
            note = "report.token_gains is false"
        elif entry.options.method == "smc":
            note = "contexts of sequential Monte Carlo contain latents"
        elif not model.is_dir():
            note = f"{model} is not on this machine (dvc pull gets it)"
        if note:
            self.gain_notes[name] = note
            return {}
        selected = {
            key: next(row["tokens"] for row in rows if row["selected"])
            for key, rows in samples.items()
            if any(row["selected"] for row in rows)
        }
        return score_text(
            model,
            [Chunk(**{**row, "tokens": tuple(row["tokens"])}) for row in chunks],
            selected,
            context_chunks=settings.context_chunks,
            max_latent_tokens=settings.max_latent_tokens,
            sampling=settings.sampling,
        )


def _by_chunk(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    chunks: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        chunks.setdefault((row["doc_id"], row["chunk"]), []).append(row)
    return chunks


def _draws(rows: Sequence[Row], scores: TextScores | None) -> dict[str, Any]:
    """The K draws of a chunk, their effective sample size, and the gain of the selected one."""
    weights_K = normalized_weights(np.array([row["log_weight"] for row in rows]))
    facts = {
        "ess": rounded(effective_sample_size(weights_K)),
        "samples": [
            {
                "latent": row["latent"],
                "source": row["source"],
                "finish": row["finish"],
                "log_q": rounded(row["log_q"]),
                "log_p_latent": rounded(row["log_p_latent"]),
                "log_p_text": rounded(row["log_p_text"]),
                "log_weight": rounded(row["log_weight"]),
                "weight": rounded(weight),
                "selected": row["selected"],
            }
            for row, weight in zip(rows, weights_K.tolist(), strict=True)
        ],
    }
    if scores is not None:
        gains_L = scores.with_latent - scores.without_latent
        facts["log_p_without"] = rounded(float(scores.without_latent.sum()))
        facts["gain"] = rounded(float(gains_L.sum()))
        facts["token_gains"] = [rounded(gain, 2) for gain in gains_L.tolist()]
    return facts


def _document_facts(chunks: Sequence[Row], chain: Sequence[str]) -> dict[str, Any]:
    """What documents are sorted and filtered by: `gain` of the last entry that has one, in nats;
    `ess`, the smallest effective sample size of a chunk as a fraction of its number of draws;
    `change`, the mean over consecutive iterations of how much the words of the selected latents
    differ (0 to 1); `invalid`, the number of draws that did not end by themselves."""
    latents = [latents for chunk in chunks for latents in chunk["latents"].values()]
    gains: dict[str, float] = {}
    for chunk in chunks:
        for name, draws in chunk["latents"].items():
            if draws.get("gain") is not None:
                gains[name] = gains.get(name, 0.0) + draws["gain"]
    gaining = [name for name in chain if name in gains] or list(gains)
    changes = [
        _word_difference(_selected(chunk["latents"][one]), _selected(chunk["latents"][other]))
        for chunk in chunks
        for one, other in pairwise(name for name in chain if name in chunk["latents"])
    ]
    fractions = [draws["ess"] / len(draws["samples"]) for draws in latents if draws["ess"]]
    samples = [sample for draws in latents for sample in draws["samples"]]
    return {
        "gain": rounded(gains[gaining[-1]]) if gaining else None,
        "gain_of": gaining[-1] if gaining else None,
        "ess": rounded(min(fractions)) if fractions else None,
        "change": rounded(sum(changes) / len(changes)) if changes else None,
        "invalid": sum(sample["finish"] != "stop" for sample in samples),
    }


def _selected(draws: Row) -> str:
    return next((sample["latent"] for sample in draws["samples"] if sample["selected"]), "")


def _word_difference(one: str, other: str) -> float:
    """1 minus the fraction of words that two texts share in the same order."""
    return 1 - SequenceMatcher(None, one.split(), other.split(), autojunk=False).ratio()


def _within_size(
    documents: Sequence[dict[str, Any]], limit: int
) -> tuple[list[dict[str, Any]], int]:
    """The first documents whose JSON has at most `limit` bytes together, and how many are left."""
    total = 0
    for index, document in enumerate(documents):
        total += len(json.dumps(document))
        if total > limit:
            return list(documents[:index]), len(documents) - index
    return list(documents), 0


def rounded(value: float, digits: int = MAX_DECIMALS) -> float | None:
    """A number for JSON, which has none that is infinite or NaN."""
    return round(float(value), digits) if math.isfinite(value) else None

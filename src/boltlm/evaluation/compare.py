"""Two models on the same held-out documents and questions: differences with their errors.

    python -m boltlm.evaluation.compare data/evaluate/em3 data/evaluate/em1 \\
        --chunks data/chunks/heldout --disagreements 5

Every document and question is its own pair, so what makes some of them hard for any model cancels:
the errors are smaller than those of the two models' numbers by themselves.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from boltlm.errors import UserError, stage
from boltlm.evaluation.answers import Answer
from boltlm.evaluation.likelihood import DocumentScore, chunk_bounds, ratio
from boltlm.evaluation.measure import ANSWERS, LATENT, RAW
from boltlm.records import Chunk, R, Sample, read

Difference = tuple[float, float, int]  # value, standard error, pairs
Key = tuple[str, int]
K = TypeVar("K")


def differences(one: Path, other: Path, chunks: Path) -> dict[str, Difference]:
    """What `one` has more than `other`, by the metric's name in metrics/eval: nats per token, over
    documents that both have; the bound for every K up to the draws that both have, over chunks
    where both have one; share of correct answers. Raises UserError where nothing is in common."""
    found = {"nll_per_token": _raw(one, other)}
    if all((folder / LATENT).is_dir() for folder in (one, other)):
        found |= _bounds(one, other, chunks)
    return found | _answers(one, other)


def _table(folder: Path, name: str, kind: type[R]) -> list[R]:
    if not (folder / name).is_dir():
        raise UserError(f"{folder}: no table '{name}' in it; run dvc repro evaluate@{folder.name}")
    return list(read(folder / name, kind))


def _raw(one: Path, other: Path) -> Difference:
    tables = [{row.doc_id: row for row in _table(f, RAW, DocumentScore)} for f in (one, other)]
    common = _common(*tables, what="documents")
    for name in common:
        if tables[0][name].tokens != tables[1][name].tokens:
            raise UserError(
                f"{one} and {other}: document '{name}' has {tables[0][name].tokens} and"
                f" {tables[1][name].tokens} tokens: the models have other tokenizers"
            )
    nats = np.array([tables[0][name].nll - tables[1][name].nll for name in common])
    tokens = np.array([tables[0][name].tokens for name in common], dtype=float)
    return *ratio(nats, tokens), len(common)


def _bounds(one: Path, other: Path, chunks: Path) -> dict[str, Difference]:
    lengths = {(chunk.doc_id, chunk.chunk): len(chunk.tokens) for chunk in read(chunks, Chunk)}
    tables = [_weights(folder) for folder in (one, other)]
    common = _common(*tables, lengths, what="chunks")
    draws = min(len(table[key]) for table in tables for key in common)
    documents, place = np.unique([doc_id for doc_id, _ in common], return_inverse=True)
    length_C = np.array([lengths[key] for key in common], dtype=float)
    found: dict[str, Difference] = {}
    for size in (2**power for power in range(draws.bit_length())):
        (one_C, share_C), (other_C, other_share_C) = (
            chunk_bounds(np.array([table[key][:draws] for key in common]), size) for table in tables
        )
        known_C = (share_C > 0) & (other_share_C > 0)
        above = np.bincount(place, np.where(known_C, one_C - other_C, 0.0), len(documents))
        below = np.bincount(place, np.where(known_C, length_C, 0.0), len(documents))
        found[f"elbo_per_token_k{size}"] = *ratio(above, below), int(known_C.sum())
    return found


def _weights(folder: Path) -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {}
    for sample in _table(folder, LATENT, Sample):
        found.setdefault((sample.doc_id, sample.chunk), []).append(sample.log_weight)
    return found


def _verdicts(folder: Path) -> dict[tuple[str, str], Answer]:
    if not (folder / ANSWERS).is_dir():  # no questions were asked
        return {}
    return {(row.space, row.question_id): row for row in read(folder / ANSWERS, Answer)}


def _answers(one: Path, other: Path) -> dict[str, Difference]:
    ours, theirs = _verdicts(one), _verdicts(other)
    found: dict[str, Difference] = {}
    for space in dict.fromkeys(space for space, _ in ours):
        keys = [key for key in ours if key[0] == space and key in theirs]
        gains = np.array([float(ours[key].correct) - theirs[key].correct for key in keys])
        if len(gains) > 1:
            error = float(gains.std(ddof=1) / np.sqrt(len(gains)))
            found[f"questions/{space}/accuracy"] = float(gains.mean()), error, len(gains)
    return found


def disagreements(one: Path, other: Path) -> list[tuple[Answer, Answer]]:
    """Questions that just one of the two answers rightly, each with both answers."""
    ours, theirs = _verdicts(one), _verdicts(other)
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return [(a, b) for a, b in pairs if a.correct != b.correct]


def _common(*tables: Mapping[K, object], what: str) -> list[K]:
    found = [key for key in tables[0] if all(key in table for table in tables)]
    if not found:
        raise UserError(f"no {what} that both models were measured on; evaluate them alike")
    return found


def _tell(model: str, answer: Answer) -> str:
    thought = "" if answer.thought is None else f" [{answer.thought}]"
    verdict = "right" if answer.correct else "wrong"
    return f"  {model}, {verdict}: {answer.extracted}{thought} {answer.completion.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", type=Path, help="data/evaluate/<model>")
    parser.add_argument("other", type=Path)
    parser.add_argument("--chunks", type=Path, required=True, help="of the held-out corpus")
    parser.add_argument("--disagreements", type=int, default=0, help="how many to print")
    args = parser.parse_args()
    print(f"{args.one.name} − {args.other.name}")
    for name, (value, error, pairs) in differences(args.one, args.other, args.chunks).items():
        print(f"{name:<28} {value:+.4f} ± {error:.4f}  ({pairs} pairs)")
    if args.disagreements:
        found = disagreements(args.one, args.other)
        print(f"{len(found)} questions with one right answer")
        for ours, theirs in found[: args.disagreements]:
            print(f"{ours.question_id} ({ours.space}), answer {ours.answer}")
            print(_tell(args.one.name, ours))
            print(_tell(args.other.name, theirs))


if __name__ == "__main__":
    stage(main)

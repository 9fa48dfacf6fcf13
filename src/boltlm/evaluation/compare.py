"""Two models on the same held-out documents and questions: differences with their errors.

    python -m boltlm.evaluation.compare data/evaluate/em3 data/evaluate/em1 \\
        --chunks data/chunks/heldout --disagreements 5

Every document and question is its own pair, so what makes some of them hard for any model cancels:
the errors are smaller than those of the two models' numbers by themselves.
"""

import argparse
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from boltlm.errors import UserError, stage
from boltlm.evaluation.downstream import Answer
from boltlm.evaluation.likelihood import DocumentScore, chunk_bounds, ratio
from boltlm.evaluation.measure import ANSWERS, LATENT, RAW
from boltlm.records import Chunk, R, Sample, read

Difference = tuple[float, float, int]  # value, standard error, pairs
Key = tuple[str, int]
Asked = tuple[str, str, int]  # measure, question, sample
K = TypeVar("K")


def differences(one: Path, other: Path, chunks: Path) -> dict[str, Difference]:
    """What `one` has more than `other`, by the metric's name in metrics/eval: nats per token, over
    documents that both have; the bound for every K up to the draws that both have, over chunks
    where both have one; share of correct answers. Raises UserError where nothing is in common."""
    corpus = chunks.name
    found = {"nll_per_token": _raw(one, other, corpus)}
    if all((folder / LATENT / corpus).is_dir() for folder in (one, other)):
        found |= _bounds(one, other, chunks)
    return found | _answers(one, other)


def _table(folder: Path, name: str, kind: type[R]) -> list[R]:
    if not (folder / name).is_dir():
        raise UserError(
            f"{folder}: no table '{name}' in it; run dvc repro evaluate@{folder.name}, with the"
            " corpus in evaluate.corpus or evaluate.beside"
        )
    return list(read(folder / name, kind))


def _raw(one: Path, other: Path, corpus: str) -> Difference:
    name = f"{RAW}/{corpus}"
    tables = [{row.doc_id: row for row in _table(f, name, DocumentScore)} for f in (one, other)]
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
    tables = [_weights(folder, chunks.name) for folder in (one, other)]
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


def _weights(folder: Path, corpus: str) -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {}
    for sample in _table(folder, f"{LATENT}/{corpus}", Sample):
        found.setdefault((sample.doc_id, sample.chunk), []).append(sample.log_weight)
    return found


def _verdicts(folder: Path) -> dict[Asked, Answer]:
    if not (folder / ANSWERS).is_dir():  # no questions were asked
        return {}
    answers = read(folder / ANSWERS, Answer)
    return {(row.measure, row.question_id, row.sample): row for row in answers}


def _answers(one: Path, other: Path) -> dict[str, Difference]:
    ours, theirs = _verdicts(one), _verdicts(other)
    found: dict[str, Difference] = {}
    for measure in dict.fromkeys(measure for measure, _, _ in ours):
        gains: dict[str, list[float]] = {}
        for key in ours:
            if key[0] == measure and key in theirs:
                gain = float(ours[key].correct) - theirs[key].correct
                gains.setdefault(key[1], []).append(gain)
        means = np.array([np.mean(of_question) for of_question in gains.values()])
        if len(means) > 1:
            error = float(means.std(ddof=1) / np.sqrt(len(means)))
            found[f"{measure}/accuracy"] = float(means.mean()), error, len(means)
    return found


def disagreements(one: Path, other: Path) -> list[tuple[Answer, Answer]]:
    """Answers to the same question of which just one is right, by the same grader; of a folder
    with itself, one answer with the verdicts of two graders."""
    if one == other:
        found: dict[tuple[str, ...], list[Answer]] = {}
        for row in _verdicts(one).values():
            place = (row.task, row.prompts, row.space, row.question_id, str(row.sample))
            found.setdefault(place, []).append(row)
        pairs = [pair for rows in found.values() for pair in combinations(rows, 2)]
    else:
        ours, theirs = _verdicts(one), _verdicts(other)
        pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    return [(a, b) for a, b in pairs if a.correct != b.correct]


def _common(*tables: Mapping[K, object], what: str) -> list[K]:
    found = [key for key in tables[0] if all(key in table for table in tables)]
    if not found:
        raise UserError(f"no {what} that both models were measured on; evaluate them alike")
    return found


def _tell(model: str, answer: Answer) -> str:
    verdict = "right" if answer.correct else "wrong"
    said = answer.completion.strip().replace("\n", "\n    ")
    return f"  {model}, {answer.grader}, {verdict}: {answer.extracted}\n    {said}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, help="data/evaluate/<model>")
    parser.add_argument("other", type=Path, help="the same again: to compare graders")
    parser.add_argument("--chunks", type=Path, help="data/chunks/<a held-out corpus>")
    parser.add_argument("--disagreements", type=int, default=0, help="how many to print")
    args = parser.parse_args()
    one, other = args.one, args.other
    if one != other:
        if args.chunks is None:
            raise UserError("--chunks is missing: data/chunks/<a held-out corpus>")
        print(f"{one.name} − {other.name}")
        for name, (value, error, pairs) in differences(one, other, args.chunks).items():
            print(f"{name:<34} {value:+.4f} ± {error:.4f}  ({pairs} pairs)")
    if args.disagreements or one == other:
        found = disagreements(one, other)
        print(f"{len(found)} answers with one verdict of two that is right")
        for ours, theirs in found[: args.disagreements]:
            print(f"{ours.question_id} ({ours.measure}), answer {ours.gold}")
            print(_tell(one.name, ours))
            print(_tell(other.name, theirs))


if __name__ == "__main__":
    stage(main)

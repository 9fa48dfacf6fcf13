"""Fine-tuning: what is learnt, what is asked, and that a killed run ends as one left alone."""

import itertools
import json
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from boltlm.corpus import generated, sources
from boltlm.errors import UserError
from boltlm.evaluation import backends
from boltlm.evaluation import finetune as stage
from boltlm.evaluation.downstream import Answer
from boltlm.evaluation.finetune import Places, finetune, spread
from boltlm.evaluation.lessons import Run, divided, examples, thoughts
from boltlm.evaluation.prompts import Space, encode
from boltlm.evaluation.tasks import loading
from boltlm.model.training import Trained, train
from boltlm.params import load
from boltlm.records import Document, Question, read, write_shard
from boltlm.tokens import EOL, PRIOR, SOL, TextCoder
from tests import tiny

BOS, EOS = tiny.BOS, tiny.EOS
NAME = "questions/standard/latent"


def entry(task: str, space: Space) -> Run:
    return Run(model="base", corpus="em", data="split/em", task=task, space=space)


RUN = asdict(entry("questions", "latent"))


def told(coder: TextCoder, found: Any) -> list[tuple[str, str]]:
    """Prompts and completions as text; that what looks like a special token is one is asserted."""
    m, pairs = coder.markers, []
    for one in found:
        assert (one.prompt[0], one.completion[-1]) == (m.bos, m.eos)
        both = coder.decode([*one.prompt, *one.completion])
        latent = SOL in both
        assert list(one.prompt[-2:]) == [m.sol, m.prior] if latent else m.sol not in one.prompt
        assert list(one.completion).count(m.eol) == latent
        pairs.append((coder.decode(list(one.prompt)), coder.decode(list(one.completion))))
    return pairs


def asked(coder: TextCoder, task: str, space: str, where: Path) -> list[list[int]]:
    """The prompts of a task, zero-shot, as a model gets them."""
    form: dict[str, Any] = {"task": task, "prompts": "standard", "space": space}
    found: Any = loading.docs(**form, where=str(where), zero_shot=True)["test"]
    return [[coder.markers.bos, *encode(coder, row["prompt"])] for row in found]


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_pages_teach_their_last_sentence(
    space: Space, base_coder: TextCoder, tmp_path: Path
) -> None:
    """Of two rounds the second one's result is asked for, and its derivation is the thought; the
    prompt is, id for id, the one in which the held-out questions are asked."""
    pages = tiny.pages(least_rounds=2, most_rounds=2, least_steps=1, most_steps=1)
    documents = list(itertools.islice(generated.documents(pages, seed=1), 3))
    own = thoughts(tmp_path / "split" / "em", documents)
    found = list(examples(base_coder, documents, own, entry("questions", space)))
    wanted: list[tuple[str, str]] = []
    rows: list[Question] = []
    for page in documents:
        assert page.thoughts is not None
        question, mark, answer = page.text.rpartition(" It stops at ")
        rows.append(Question(question_id=page.doc_id, prompt=question, answer=answer))
        thought, rest = page.thoughts[-1], f"{mark}{answer}{EOS}"
        if space == "latent":
            wanted.append((f"{BOS}{question}{SOL}{PRIOR}", f"{thought}{EOL}{rest}"))
        else:
            wanted.append((f"{BOS}{question}", f" {thought}{rest}"))
    assert told(base_coder, found) == wanted
    write_shard(tmp_path / "questions" / "00000.parquet", Question, rows)
    prompts = asked(base_coder, "questions", space, tmp_path / "questions")
    assert [list(one.prompt) for one in found] == prompts


ODD = ("He paid how much altogether", "Sum? (in feet)", "How far is city D.")


@pytest.mark.parametrize("space", ["latent", "raw"])
@pytest.mark.parametrize("question", ["Al has 2. He gets 3. Sum?", *ODD])
def test_gsm8k_teaches_its_answer(
    question: str, space: Space, base_coder: TextCoder, tmp_path: Path
) -> None:
    """In the task's wording, id for id as it is asked, also where a question does not end like a
    sentence: these are GSM8K's own ways."""
    where = tmp_path / "gsm8k.jsonl"
    row = {"question": question, "answer": "2+3=<<2+3=5>>5.\n#### 5"}
    where.write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = sources.GSM8K(kind="gsm8k", path=str(where), split="train", shuffle_buffer=0)
    documents = list(sources.documents(source, 1))
    own = thoughts(tmp_path / "split" / "em", documents)
    (one,) = list(examples(base_coder, documents, own, entry("gsm8k", space)))
    prompt, answer = f"{BOS}Q: {question}\nA:", f" The answer is 5.{EOS}"
    wanted = prompt, f" 2+3=5.{answer}"
    if space == "latent":
        wanted = f"{prompt}{SOL}{PRIOR}", f"2+3=5.{EOL}{answer}"
    assert told(base_coder, [one]) == [wanted]
    assert asked(base_coder, "gsm8k", space, where) == [one.prompt]


def test_the_division_hangs_on_seed_and_name_alone() -> None:
    """So that other thoughts, or more of them, leave trained what was trained on, and no question
    is on both sides."""
    found = [Document(doc_id=f"d{place}", text="x", source="s") for place in range(3000)]
    trained, heldout = divided(found, 0.2, 1)
    assert abs(len(heldout) - 600) < 4 * math.sqrt(3000 * 0.2 * 0.8)
    out = {one.doc_id for one in heldout}
    assert trained == [one for one in found if one.doc_id not in out]
    others = [Document(doc_id=f"d{place}", text="y", source="s") for place in range(999, 0, -1)]
    assert {one.doc_id for one in divided(others, 0.2, 1)[1]} == out & {o.doc_id for o in others}
    assert divided(found, 0.2, 2)[1] != heldout
    assert divided(found, 0.0, 1) == (found, [])


def verdicts(correct_SQN: np.ndarray, grader: str) -> list[list[Answer]]:
    texts = ("task", "prompts", "space", "subject", "prompt", "completion", "gold", "extracted")
    blank: dict[str, Any] = {"shots": 0, "lost_shots": 0, "thought": "", "grader": grader}
    blank |= dict.fromkeys(texts, "")
    return [
        [
            Answer(**blank, question_id=f"q{q}", sample=n, correct=bool(table[q, n]))
            for q, n in np.ndindex(*table.shape)
        ]
        for table in correct_SQN
    ]


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 5, 1), (1, 6, 3), (1, 4, 1), (2, 1, 5)])
def test_the_spread_by_hand(shape: tuple[int, int, int]) -> None:
    """Sums written out. One seed tells nothing of seeds, one sample nothing of samples; a second
    grader's verdicts do not count."""
    S, Q, N = shape
    x = np.random.default_rng(S + Q).random(shape) < np.linspace(0.1, 0.9, Q)[:, None]
    pairs = zip(verdicts(x, "a"), verdicts(~x, "b"), strict=True)
    found = spread([[*first, *second] for first, second in pairs], "t")

    def error(means: list[float]) -> float:
        if len(means) == 1:
            return math.nan
        mean = sum(means) / len(means)
        return math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))

    p = [[sum(x[s, q]) / N for q in range(Q)] for s in range(S)]
    wanted = {
        "t/accuracy": sum(map(sum, p)) / (S * Q),
        "t/accuracy_se": error([sum(p[s][q] for s in range(S)) / S for q in range(Q)]),
        "t/accuracy_se_seeds": error([sum(p[s]) / Q for s in range(S)]),
        "t/questions": Q,
        "samples": N,
        "seeds": S,
    }
    if N > 1:  # each share's binomial variance without bias, p (1 - p) / (N - 1)
        variances = (one * (1 - one) / (N - 1) for row in p for one in row)
        wanted["t/accuracy_se_samples"] = math.sqrt(sum(variances)) / (S * Q)
    assert found == pytest.approx(wanted, nan_ok=True)


class Small:
    """Eight pages, three times each, that tell a name's number; the questions ask for it."""

    def __init__(self, folder: Path, model: Path, **changes: Any) -> None:
        self.folder, self.model, self.split = folder, model, folder / "split"
        told = list(zip(generated.NAMES, "31415926", strict=False))
        pages = [
            Document(doc_id=f"{n}-{i}", text=f"{n}. It is {a}.", source="t", latent=f"{n} {a}.")
            for n, a in told
            for i in range(3)
        ]
        write_shard(self.split / "em" / "0.parquet", Document, pages)
        self.ask([Question(question_id=n, prompt=f"{n}.", answer=a) for n, a in told])
        self.params = load(tiny.ROOT / "params.yaml")
        self.params["evaluate"] |= {"thought_tokens": 10, "answer_tokens": 8, "batch_size": 2}
        tuning = self.params["finetune"]
        tuning |= {"epochs": 8, "samples": 2, "heldout_fraction": 0.2, "temperature": 1.0}
        tuning["train"] |= {"learning_rate": 0.03, "precision": "float32", "checkpoint_every": 8}
        tuning["runs"] = {"one": RUN}
        tuning |= changes

    def ask(self, questions: list[Question]) -> None:
        write_shard(self.split / "questions" / "0.parquet", Question, questions)

    def places(self, name: str) -> Places:
        work, out = self.folder / name, self.folder / f"{name}-out"
        return Places(self.model, self.split, self.split / "em", work, out)

    def run(self, work: str = "work") -> tuple[dict[str, float], list[Answer]]:
        places = self.places(work)
        return finetune(self.params, "one", places), list(read(places.out, Answer))


@pytest.fixture
def small(base_folder: Path, tmp_path: Path) -> Small:
    return Small(tmp_path, base_folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runs": {}}, "no key finetune.runs.one"),
        ({"runs": {"one": {**RUN, "task": "chess"}}}, "finetune.runs.one.task must be"),
        ({"runs": {"one": {**RUN, "task": "gsm8k"}}}, "no key 'benchmarks.gsm8k'"),
        ({"runs": {"one": {**RUN, "space": "both"}}}, "runs.one.space must be latent | raw"),
        ({"runs": {"one": {**RUN, "corpus": "none"}}}, "split/none: no *.parquet in it"),
        ({"seeds": 0}, "finetune: seeds must be above 0"),
        ({"heldout_fraction": 0.999}, "not one document to train on has a thought"),
        ({"beams": 4}, "unknown key finetune.beams"),
    ],
)
def test_params_that_cannot_be(changes: dict[str, Any], said: str, small: Small) -> None:
    """Each is named before the hours of a training."""
    small.params["finetune"] |= changes
    with pytest.raises(UserError, match=re.escape(said)):
        small.run()


def test_it_learns_what_it_is_asked(base_folder: Path, tmp_path: Path) -> None:
    """A shifted label, a lost EoL, or questions put otherwise than in training leave it at what
    it knew. Metrics are complete, and the thoughts that were learnt are in the table."""
    metrics, answers = Small(tmp_path, base_folder, epochs=40, temperature=0.6).run()
    before, _ = Small(tmp_path / "before", base_folder, epochs=1).run()
    assert before[f"{NAME}/accuracy"] < 0.4 < 0.8 < metrics[f"{NAME}/accuracy"]
    assert before["heldout_nll_per_token"] > metrics["heldout_nll_per_token"] + 1
    named = {f"{NAME}/accuracy{end}" for end in ("", "_se", "_se_seeds", "_se_samples")}
    others = {"samples", "seeds", "examples", "heldout_examples", "heldout_nll_per_token"}
    assert {f"{NAME}/questions", *named, *others} <= set(metrics)
    assert metrics["examples"] + metrics["heldout_examples"] == 24
    right = [a for a in answers if a.correct]
    assert len(right) / 32 == metrics[f"{NAME}/accuracy"]
    assert {a.thought for a in right} <= {f"{a.question_id} {a.gold}." for a in right}


def test_the_held_out_loss(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over tokens of the completions that were not trained on, EOS among them."""
    score, found = stage.token_log_probs, []

    def scoring(model: Any, prompts: Any, branches: Any, batch: int) -> Any:
        sums, tokens = 0.0, 0
        for prompt, (rest,) in zip(prompts, branches, strict=True):
            logits_LV = model(torch.tensor([[*prompt, *rest]])).logits[0, len(prompt) - 1 : -1]
            sums += float(cross_entropy(logits_LV, torch.tensor(rest), reduction="sum").detach())
            tokens += len(rest)
        found.append((sums / tokens, len(prompts)))
        return score(model, prompts, branches, batch)

    monkeypatch.setattr(stage, "token_log_probs", scoring)
    metrics, _ = small.run()
    assert {count for _, count in found} == {metrics["heldout_examples"]}
    wanted = np.mean([loss for loss, _ in found])
    assert metrics["heldout_nll_per_token"] == pytest.approx(wanted, abs=1e-5)


def test_nothing_is_done_twice(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call trains nothing and loads no model; a seed more is one training more."""
    first = small.run()
    shutil.rmtree(small.places("work").out)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "load", None)
        patch.setattr(stage, "train", None)
        assert small.run() == first
    trained = []
    monkeypatch.setattr(stage, "train", lambda *a, **k: trained.append(1) or train(*a, **k))
    small.params["finetune"]["seeds"] = 3
    metrics, answers = small.run()
    assert (len(trained), metrics["seeds"], answers[:32]) == (1, 3, first[1])


def test_other_questions_are_asked(small: Small) -> None:
    """The split was made anew under the same path: the old answers are to other questions."""
    small.run()
    small.ask([Question(question_id="new", prompt="Ann.", answer="3")])
    metrics, answers = small.run()
    assert ({a.question_id for a in answers}, metrics[f"{NAME}/questions"]) == ({"new"}, 1)


def test_seeds_draw_for_themselves(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their errors move together, and the spread over seeds and samples is told too small.
    Two trainings that change nothing leave the same model, asked twice."""
    monkeypatch.setattr(stage, "train", lambda *_, **__: Trained(0, 0, None))
    _, answers = small.run()
    texts = [a.completion for a in answers]
    assert len(set(texts)) == len(texts) == 32

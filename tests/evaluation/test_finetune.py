"""Fine-tuning: the examples, the prompts, the metrics, and what is computed again when."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
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
from boltlm.evaluation.downstream import TaskAnswer
from boltlm.evaluation.fewshot import encode_prompt
from boltlm.evaluation.finetune import FinetunePaths, accuracy_over_seeds, run_finetuning
from boltlm.evaluation.finetune_config import FinetuneRun, FinetuneSettings
from boltlm.evaluation.grading import grade
from boltlm.evaluation.sft_data import build_examples, read_thoughts, split_heldout
from boltlm.evaluation.task_spec import TaskName, ThoughtSpace
from boltlm.evaluation.tasks import loading
from boltlm.params import build_settings, load
from boltlm.records import Document, Question, read_shard, read_table, write_shard
from boltlm.sequences.sft import SFTExample
from boltlm.tokens import EOL, PRIOR, SOL, TextCoder
from boltlm.training.trainer import TrainResult, train_model
from tests import tiny

BOS, EOS = tiny.BOS, tiny.EOS
NAME = "questions/standard/latent"


def finetune_run(task: TaskName, space: ThoughtSpace) -> FinetuneRun:
    return FinetuneRun(model="base", corpus="em", data="split/em", task=task, space=space)


RUN = asdict(finetune_run("questions", "latent"))


def decode_examples(coder: TextCoder, examples: Iterable[SFTExample]) -> list[tuple[str, str]]:
    """Prompts and completions as text. Asserts that special tokens are encoded as such."""
    special, pairs = coder.special_tokens, []
    for example in examples:
        assert (example.prompt[0], example.completion[-1]) == (special.bos, special.eos)
        has_latent = SOL in coder.decode([*example.prompt, *example.completion])
        if has_latent:
            assert list(example.prompt[-2:]) == [special.sol, special.prior]
        else:
            assert special.sol not in example.prompt
        assert list(example.completion).count(special.eol) == has_latent
        pairs.append((coder.decode(list(example.prompt)), coder.decode(list(example.completion))))
    return pairs


def task_prompts(
    coder: TextCoder, task: TaskName, space: ThoughtSpace, data_path: Path
) -> list[list[int]]:
    """The ids of a task's zero-shot prompts, as a model gets them."""
    docs: Any = loading.load_docs(
        task=task, prompts="standard", space=space, data_path=str(data_path), zero_shot=True
    )["test"]
    return [[coder.special_tokens.bos, *encode_prompt(coder, doc["prompt"])] for doc in docs]


@pytest.mark.parametrize("space", ["latent", "cot"])
def test_examples_of_generated_pages(
    space: ThoughtSpace, base_coder: TextCoder, tmp_path: Path
) -> None:
    """The result of a page is the answer and its derivation the thought; the ids of the prompt are
    those of the prompt of the corresponding held-out question."""
    pages = tiny.pages(min_steps=1, max_steps=3)
    documents = list(itertools.islice(generated.generate_documents(pages, seed=1), 3))
    thoughts = read_thoughts(tmp_path / "split" / "em", documents)
    examples = list(
        build_examples(base_coder, documents, thoughts, finetune_run("questions", space))
    )
    expected: list[tuple[str, str]] = []
    questions: list[Question] = []
    for page in documents:
        assert page.thoughts is not None
        prompt, cue, answer = page.text.rpartition(" It stops at ")
        questions.append(
            Question(
                question_id=page.doc_id,
                subject="",
                prompt=prompt,
                stem="It stops at",
                answer=answer,
            )
        )
        thought, ending = page.thoughts[-1], f"{cue}{answer}{EOS}"
        if space == "latent":
            expected.append((f"{BOS}{prompt}{SOL}{PRIOR}", f"{thought}{EOL}{ending}"))
        else:
            expected.append((f"{BOS}{prompt}", f" {thought}{ending}"))
    assert decode_examples(base_coder, examples) == expected
    write_shard(tmp_path / "questions" / "00000.parquet", Question, questions)
    prompts = task_prompts(base_coder, "questions", space, tmp_path / "questions")
    assert [list(example.prompt) for example in examples] == prompts


UNUSUAL_QUESTIONS = ("He paid how much altogether", "Sum? (in feet)", "How far is city D.")


@pytest.mark.parametrize("space", ["latent", "raw"])
@pytest.mark.parametrize("question", ["Al has 2. He gets 3. Sum?", *UNUSUAL_QUESTIONS])
def test_examples_of_gsm8k(
    question: str, space: ThoughtSpace, base_coder: TextCoder, tmp_path: Path
) -> None:
    """They have the wording of the task, and prompts with the same ids, also where a question does
    not end like a sentence, as some in GSM8K do not."""
    data_path = tmp_path / "gsm8k.jsonl"
    row = {"question": question, "answer": "2+3=<<2+3=5>>5.\n#### 5"}
    data_path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = sources.GSM8KSource(kind="gsm8k", path=str(data_path), split="train", shuffle_buffer=0)
    documents = list(sources.read_documents(source, 1))
    thoughts = read_thoughts(tmp_path / "split" / "em", documents)
    run = finetune_run("gsm8k", space)
    (example,) = list(build_examples(base_coder, documents, thoughts, run))
    prompt, answer = f"{BOS}Q: {question}\nA:", f" The answer is 5.{EOS}"
    expected = prompt, f" 2+3=5.{answer}"
    if space == "latent":
        expected = f"{prompt}{SOL}{PRIOR}", f"2+3=5.{EOL}{answer}"
    assert decode_examples(base_coder, [example]) == [expected]
    assert task_prompts(base_coder, "gsm8k", space, data_path) == [example.prompt]


@pytest.mark.parametrize("space", ["latent", "raw"])
def test_examples_of_math(space: ThoughtSpace, base_coder: TextCoder, tmp_path: Path) -> None:
    """They have the wording of the task, prompts with the same ids, and an answer that the task's
    grader accepts."""
    problem, solution = "What is $1 + 1$?", r"It is $\boxed{\frac{4}{2}}$."
    row = {"problem": problem, "solution": solution, "type": "Algebra", "level": "Level 1"}
    data_path = tmp_path / "math.jsonl"
    data_path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = sources.MATHSource(kind="math", path=str(data_path), split="train", shuffle_buffer=0)
    documents = list(sources.read_documents(source, 1))
    thoughts = read_thoughts(tmp_path / "split" / "em", documents)
    run = finetune_run("math", space)
    (example,) = list(build_examples(base_coder, documents, thoughts, run))
    prompt = f"{BOS}Problem:\n{problem}\n\nSolution:"
    answer = r" Final Answer: The final answer is $\frac{4}{2}$. I hope it is correct."
    expected = prompt, f" {solution}{answer}{EOS}"
    if space == "latent":
        expected = f"{prompt}{SOL}{PRIOR}", f"{solution}{EOL}{answer}{EOS}"
    assert decode_examples(base_coder, [example]) == [expected]
    assert task_prompts(base_coder, "math", space, data_path) == [example.prompt]
    assert grade("math", answer, solution)["math_verify"].correct
    assert not grade("math", answer.replace("4", "5"), solution)["math_verify"].correct


def test_the_held_out_documents_depend_on_seed_and_id_alone() -> None:
    """With other or more documents, each document stays on its side."""
    documents = [Document(doc_id=f"d{index}", text="x", source="s") for index in range(3000)]
    training, heldout = split_heldout(documents, 0.2, 1)
    assert abs(len(heldout) - 600) < 4 * math.sqrt(3000 * 0.2 * 0.8)
    heldout_ids = {document.doc_id for document in heldout}
    assert training == [d for d in documents if d.doc_id not in heldout_ids]
    others = [Document(doc_id=f"d{index}", text="y", source="s") for index in range(999, 0, -1)]
    other_ids = {document.doc_id for document in others}
    other_heldout = split_heldout(others, 0.2, 1)[1]
    assert {document.doc_id for document in other_heldout} == heldout_ids & other_ids
    assert split_heldout(documents, 0.2, 2)[1] != heldout
    assert split_heldout(documents, 0.0, 1) == (documents, [])


def answer_tables(correct_SQN: np.ndarray, grader: str, members: int = 1) -> list[list[TaskAnswer]]:
    """The answers of each seed with these verdicts, to clusters of this many questions."""
    texts = ("task", "prompts", "space", "subject", "level", "prompt", "completion", "gold")
    values: dict[str, Any] = {"shots": 0, "lost_shots": 0, "thought": "", "grader": grader}
    values |= dict.fromkeys((*texts, "extracted"), "")
    return [
        [
            TaskAnswer(
                **values,
                question_id=f"q{q}",
                cluster=f"q{q // members}",
                cue=0,
                sample=n,
                correct=bool(correct_QN[q, n]),
            )
            for q, n in np.ndindex(*correct_QN.shape)
        ]
        for correct_QN in correct_SQN
    ]


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 5, 1), (1, 6, 3), (1, 4, 1), (2, 1, 5)])
def test_accuracy_over_seeds_by_hand(shape: tuple[int, int, int]) -> None:
    """The sums written out. With one seed there is no error over seeds, with one sample none over
    samples; the verdicts of a second grader do not count."""
    S, Q, N = shape
    correct_SQN = np.random.default_rng(S + Q).random(shape) < np.linspace(0.1, 0.9, Q)[:, None]
    tables = [
        [*first, *second]
        for first, second in zip(
            answer_tables(correct_SQN, "a"), answer_tables(~correct_SQN, "b"), strict=True
        )
    ]

    def standard_error(means: list[float]) -> float:
        if len(means) == 1:
            return math.nan
        mean = sum(means) / len(means)
        return math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))

    p = [[sum(correct_SQN[s, q]) / N for q in range(Q)] for s in range(S)]
    expected = {
        "t/accuracy": sum(map(sum, p)) / (S * Q),
        "t/accuracy_se": standard_error([sum(p[s][q] for s in range(S)) / S for q in range(Q)]),
        "t/accuracy_se_seeds": standard_error([sum(p[s]) / Q for s in range(S)]),
        "t/questions": Q,
        "t/clusters": Q,
        "samples": N,
        "seeds": S,
    }
    if N > 1:  # the unbiased estimate of a fraction's binomial variance is p (1 − p) / (N − 1)
        variances = [fraction * (1 - fraction) / (N - 1) for row in p for fraction in row]
        expected["t/accuracy_se_samples"] = math.sqrt(sum(variances)) / (S * Q)
    assert accuracy_over_seeds(tables, "t") == pytest.approx(expected, nan_ok=True)


def test_accuracy_over_seeds_of_clustered_questions() -> None:
    """The error over questions treats those of a cluster as one; the other errors do not change."""
    correct_SQN = np.random.default_rng(4).random((2, 12, 3)) < 0.6
    clustered = accuracy_over_seeds(answer_tables(correct_SQN, "g", members=3), "t")
    means_G = correct_SQN.mean((0, 2)).reshape(4, 3).mean(1)
    assert clustered["t/accuracy_se"] == pytest.approx(means_G.std(ddof=1) / 2)
    plain = accuracy_over_seeds(answer_tables(correct_SQN, "g"), "t")
    changed = {name for name, value in plain.items() if clustered[name] != value}
    assert changed == {"t/accuracy_se", "t/clusters"}


class SmallStage:
    """Eight pages, three times each, that state the number of a name; the questions ask for it."""

    def __init__(self, folder: Path, model: Path, **changes: Any) -> None:
        self.folder, self.model, self.split = folder, model, folder / "split"
        numbers = list(zip(generated.NAMES, "31415926", strict=False))
        pages = [
            Document(doc_id=f"{n}-{i}", text=f"{n}. It is {a}.", source="t", latent=f"{n} {a}.")
            for n, a in numbers
            for i in range(3)
        ]
        write_shard(self.split / "em" / "0.parquet", Document, pages)
        self.write_questions(
            [
                Question(question_id=n, subject="", prompt=f"{n}.", stem="It is", answer=a)
                for n, a in numbers
            ]
        )
        self.params = load(tiny.ROOT / "params.yaml")
        self.params["evaluate"]["batch_size"] = 2
        section = self.params["finetune"]
        section |= {"max_thought_tokens": 10, "max_answer_tokens": 8}
        section |= {"epochs": 8, "samples": 2, "heldout_fraction": 0.2, "temperature": 1.0}
        section["train"] |= {"learning_rate": 0.03, "precision": "float32", "checkpoint_every": 8}
        section["runs"] = {"one": RUN}
        section |= changes

    def write_questions(self, questions: list[Question]) -> None:
        write_shard(self.split / "questions" / "0.parquet", Question, questions)

    def paths(self, name: str) -> FinetunePaths:
        work, out = self.folder / name, self.folder / f"{name}-out"
        return FinetunePaths(self.model, self.split, self.split / "em", work, out)

    def run(self, name: str = "work") -> tuple[dict[str, float], list[TaskAnswer]]:
        """The metrics and the answers, with the work folder of this name."""
        paths = self.paths(name)
        settings = build_settings(FinetuneSettings, self.params, name="one")
        return run_finetuning(settings, paths), list(read_table(paths.out, TaskAnswer))


@pytest.fixture
def small(base_folder: Path, tmp_path: Path) -> SmallStage:
    return SmallStage(tmp_path, base_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "no key 'finetune.runs.one'"),
        ({"runs": {"one": {**RUN, "task": "chess"}}}, "finetune.runs.one.task must be gsm8k | "),
        ({"runs": {"one": {**RUN, "task": "gsm8k"}}}, "there is no key benchmarks.gsm8k"),
        ({"runs": {"one": {**RUN, "space": "both"}}}, "runs.one.space must be latent | raw"),
        ({"runs": {"one": {**RUN, "space": "raw"}}}, "use 'cot' for a thought in plain text"),
        ({"runs": {"one": {**RUN, "corpus": "none"}}}, "one.corpus must name an entry of corpora"),
        ({"runs": {"one": {**RUN, "model": "none"}}}, "one.model must name an entry of models"),
        ({"runs": {"one": {**RUN, "data": "latents/em1"}}}, "runs.one.data must be teacher/"),
        ({"runs": {"one": {**RUN, "beams": 4}}}, "unknown key finetune.runs.one.beams"),
        ({"seeds": 0}, "finetune.seeds must be 1 or more"),
        ({"workers": 0}, "finetune.workers must be 1 or more"),
        ({"temperature": -1.0}, "finetune.temperature must be 0 or more"),
        ({"heldout_fraction": 1.0}, "finetune.heldout_fraction must be in [0, 1)"),
        ({"heldout_fraction": 0.999}, "no training document has a thought"),
    ],
)
def test_invalid_params(changes: dict[str, Any], message: str, small: SmallStage) -> None:
    """Each is reported before a training begins."""
    small.params["finetune"] |= changes
    with pytest.raises(UserError, match=re.escape(message)):
        small.run()


def test_the_model_learns_the_answers(base_folder: Path, tmp_path: Path) -> None:
    """A shifted label, a lost EoL, or prompts that differ from those of training would leave the
    accuracy as it was. Metrics are complete, and the learnt thoughts are in the table."""
    metrics, answers = SmallStage(tmp_path, base_folder, epochs=40, temperature=0.6).run()
    untrained, _ = SmallStage(tmp_path / "untrained", base_folder, epochs=1).run()
    assert untrained[f"{NAME}/accuracy"] < 0.4 < 0.8 < metrics[f"{NAME}/accuracy"]
    assert untrained["val_nll_per_token"] > metrics["val_nll_per_token"] + 1
    accuracies = {f"{NAME}/accuracy{end}" for end in ("", "_se", "_se_seeds", "_se_samples")}
    counts = {"samples", "seeds", "examples", "val_examples", "documents_without_thought"}
    assert {f"{NAME}/questions", "val_nll_per_token", *accuracies, *counts} <= set(metrics)
    assert metrics["examples"] + metrics["val_examples"] == 24
    correct = [a for a in answers if a.correct]
    assert len(correct) / 32 == metrics[f"{NAME}/accuracy"]
    stated = {f"{a.question_id} {a.gold.removeprefix('It is ')}" for a in correct}
    assert {a.thought for a in correct} <= stated


def test_the_held_out_loss(small: SmallStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the mean over the tokens of the held-out completions, EOS included."""
    original, losses = stage.token_log_probs, []

    def record_loss(model: Any, prompts: Any, branches: Any, batch_tokens: int) -> Any:
        total, num_tokens = 0.0, 0
        for prompt, (completion,) in zip(prompts, branches, strict=True):
            ids_1L = torch.tensor([[*prompt, *completion]])
            logits_LV = model(ids_1L).logits[0, len(prompt) - 1 : -1]
            targets_L = torch.tensor(completion)
            total += float(cross_entropy(logits_LV, targets_L, reduction="sum").detach())
            num_tokens += len(completion)
        losses.append((total / num_tokens, len(prompts)))
        return original(model, prompts, branches, batch_tokens)

    monkeypatch.setattr(stage, "token_log_probs", record_loss)
    metrics, _ = small.run()
    assert {count for _, count in losses} == {metrics["val_examples"]}
    expected = np.mean([loss for loss, _ in losses])
    assert metrics["val_nll_per_token"] == pytest.approx(expected, abs=1e-5)


def test_examples_longer_than_the_window_are_left_out(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted, on both sides of the split; a run without any other example is an error."""
    small = SmallStage(tmp_path, base_folder, heldout_fraction=0.5)
    shard = small.split / "em" / "0.parquet"
    pages = read_shard(shard, Document)
    long = {"Ann-0", "Ann-1", "Ann-2", "Bob-0", "Bob-1"}
    pages = [replace(p, latent="1" * 200) if p.doc_id in long else p for p in pages]
    write_shard(shard, Document, pages)
    monkeypatch.setattr(stage, "train_model", lambda *_, **__: TrainResult(0, 0, None))
    metrics, _ = small.run()
    assert metrics["dropped_too_long"] == len(long & {page.doc_id for page in pages}) > 0
    assert metrics["examples"] + metrics["val_examples"] == 24 - metrics["dropped_too_long"]
    assert metrics["documents_without_thought"] == 0
    write_shard(shard, Document, [replace(page, latent="1" * 200) for page in pages])
    with pytest.raises(UserError, match="no training document fits the context window"):
        small.run()


def test_nothing_is_computed_twice(small: SmallStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call trains nothing and loads no model; one more seed is one more training."""
    first = small.run()
    shutil.rmtree(small.paths("work").out)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "load_lm", None)
        patch.setattr(stage, "train_model", None)
        assert small.run() == first
    trainings = []

    def counting(*arguments: Any, **options: Any) -> TrainResult:
        trainings.append(1)
        return train_model(*arguments, **options)

    monkeypatch.setattr(stage, "train_model", counting)
    small.params["finetune"]["seeds"] = 3
    metrics, answers = small.run()
    assert (len(trainings), metrics["seeds"], answers[:32]) == (1, 3, first[1])


def test_new_questions_are_answered(small: SmallStage) -> None:
    """After the split was made again under the same path, the old answers are not used."""
    small.run()
    small.write_questions(
        [Question(question_id="new", subject="", prompt="Ann.", stem="It is", answer="3")]
    )
    metrics, answers = small.run()
    assert ({a.question_id for a in answers}, metrics[f"{NAME}/questions"]) == ({"new"}, 1)


def test_each_seed_has_random_numbers_of_its_own(
    small: SmallStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the errors of the seeds would be correlated, and the standard errors over seeds and
    samples too small. Here training changes nothing, and the same model is sampled for each."""
    monkeypatch.setattr(stage, "train_model", lambda *_, **__: TrainResult(0, 0, None))
    _, answers = small.run()
    completions = [a.completion for a in answers]
    assert len(set(completions)) == len(completions) == 32


def test_trainings_at_once_give_the_same(
    small: SmallStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds in two processes: the bytes of one process, which trains one after the other."""
    small.params["finetune"] |= {"epochs": 1}
    small.params["sampling"]["threads"] = 1
    one = small.run("one")
    monkeypatch.setattr(stage, "train_model", None)
    small.params["finetune"]["workers"] = 2
    assert small.run("two") == one
    files = [sorted(small.paths(name).out.iterdir()) for name in ("one", "two")]
    assert [len(tables) for tables in files] == [2, 2]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_failed_training_loses_no_other(
    small: SmallStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results of the first seed are there when the second fails; only that is trained again."""
    seeds: list[int] = []

    def failing_once(*arguments: Any, seed: int, **options: Any) -> TrainResult:
        seeds.append(seed)
        if len(seeds) == 2:
            raise OSError("the disk is full")
        return train_model(*arguments, seed=seed, **options)

    monkeypatch.setattr(stage, "train_model", failing_once)
    small.params["finetune"] |= {"epochs": 1}
    with pytest.raises(OSError, match="the disk is full"):
        small.run()
    small.run()
    assert [seed == seeds[0] for seed in seeds] == [True, False, False]
    assert seeds[1] == seeds[2]


@pytest.mark.parametrize(
    ("workers", "trainings", "cuda", "count", "gpus"),
    [(1, 5, True, 1, 0), (8, 5, True, 5, 1), (4, 5, False, 4, 0), (4, 1, True, 1, 0)],
)
def test_each_of_several_trainings_has_a_gpu(
    small: SmallStage,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    trainings: int,
    cuda: bool,
    count: int,
    gpus: int,
) -> None:
    """Where there are GPUs; a training alone has what the process has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    small.params["finetune"]["workers"] = workers
    settings = build_settings(FinetuneSettings, small.params, name="one")
    shared = stage._workers(settings, trainings)
    assert (shared.count, shared.gpus_per_worker) == (count, gpus)

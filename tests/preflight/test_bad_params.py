"""Wrong values in params.yaml: each is refused before anything runs, in one line that names the
key, the value and what is allowed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from boltlm.errors import UserError
from boltlm.params import load
from boltlm.preflight.check import check_params, params_findings
from tests import tiny

LAPTOP = load(tiny.ROOT / "params.yaml")
OPENAI = load(tiny.ROOT / "presets" / "openai.yaml")["teachers"]["warmstart"]
BATCH = {"kind": "openai_batch", "max_requests_per_batch": 10**9}
EM1 = LAPTOP["models"]["em1"]
DRAW = LAPTOP["latents"]["em1"]
FILES = {"kind": "files", "path": "a.jsonl", "shuffle_buffer": 0}
COLUMNS = {"text": "text", "doc_id": None, "cluster": None, "latent": None, "pieces": None}
INTEGER, NUMBER = "must be of type int, found", "must be of type float, found"


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The laptop's params with other values at dotted keys; `...` removes a key."""
    params = copy.deepcopy(LAPTOP)
    for key, value in changes:
        *parts, last = key.split(".")
        section = params
        for part in parts:
            section = section[part]
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return params


# The key that is changed, its wrong value, and what the line must say.
ROWS: list[tuple[str, Any, str]] = [
    # seeds and counts
    ("seed", -1, "seed must be 0 or more, found -1"),
    ("seed", True, f"seed {INTEGER} True"),
    ("seed", 1.5, f"seed {INTEGER} 1.5"),
    ("seed", "one", f"seed {INTEGER} 'one'"),
    ("seed", None, f"seed {INTEGER} None"),
    ("seed", [1], f"seed {INTEGER} [1]"),
    ("seed", 2**63, "seed must be below 2^63 in size"),
    ("seed", 10**5000, "seed must be below 2^63 in size, found an integer of 16610 bits"),
    ("data_seed", -3, "data_seed must be 0 or more, found -3"),
    ("data_seed", False, f"data_seed {INTEGER} False"),
    ("models.em1.seed", -2, "models.em1.seed must be 0 or more, found -2"),
    ("models.em1.seed", 0.5, f"models.em1.seed {INTEGER} 0.5"),
    ("k_samples", 0, "k_samples must be 1 or more, found 0"),
    ("k_samples", -1, "k_samples must be 1 or more, found -1"),
    ("k_samples", 2.0, f"k_samples {INTEGER} 2.0"),
    ("k_samples", "4", f"k_samples {INTEGER} '4'"),
    ("k_samples", {}, f"k_samples {INTEGER} {{}}"),
    ("latents.em1.k_samples", 0, "latents.em1.k_samples must be 1 or more, found 0"),
    ("context_chunks", -1, "context_chunks must be 0 or more, found -1"),
    ("max_latent_tokens", 0, "max_latent_tokens must be 1 or more, found 0"),
    ("max_latent_tokens", -5, "max_latent_tokens must be 1 or more, found -5"),
    # keys
    ("sed", 1, "unknown key sed; known here: base, benchmarks, chunks"),
    ("seed", ..., "no key 'seed' (params.yaml has: "),
    ("evaluate", ..., "no key 'evaluate'"),
    ("train", ..., "no key 'train'"),
    ("corpus", None, "must be a mapping ({}: as `corpus`)"),
    ("models", None, "models must be of type"),
    ("models", [EM1], "models must be of type"),
    ("teachers", "none", "teachers must be of type"),
    ("models.em1", None, "models.em1 must be a mapping"),
    ("models.em1.epochs", 3, "unknown key models.em1.epochs; known here: parent, corpus"),
    ("models.warmstart.budget.amounts", 3, "unknown key models.warmstart.budget.amounts"),
    ("train.lr", 0.1, "unknown key train.lr; known here: optimizer, learning_rate"),
    ("train.schedule.kind", ..., "missing key train.schedule.kind"),
    ("finetune.epoch", 1, "unknown key finetune.epoch; known here: batch_size, epochs"[:34]),
    ("prompts.fewshots", "x", "unknown key prompts.fewshots; known here: fewshot, teacher"),
    ("report.pages", 1, "unknown key report.pages"),
    ("split.shards", 1, "unknown key split.shards"),
    # names
    ("models", {"x; touch pwned": EM1}, "a key of models must be a letter followed by letters"),
    ("models", {"$(touch pwned)": EM1}, "found '$(touch pwned)'"),
    ("models", {"a'b": EM1}, 'found "a\'b"'),
    ("models", {"a b": EM1}, "found 'a b'"),
    ("models", {"..": EM1}, "a key of models must be a letter"),
    ("models", {"a/b": EM1}, "a key of models must be a letter"),
    ("models", {"-rf": EM1}, "found '-rf'"),
    ("models", {"é": EM1}, "found 'é'"),
    ("models", {"a\nb": EM1}, "found 'a\\nb'"),
    ("models", {"": EM1}, "found ''"),
    ("models", {1: EM1}, "a key of models must be of type str, found 1"),
    ("models.base", EM1, "a key of models must be a letter followed by letters, digits, - and _,"),
    ("latents", {"em1`id`": DRAW}, "a key of latents must be a letter"),
    ("corpora.questions", {"documents": 1, "source": {}}, "and not questions or gsm8k or math"),
    ("corpora.gsm8k", {"documents": 1, "source": {}}, "found 'gsm8k'"),
    ("corpora.a|b", {"documents": 1, "source": {}}, "a key of corpora must be a letter"),
    ("teachers.a&b", {"kind": "dataset", "corpus": "em"}, "a key of teachers must be a letter"),
    ("finetune.runs.a>b", LAPTOP["finetune"]["runs"]["em3"], "a key of finetune.runs must be"),
    ("curves.em9", {}, "a key of curves must name an entry of models"),
    ("inputs", {"my books": "x"}, "a key of inputs must be a letter"),
    ("inputs", {"books": "x'; touch pwned; '"}, "inputs.books must have no ' and no line break"),
    ("inputs", {"books": ""}, "inputs.books must not be empty"),
    ("inputs", {"books": None}, "inputs.books must be of type str, found None"),
    ("prompts.teacher", "x'y", "prompts.teacher must have no ' and no line break"),
    ("launcher", "", "launcher must not be empty"),
    ("launcher", ["python"], "launcher must be of type str"),
    # references and the graph
    ("models.em1.data", "latents/em9", "models.em1.data names 'latents/em9', but latents has no"),
    ("models.em1.data", "em1", "models.em1.data must be teacher/<entry of teachers>"),
    ("models.em1.data", "latents/../../x", "latents has no entry '../../x'"),
    ("models.em1.parent", "em9", "models.em1.parent must name an entry of models (base, "),
    ("models.em1.corpus", "wem", "models.em1.corpus must name an entry of corpora"),
    ("models.em1.parent", "em1", "models.em1.parent closes a circle: models/em1 → models/em1"),
    ("models.em1.data", "latents/em2", "closes a circle"),
    ("latents.em1.previous", "latents/em1", "closes a circle: latents/em1 → latents/em1"),
    ("latents.em1.model", "base", "latents.em1.model must name an entry of models"),
    ("evaluate.corpus", "em", "evaluate.corpus is 'em', which teachers.all.corpus is for too"),
    ("evaluate.corpus", "base", "evaluate.corpus is 'base', which base is for too"),
    ("evaluate.corpus", "none", "evaluate.corpus must name an entry of corpora"),
    ("evaluate.extra_corpora", ["em"], "evaluate.extra_corpora[0] is 'em'"),
    ("evaluate.extra_corpora", ["heldout"], "extra_corpora must not list the corpus itself"),
    ("evaluate.extra_corpora", "heldout", "evaluate.extra_corpora must be of type"),
    ("models.em1.mix_corpus", 3, "models.em1.mix_corpus must be of type str, found 3"),
    ("finetune.runs.em3.data", "teacher/x", "teachers has no entry 'x'"),
    ("finetune.runs.em3.task", "gsm8k", "there is no key benchmarks.gsm8k"),
    # lists
    ("evaluate.k_samples", [], "evaluate.k_samples must not be empty"),
    ("evaluate.k_samples", [1, 2, 2], "must not list anything twice, found 2 twice"),
    ("evaluate.k_samples", [1, 0], "evaluate.k_samples[1] must be 1 or more, found 0"),
    ("evaluate.k_samples", [1, True], f"evaluate.k_samples[1] {INTEGER} True"),
    ("evaluate.k_samples", 4, "evaluate.k_samples must be of type"),
    ("evaluate.k_samples", [64], "large_k.k_samples must be above those of k_samples (64)"),
    ("evaluate.tasks", ["questions/standard/raw"] * 2, "must not list anything twice"),
    ("evaluate.tasks", ["questions/standard"], "'questions/standard' is not of the form"),
    ("evaluate.tasks", ["gsm8k/standard/raw"], "there is no key benchmarks.gsm8k"),
    ("evaluate.tasks", [None], "evaluate.tasks[0] must be of type str, found None"),
    ("evaluate.cues", [], "evaluate.cues must not be empty"),
    ("chunks.from_source", ["em", "em"], "chunks.from_source must not list anything twice"),
    ("chunks.from_source", ["em"], "the source of corpora.em lists no pieces"),
    # ranges
    ("evaluate.limit", 0, "evaluate.limit must be 1 or more, found 0"),
    ("evaluate.limit", -4, "evaluate.limit must be 1 or more, found -4"),
    ("evaluate.batch_size", 0, "evaluate.batch_size must be 1 or more, found 0"),
    ("evaluate.large_k", {"k_samples": 64, "documents": 0}, "large_k.documents must be 1 or more"),
    ("finetune.top_p", 0, "finetune.top_p must be in (0, 1], found 0"),
    ("finetune.top_p", 1.5, "finetune.top_p must be in (0, 1], found 1.5"),
    ("finetune.top_k", -1, "finetune.top_k must be 0 or more, found -1"),
    ("finetune.top_k", 1.5, f"finetune.top_k {INTEGER} 1.5"),
    ("finetune.temperature", -0.1, "finetune.temperature must be 0 or more, found -0.1"),
    ("finetune.temperature", float("inf"), "finetune.temperature must be a finite number"),
    ("finetune.heldout_fraction", 1, "finetune.heldout_fraction must be in [0, 1), found 1"),
    ("finetune.seeds", 0, "finetune.seeds must be 1 or more, found 0"),
    ("train.learning_rate", 0, "train.learning_rate must be above 0, found 0"),
    ("train.learning_rate", float("nan"), "train.learning_rate must be a finite number"),
    ("train.learning_rate", "1e-4", f"train.learning_rate {NUMBER} '1e-4'"),
    ("train.beta1", -0.1, "train.beta1 must be in [0, 1), found -0.1"),
    ("train.beta2", 1, "train.beta2 must be in [0, 1), found 1"),
    ("train.eps", 0, "train.eps must be above 0, found 0"),
    ("train.max_grad_norm", 0, "train.max_grad_norm must be above 0, found 0"),
    ("train.log_every", 0, "train.log_every must be 1 or more, found 0"),
    ("train.checkpoint_every", 0, "train.checkpoint_every must be 1 or more, found 0"),
    ("train.weight_decay", -1, "train.weight_decay must be 0 or more, found -1"),
    ("train.batch_size", 0, "train.batch_size must be 1 or more, found 0"),
    ("train.micro_batch_size", 0, "train.micro_batch_size must be 1 or more, found 0"),
    ("train.compile", 1, "train.compile must be of type bool, found 1"),
    ("train.optimizer", "sgd", "train.optimizer must be adamw | muon, found 'sgd'"),
    ("train.schedule.warmup", -1, "train.schedule.warmup must be 0 or more, found -1"),
    ("train.schedule.decay_fraction", 0, "train.schedule.decay_fraction must be in (0, 1]"),
    ("train.validation", {"every": 0, "documents": 1, "k_samples": 1}, "validation.every must be"),
    ("train.snapshots", {"every": 0, "precision": "bfloat16"}, "train.snapshots.every must be"),
    ("model_defaults.mix_raw", 1, "model_defaults.mix_raw must be in [0, 1), found 1"),
    ("model_defaults.budget.amount", 0, "model_defaults.budget.amount must be 1 or more"),
    ("models.em1.mix_raw", -0.1, "models.em1.mix_raw must be in [0, 1), found -0.1"),
    ("sequences.sequence_length", 1, "sequences.sequence_length must be 2 or more, found 1"),
    ("sampling.gpus_per_worker", -1, "sampling.gpus_per_worker must be 0 or more, found -1"),
    ("sampling.gpu_memory_utilization", 1, "gpu_memory_utilization must be in (0, 1), found 1"),
    ("sampling.workers", 0, "sampling.workers must be 1 or more, found 0"),
    ("sampling.threads", 0, "sampling.threads must be 1 or more, found 0"),
    ("sampling.address", "", "sampling.address must not be empty"),
    ("sampling.sampler", "hf", "sampling.sampler must be transformers | vllm, found 'hf'"),
    ("estep.temperature", 0, "estep.temperature must be above 0, found 0"),
    ("estep.min_ess_fraction", 2, "estep.min_ess_fraction must be in (0, 1], found 2"),
    ("latents.em1.estep", {"prior_draws": 4}, "prior_draws must be below K (4), found 4"),
    ("chunks.mean_sentences", 0, "chunks.mean_sentences must be above 0, found 0"),
    ("chunks.mean_sentences", float("nan"), "chunks.mean_sentences must be a finite number"),
    ("chunks.min_sentences", 2, "chunks: min_sentences must be at most max_sentences (1), found 2"),
    ("base.hidden_size", 130, "hidden_size must be a multiple of 2 × num_heads (8)"),
    ("base.hidden_size", 12, "found 12"),
    ("base.num_heads", 0, "base.num_heads must be 1 or more, found 0"),
    ("base.context_length", 64, "sequence_length must be from 2 to context_length (64), found 128"),
    ("base.vocab_size", 100, "vocab_size must be 262 or more"),
    ("base", {"kind": "checkpoint", "model": ""}, "base.model must not be empty"),
    ("base", {"kind": "checkpoint", "model": "x", "epochs": 1}, "unknown key base.epochs"),
    ("base.kind", "scratch", "base.kind must be pretrain | checkpoint, found 'scratch'"),
    ("corpora.em.documents", 0, "corpora.em.documents must be 1 or more, found 0"),
    ("corpora.em.documents", 1.0, f"corpora.em.documents {INTEGER} 1.0"),
    ("corpora.em.source.kind", "web", "em.source.kind must be generated | files | texts | hub"),
    ("corpora.em.source", {**FILES, "columns": COLUMNS}, "'a.jsonl' is not among `inputs`"),
    (
        "corpora.em.source",
        {**FILES, "columns": COLUMNS | {"text": None}},
        "corpora.em.source.columns: text must name a column unless pieces does",
    ),
    ("corpora.em.source", {**FILES, "columns": None}, "corpora.em.source.columns must be"),
    ("corpus.turns", 1, "turns must be from 2 to 8, found 1"),
    ("questions.count", -1, "questions.count must be 0 or more, found -1"),
    ("split.ngram_size", 0, "split.ngram_size must be 1 or more, found 0"),
    ("benchmarks", {"mmlu": "x"}, "a key of benchmarks must be gsm8k | math | mmlu_stem"),
    ("benchmarks", {"gsm8k": None}, "benchmarks.gsm8k must be of type str, found None"),
    ("report.documents", -1, "report.documents must be 0 or more, found -1"),
    ("teachers.warmstart", OPENAI | {"top_p": 2}, "teachers.warmstart.top_p must be in (0, 1]"),
    ("teachers.warmstart", OPENAI | {"temperature": -1}, "temperature must be 0 or more"),
    ("teachers.warmstart", OPENAI | {"max_cost_usd": -1}, "max_cost_usd must be 0 or more"),
    ("teachers.warmstart", OPENAI | {"model": ""}, "teachers.warmstart.model must not be empty"),
    (
        "teachers.warmstart",
        OPENAI | {"checks": OPENAI["checks"] | {"max_copied_fraction": 1}},
        "checks.max_copied_fraction must be",
    ),
    ("teachers.warmstart", OPENAI | {"max_failed_fraction": 2}, "must be in [0, 1], found 2"),
    ("teachers.warmstart.corpus", "x", "teachers.warmstart.corpus must name an entry of corpora"),
    ("evaluate.cues", ["\ud800"], "evaluate.cues[0] has half of a surrogate pair"),
]


@pytest.mark.parametrize(("key", "value", "message"), ROWS, ids=range(len(ROWS)))
def test_a_wrong_value_is_one_line(key: str, value: Any, message: str) -> None:
    """The key, the value and what is allowed; a few lines at most where others depend on it."""
    findings = [str(finding) for finding in params_findings(changed((key, value)))]
    assert any(message in line for line in findings), findings


def test_all_findings_are_told_at_once_and_each_once(tmp_path: Path) -> None:
    """Also of several stages; a wrong value of a section is not told for each entry that has it."""
    wrong = [("seed", -1), ("train.learning_rate", 0), ("sed", 1), ("models.em2.parent", "em9")]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed(*wrong)))
    with pytest.raises(UserError) as caught:
        check_params(path)
    lines = str(caught.value).replace("error: ", "").splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    starts = ("unknown key sed", "seed must", "train.learning_rate must", "models.em2.parent must")
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(f"{path}: {start}") for line in lines) == 1


def test_sources_that_share_documents_are_refused() -> None:
    """The same file, shuffled in another way, gives the training corpus the held-out documents."""
    files = {**FILES, "columns": COLUMNS}
    twice = [("corpora.heldout.source", files), ("inputs", {"a": "a.jsonl"})]
    shuffled = ("corpora.em.source", files | {"shuffle_buffer": 9})
    message = "corpora.heldout.source reads the data of corpora.em.source in another way"
    assert any(message in str(f) for f in params_findings(changed(*twice, shuffled)))
    assert list(params_findings(changed(*twice, ("corpora.em.source", files)))) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nseed: 2\n", "not YAML: the key 'seed' twice in"),
        (b"models:\n  a: {x: 1}\n  a: {x: 2}\n", "the key 'a' twice"),
        ("corpus: é\n".encode("latin-1"), "not UTF-8 (byte 8 is 0xe9); save it with the encoding"),
        (b"a: [\n", "not YAML: while parsing"),
        (b"a: b: c\n", "not YAML: mapping values are not allowed here"),
        (b"a: \t- b\n", "not YAML: while scanning for the next token found character"),
        (b"? [1]\n: 2\n", "found unhashable key"),
        (b"!!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor"),
        (b"seed: " + b"[" * 1200, "not YAML: maximum recursion depth exceeded"),
        (b"", "expected a mapping of sections, found NoneType"),
        (b"- a\n", "expected a mapping of sections, found list"),
        (b"\x00", "not YAML: unacceptable character"),
        (b"seed: 2026-02-30\n", "not YAML: day is out of range for month"),
    ],
    ids=range(13),
)
def test_a_file_that_is_no_params_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    """The file is named, and nothing in it is executed."""
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_params(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()

"""A params.yaml for one's own text: presets/own.yaml with what was measured and chosen."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dvc.utils.serialize import modify_yaml, parse_yaml_for_update
from tokenizers import Tokenizer

from boltlm.commands.text_profile import TextProfile
from boltlm.corpus.text_files import TextsSource
from boltlm.errors import UserError
from boltlm.teachers.model_config import VLLMTeacherConfig

# Tokens of each corpus at which the loop takes some minutes on two CPU cores.
LAPTOP_TOKENS = {"base": 400_000, "warmstart": 30_000, "em": 40_000, "heldout": 12_000}
# Documents of each corpus at which more are no help.
MOST_DOCUMENTS = {"warmstart": 5_000, "heldout": 500}
SHARES = {"base": 0.4, "warmstart": 0.2, "em": 0.27, "heldout": 0.13}
CHARACTERS_PER_TOKEN = 4.0  # of a tokenizer that is not here
CHUNK_TOKENS = 70  # at which a chunk of a small model aims


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """What the user chose. `model`: a path or hub name, None: a small one pretrained on the text;
    `teacher_model`: of the kinds `server` and `local`; `on_laptop`: there is no GPU."""

    model: str | None
    teacher: str
    teacher_model: str | None
    server: str
    on_laptop: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """Of the base model: its context, characters for each token of this text (and whether they were
    measured), and its size where it is known."""

    context_length: int
    characters_per_token: float
    is_measured: bool
    size: Mapping[str, int] | None


def base_facts(model: str | None, preset: Mapping[str, Any], profile: TextProfile) -> BaseFacts:
    """Read config.json and tokenizer.json of a local model; train a tokenizer where the base model
    is to be pretrained. Raises UserError where a local model is not complete."""
    if model is None:
        from boltlm.training.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(iter(profile.sample), preset["base"]["vocab_size"])
        ratio = _characters_per_token(tokenizer.backend_tokenizer, profile)
        length = preset["base"]["context_length"]
        return BaseFacts(
            context_length=length, characters_per_token=ratio, is_measured=True, size=None
        )
    if not Path(model).exists():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", model) or model.startswith("."):
            raise UserError(f"--model {model}: no such folder, and no hub name such as owner/name")
        return BaseFacts(
            context_length=2048,
            characters_per_token=CHARACTERS_PER_TOKEN,
            is_measured=False,
            size=None,
        )
    for name in ("config.json", "tokenizer.json"):
        if not (Path(model) / name).is_file():
            raise UserError(
                f"--model {model}: no {name} in it; give a model in Hugging Face format"
            )
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    return BaseFacts(
        context_length=config.get("max_position_embeddings", 2048),
        characters_per_token=_characters_per_token(tokenizer, profile),
        is_measured=True,
        size=_llama_size(config),
    )


def _characters_per_token(tokenizer: Tokenizer, profile: TextProfile) -> float:
    tokens = sum(
        len(tokenizer.encode(text, add_special_tokens=False).ids) for text in profile.sample
    )
    return sum(map(len, profile.sample)) / max(tokens, 1)


def _llama_size(config: Mapping[str, Any]) -> dict[str, int] | None:
    """The size of a model of Llama's form, None for others."""
    try:
        hidden, layers, heads = (
            config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        shared = config.get("num_key_value_heads", heads) / heads
        layer = (2 + 2 * shared) * hidden**2 + 3 * hidden * config["intermediate_size"]
        embedding = config["vocab_size"] * hidden
    except KeyError:
        return None
    untied = 0 if config.get("tie_word_embeddings") else embedding
    return {
        "parameters": round(layers * (layer + 2 * hidden) + hidden + embedding + untied),
        "embedding_parameters": untied,
        "num_layers": layers,
        "hidden_size": hidden,
    }


def corpus_sizes(profile: TextProfile, tokens: float, choices: Choices) -> dict[str, int]:
    """Documents of each corpus: shares of those that there are, and no more than a laptop can take
    in some minutes. `tokens`: of a document. A checkpoint needs no corpus `base`."""
    shares = dict(SHARES)
    if choices.model is not None:
        del shares["base"]
    sizes = {"base": 1}
    for name, share in shares.items():
        size = int(profile.documents * share / sum(shares.values()))
        size = min(size, MOST_DOCUMENTS.get(name, size))
        if choices.on_laptop:
            size = min(size, max(4, round(LAPTOP_TOKENS[name] / tokens)))
        sizes[name] = max(2, size)
    return sizes


def write_params(
    path: Path, preset: Path, profile: TextProfile, choices: Choices, facts: BaseFacts
) -> None:
    """Write params.yaml for the text: the preset with its comments, changed where it must be."""
    shutil.copyfile(preset, path)
    with modify_yaml(str(path)) as params:
        sizes = _set_text(params, profile, choices, facts)
        if choices.model is not None:
            _set_checkpoint(params, choices.model, facts)
        _set_teacher(params, preset.with_name("openai.yaml"), choices)
    text = path.read_text(encoding="utf-8")
    header = "".join(
        f"# {line}".rstrip() + "\n" for line in _header(profile, choices, facts, sizes)
    )
    path.write_text(header + text[text.index("\ndata_seed:") :], encoding="utf-8")


def _set_text(
    params: Any, profile: TextProfile, choices: Choices, facts: BaseFacts
) -> dict[str, int]:
    """The sections that follow from the text; returns the sizes of the corpora."""
    tokens = profile.characters / facts.characters_per_token
    sentence = profile.sentence_characters / facts.characters_per_token
    buffer = profile.documents if profile.is_counted else None
    source = dataclasses.asdict(replace(profile.source, shuffle_buffer=buffer))
    params["inputs"] = {"text": profile.folder}
    params["corpus"].clear()
    params["corpus"].update(source)
    sizes = corpus_sizes(profile, tokens, choices)
    for name, size in sizes.items():
        params["corpora"][name]["documents"] = size
        params["plan"]["document_tokens"][name] = max(1, round(tokens))
    mean = max(1, round(CHUNK_TOKENS / sentence)) if choices.model is None else 8
    params["chunks"].update(mean_sentences=mean, max_sentences=2 * mean)
    chunk = max(1, min(round(mean * sentence), round(tokens)))
    params["plan"]["chunk_tokens"] = chunk
    if choices.teacher != "none":  # latents are longer than their chunks
        params["plan"]["latent_tokens"] = round(2.3 * chunk)
        params["max_latent_tokens"] = min(facts.context_length // 2, 5 * chunk)
    params["split"]["shard_documents"] = max(5, min(200, sizes["em"] // 4))
    return sizes


def _set_checkpoint(params: Any, model: str, facts: BaseFacts) -> None:
    """The sections that follow from a base model that exists already."""
    params["base"].clear()
    params["base"].update(kind="checkpoint", model=model)
    if Path(model).exists():
        params["inputs"]["base"] = model
    params["context_chunks"] = 3
    length = min(1024, facts.context_length)
    params["sequences"]["sequence_length"] = length
    params["train"].update(optimizer="adamw", learning_rate=1.0e-4, batch_size=32)
    params["model_defaults"]["budget"]["amount"] = 2
    if facts.size is not None:
        params["plan"]["checkpoint"] = dict(facts.size)


def _set_teacher(params: Any, openai_preset: Path, choices: Choices) -> None:
    """The teacher of the warm start: that of presets/openai.yaml, changed for the kind."""
    if choices.teacher == "none":
        return
    text = openai_preset.read_text(encoding="utf-8")
    teacher = parse_yaml_for_update(text, str(openai_preset))["teachers"]["warmstart"]
    teacher["max_output_tokens"] = params["max_latent_tokens"]
    if choices.teacher == "server":
        teacher.update(model=choices.teacher_model, base_url=choices.server, max_cost_usd=0.0)
        teacher["prices"].update(input_usd=0.0, output_usd=0.0)
    if choices.teacher == "local":
        fields = {field.name for field in dataclasses.fields(VLLMTeacherConfig)}
        for key in [key for key in teacher if key not in fields]:
            del teacher[key]
        teacher.update(kind="vllm", model=choices.teacher_model, context_length=4096)
        teacher.update(gpu_memory_utilization=0.8, request_batch_size=256)
        if Path(str(choices.teacher_model)).exists():
            params["inputs"]["teacher"] = choices.teacher_model
    params["teachers"]["warmstart"] = teacher


def _header(
    profile: TextProfile, choices: Choices, facts: BaseFacts, sizes: Mapping[str, int]
) -> list[str]:
    """What was measured and chosen, for the first lines of the file."""
    unit = "documents"
    if isinstance(profile.source, TextsSource):
        unit = f"documents (one a {profile.source.unit})"
    count = f"{profile.documents:,} {unit}" if profile.is_counted else f"many {unit}"
    how = "measured" if facts.is_measured else "assumed: the tokenizer is not here"
    model = choices.model or "a small one that is pretrained on part of the text"
    teachers = {
        "none": "none: a plan extracted from the text by rules, no thought of a person or a model",
        "openai": "OpenAI's gpt-4o-mini; needs OPENAI_API_KEY",
        "server": f"{choices.teacher_model} at {choices.server}",
        "local": f"{choices.teacher_model}, run by vLLM in the stage",
    }
    size = "limited so that the loop takes minutes on two CPU cores" if choices.on_laptop else "all"
    document, sentence = profile.characters, profile.sentence_characters
    lengths = f"{document:,.0f} characters in a document, {sentence:.0f} in a sentence"
    parts = ", ".join(f"{name} {number:,}" for name, number in sizes.items())
    return [
        f"Written by: boltlm init --text {profile.source.path}",
        "",
        f"text: {count} in {profile.files:,} files; {lengths}",
        f"tokens: {facts.characters_per_token:.2f} characters each ({how})",
        f"corpora: {parts}; {size}",
        f"base model: {model}",
        f"teacher of the warm start: {teachers[choices.teacher]}",
        "Everything else is as in presets/own.yaml; docs/own-text.md says what to change.",
    ]

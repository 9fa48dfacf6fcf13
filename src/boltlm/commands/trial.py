"""The sub-commands `try` and `chat`: a few documents before an experiment, a model after it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from boltlm.commands.parser import Commands, add_command, count
from boltlm.errors import UserError
from boltlm.params import load, load_settings

if TYPE_CHECKING:
    from boltlm.evaluation.chat import ChatModel

TRY_EXAMPLE = """\
examples:
  boltlm try                        # the first E-step of params.yaml, with its model or the base
  boltlm try em1 --documents 5
  boltlm try --send 20              # also ask a paid teacher, 20 requests

Shows, for a few documents, the teacher's latents with what they cost, how well the model knows the
text, and an E-step: chunks, their K latents with weights (→: the selected one). It is an error if
most latents were cut at max_latent_tokens, unless --go-on is given. Needs `dvc repro split`."""

CHAT_EXAMPLE = """\
examples:
  boltlm chat models/em2                                 # lines from the keyboard, Ctrl-D ends
  boltlm chat models/em2 --prompt 'A function is called'

Continues a prompt without a thought and with one: BOS prompt SoL Prior thought EoL continuation."""


def add_trial_commands(commands: Commands) -> None:
    """Declare `try` and `chat`."""
    summary = "try the teacher and an E-step on a few documents before everything is started"
    parser = add_command(commands, "try", summary, TRY_EXAMPLE, _try)
    parser.add_argument("name", nargs="?", help="an entry of `latents`; default: the first")
    parser.add_argument("--documents", type=count, default=3, metavar="N")
    parser.add_argument("--show", type=count, default=4, metavar="N", help="chunks to print")
    parser.add_argument("--send", type=count, default=0, metavar="M", help="requests to a teacher")
    parser.add_argument("--model", type=Path, help="default: that of the entry, or models/base")
    parser.add_argument("--go-on", action="store_true", help="no error where most latents are cut")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    summary = "continue a prompt with and without a thought"
    parser = add_command(commands, "chat", summary, CHAT_EXAMPLE, _chat)
    parser.add_argument("model", type=Path, help="models/<name>")
    parser.add_argument("--prompt", help="one prompt; default: lines from the keyboard")
    parser.add_argument("--thought", type=count, default=64, metavar="N", help="most tokens of it")
    parser.add_argument("--answer", type=count, default=64, metavar="N", help="most tokens of it")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--seed", type=count, default=1)


def _try(args: argparse.Namespace) -> None:
    from boltlm.estep.config import EStepSettings
    from boltlm.estep.diagnostics import UNUSABLE_FRACTION
    from boltlm.reporting.trial import first_chunks, try_estep
    from boltlm.training.config import TrainSettings

    entries = load(args.params).get("latents") or {}
    name = args.name or next(iter(entries), None)
    if name is None or name not in entries:
        raise UserError(f"latents has no entry {name!r}; it has {', '.join(entries) or 'none'}")
    settings = load_settings(EStepSettings, args.params, name=name)
    entry = settings.entry
    own = args.models / entry.model
    model = args.model or (own if own.is_dir() else args.models / "base")
    chunks = first_chunks(args.data / "chunks" / entry.corpus, args.documents)
    trained = load_settings(TrainSettings, args.params, name=entry.model).model
    folder, _, teacher = trained.data.partition("/")
    if folder == "teacher":
        _show_teacher(args, teacher)
    is_base = model.name == "base"
    trial = try_estep(
        settings, model=model, chunks=chunks, shown=args.show, has_latents=not is_base
    )
    print(trial.text)
    if trial.forced_fraction <= UNUSABLE_FRACTION:
        return
    if is_base:
        print(
            f"\n{model} has not been trained with latents yet, so its draws mean nothing; make the"
            f" warm start, then try again: dvc repro train@{entry.model} && boltlm try"
        )
    elif not args.go_on:
        raise UserError(
            f"{trial.forced_fraction:.0%} of the latents were cut at max_latent_tokens"
            f" ({settings.max_latent_tokens}) because the model did not end them: train the warm"
            f" start longer (models.{entry.model}.budget, more documents), raise max_latent_tokens"
            " above the lengths of the teacher's latents, or take a larger base model; --go-on"
            " accepts it"
        )


def _show_teacher(args: argparse.Namespace, name: str) -> None:
    """The latents of a teacher for the first chunks, or a preview of a teacher that is asked."""
    from boltlm.reporting.trial import first_chunks
    from boltlm.teachers.config import ExtractTeacherConfig, TeacherSettings
    from boltlm.teachers.model_config import TeacherConfig
    from boltlm.tokens import TextCoder

    settings = load_settings(TeacherSettings, args.params, name=name)
    teacher = settings.teacher
    if isinstance(teacher, TeacherConfig):
        from boltlm.commands.teachers import preview_texts

        folders = {"base": args.models / "base", "split": args.data / "split"}
        cache = Path("response_cache/responses.sqlite")
        preview = argparse.Namespace(
            name=name,
            params=args.params,
            requests=1,
            send=args.send,
            cache=cache,
            **folders,
            chunks=args.data / "chunks",
        )
        for text in preview_texts(preview):
            print(text, flush=True)
        return
    if not isinstance(teacher, ExtractTeacherConfig):
        print(f"teachers.{name} ({teacher.kind}): latents of the data itself, no requests\n")
        return
    from boltlm.records import Document, read_shard, shard_paths
    from boltlm.teachers.extracted import PhraseExtractor

    chunks = first_chunks(args.data / "chunks" / teacher.corpus, 1)
    document = read_shard(shard_paths(args.data / "split" / teacher.corpus)[0], Document)[0]
    extractor = PhraseExtractor(
        teacher.phrases, TextCoder(args.models / "base"), settings.max_latent_tokens
    )
    latents, _ = extractor.latents(document, chunks)
    print(f"teachers.{name} (extract: by rules from the text, no thought of a model), no cost")
    for chunk, latent in list(zip(chunks, latents, strict=True))[: args.show]:
        print(f"   {' '.join(chunk.text.split())[:90]}\n   → {latent}")
    print()


def _chat(args: argparse.Namespace) -> None:
    from boltlm.evaluation.chat import ChatModel, ChatOptions

    options = ChatOptions(
        max_thought_tokens=args.thought,
        max_answer_tokens=args.answer,
        temperature=args.temperature,
        seed=args.seed,
    )
    for name, value in (("--thought", args.thought), ("--answer", args.answer)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, found {value}")
    model = ChatModel(args.model, options)
    if args.prompt is not None:
        _answer(model, args.prompt)
        return
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        try:
            _answer(model, prompt)
        except UserError as error:
            print(f"error: {error}")


def _answer(model: "ChatModel", prompt: str) -> None:
    found = model.continuations(prompt)
    end = "" if found.thought_ends else " …(cut at the limit)"
    print(f"without a thought: {found.plain.strip()}")
    print(f"thought:           {found.thought.strip()}{end}")
    print(f"after the thought: {found.after_thought.strip()}\n")

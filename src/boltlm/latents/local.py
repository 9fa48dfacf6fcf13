"""An open-weights teacher in this process, with vLLM: no server, no key."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from boltlm import engine
from boltlm.errors import UserError
from boltlm.latents.asking import Ask, Asked, Book
from boltlm.latents.journal import Answer
from boltlm.latents.tasks import Prompt

CPU_CACHE_GIB = "4"  # of vLLM's key–value cache where there is no GPU and nothing else is set


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTeacher(Asked):
    """Params entry of `kind: vllm`. `model`: hub name or path, with a chat template; `window`:
    tokens of prompt and answer together; `memory_fraction`: of the GPU; `requests_at_once`: given
    to the engine together, and lost together when the process dies."""

    kind: Literal["vllm"]
    window: int
    memory_fraction: float
    requests_at_once: int

    @property
    def settings(self) -> dict[str, str | int | float]:
        """A model by path is known by its files, not by where they lie."""
        folder = Path(self.model)
        model = engine.content(folder) if folder.is_dir() else self.model
        return {**super(LocalTeacher, self).settings, "model": model, "engine": "vllm"}


class Local:
    """Asks over `kind: vllm`. Draws are seeded by the request and the attempt."""

    def __init__(self, config: LocalTeacher) -> None:
        self.config = config
        self.model: Any = None

    def ask(self, asks: Iterator[Ask], book: Book) -> int:
        first = next(asks, None)
        if first is None:
            return 0
        count = 0
        self.model = self.model or self._load()
        asks = itertools.chain([first], asks)
        while batch := list(itertools.islice(asks, self.config.requests_at_once)):
            answers = self._answers(self._fitting(batch, book))
            book.journal.add(answers)
            for answer in answers:
                book.note(answer)
            count += len(batch)
            if book.halted is not None:
                break
        return count

    def _load(self) -> Any:
        """The engine; first the tokenizer, which tells in a moment whether the model will do."""
        import jinja2
        from transformers import AutoTokenizer

        name = self.config.model
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            if not getattr(self.tokenizer, "chat_template", None):
                raise UserError(f"teacher model '{name}' has no chat template")
            self.tokenizer.apply_chat_template(Prompt.read("latent").messages(context="", chunk=""))
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            from vllm import LLM

            return LLM(
                name,
                max_model_len=self.config.window,
                gpu_memory_utilization=self.config.memory_fraction,
                enforce_eager=not _has_gpu(),
                disable_log_stats=True,
            )
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"teacher kind 'vllm' needs vllm: {error}") from error
        except jinja2.TemplateError as error:
            raise UserError(f"teacher model '{name}': its chat template says: {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"teacher model '{name}' does not load: {reason}") from error

    def _fitting(self, batch: list[Ask], book: Book) -> list[Ask]:
        """What leaves the window room for an answer; the rest is rejected."""
        kept: list[Ask] = []
        for ask in batch:
            prompt = self.tokenizer.apply_chat_template(
                list(ask.request.messages), add_generation_prompt=True, tokenize=False
            )
            length = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if length + self.config.max_output_tokens <= self.config.window:
                kept.append(ask)
            else:
                book.reject(
                    ask.request.key,
                    f"a prompt of {length} tokens and {self.config.max_output_tokens} of answer"
                    f" do not fit the window of {self.config.window}",
                )
        return kept

    def _answers(self, asks: list[Ask]) -> list[Answer]:
        if not asks:
            return []
        from vllm import SamplingParams

        config = self.config
        settings = [
            SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_output_tokens,
                seed=int(ask.request.key[:8], 16) + ask.attempt,
            )
            for ask in asks
        ]
        messages = [list(ask.request.messages) for ask in asks]
        outputs = self.model.chat(messages, settings, use_tqdm=False)
        return [
            Answer(
                key=ask.request.key,
                attempt=ask.attempt,
                text=output.outputs[0].text,
                finish=str(output.outputs[0].finish_reason),
                input_tokens=len(output.prompt_token_ids),
                output_tokens=len(output.outputs[0].token_ids),
                cost_usd=0.0,
                model=config.model,
            )
            for ask, output in zip(asks, outputs, strict=True)
        ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

"""An open-weights model as a teacher, run by vLLM in this process: no server and no API key."""

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

from boltlm.errors import UserError
from boltlm.teachers.model_config import VLLMTeacherConfig
from boltlm.teachers.prompts import Message
from boltlm.teachers.requests import PendingRequest, RequestLedger
from boltlm.teachers.response_cache import TeacherResponse

# Size of vLLM's key-value cache on a CPU unless the environment sets it.
TEACHER_CPU_CACHE_GIB = "4"
ZERO_WIDTH_SPACE = "\u200b"
# Messages as a request has them, with which the chat template is tried.
EXAMPLE_MESSAGES = [{"role": role, "content": "Reply briefly."} for role in ("system", "user")]


class VLLMClient:
    """The client for `kind: vllm`. Each response is sampled with a seed made of the request's key
    and the number of the attempt."""

    def __init__(self, config: VLLMTeacherConfig) -> None:
        self.config = config
        # Both are loaded with the first request; neither library has usable type annotations.
        self.tokenizer: Any = None
        self.engine: Any = None

    def run(self, requests: Iterator[PendingRequest], ledger: RequestLedger) -> int:
        """See `TeacherClient.run`. Raises UserError where the model cannot be loaded."""
        first = next(requests, None)
        if first is None:
            return 0
        count = 0
        if self.engine is None:
            self._load()
        requests = itertools.chain([first], requests)
        while batch := list(itertools.islice(requests, self.config.request_batch_size)):
            fitting = self._fitting(batch, ledger)
            responses = self._send(fitting)
            ledger.cache.add(responses)
            for pending, response in zip(fitting, responses, strict=True):
                ledger.record(response, pending.request.source)
            count += len(batch)
            if ledger.stop_error is not None:
                break
        return count

    def _load(self) -> None:
        """Load the tokenizer, which takes a moment and shows whether the model is suitable, then
        start the engine."""
        import jinja2
        from transformers import AutoTokenizer

        name = self.config.model
        path, revision = self.config.repository
        arguments = {"revision": revision} if revision else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, **arguments)
            if not getattr(self.tokenizer, "chat_template", None):
                raise UserError(
                    f"teacher model '{name}' has no chat template; use an instruction-tuned model"
                )
            self.tokenizer.apply_chat_template(EXAMPLE_MESSAGES)
            self.engine = self._start_engine()
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"a teacher of kind 'vllm' needs the package vllm: {error}") from error
        except jinja2.TemplateError as error:
            raise UserError(
                f"teacher model '{name}': its chat template does not accept the prompt: {error}"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"teacher model '{name}' cannot be loaded: {reason}") from error

    def _start_engine(self) -> Any:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", TEACHER_CPU_CACHE_GIB)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        path, revision = self.config.repository
        return LLM(
            path,
            revision=revision,
            tokenizer_revision=revision,
            max_model_len=self.config.context_length,
            gpu_memory_utilization=self.config.gpu_memory_utilization,
            enforce_eager=not _has_gpu(),
            disable_log_stats=True,
        )

    def _fitting(self, batch: list[PendingRequest], ledger: RequestLedger) -> list[PendingRequest]:
        """The requests that leave enough of the context for a response; others are rejected."""
        max_output_tokens = self.config.max_output_tokens
        context_length = self.config.context_length
        fitting: list[PendingRequest] = []
        for pending in batch:
            prompt = self.tokenizer.apply_chat_template(
                self._messages(pending), add_generation_prompt=True, tokenize=False
            )
            length = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
            if length + max_output_tokens <= context_length:
                fitting.append(pending)
            else:
                ledger.reject(
                    pending.request.key,
                    f"a prompt of {length} tokens and a response of up to {max_output_tokens} do"
                    f" not fit into context_length {context_length}",
                )
        return fitting

    def _messages(self, pending: PendingRequest) -> list[Message]:
        """The messages of a request. vLLM reads a special token in their text as that token, which
        could end a message; so an invisible character follows its first one."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        if not (strings := [token.content for token in tokens if len(token.content) > 1]):
            return list(pending.request.messages)
        special = re.compile("|".join(map(re.escape, strings)))
        return [
            {
                "role": message["role"],
                "content": special.sub(
                    lambda match: f"{match[0][0]}{ZERO_WIDTH_SPACE}{match[0][1:]}",
                    message["content"],
                ),
            }
            for message in pending.request.messages
        ]

    def _send(self, requests: list[PendingRequest]) -> list[TeacherResponse]:
        """The responses to a batch of requests, in its order."""
        if not requests:
            return []
        from vllm import SamplingParams

        config = self.config
        assert config.temperature is not None, "VLLMTeacherConfig checks it"
        sampling_params = [
            SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_output_tokens,
                seed=int(pending.request.key[:8], 16) + pending.attempt,
            )
            for pending in requests
        ]
        messages = [self._messages(pending) for pending in requests]
        outputs = self.engine.chat(messages, sampling_params, use_tqdm=False)
        return [
            TeacherResponse(
                key=pending.request.key,
                attempt=pending.attempt,
                text=output.outputs[0].text,
                finish=str(output.outputs[0].finish_reason),
                input_tokens=len(output.prompt_token_ids),
                output_tokens=len(output.outputs[0].token_ids),
                cost_usd=0.0,
                model=config.model,
            )
            for pending, output in zip(requests, outputs, strict=True)
        ]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()

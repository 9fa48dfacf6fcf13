"""What several rooms' tests need: a model that can be enumerated, and a base model folder."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from boltlm.corpus import generated
from boltlm.model import base, checkpoint
from boltlm.tokens import TextCoder
from tests import tiny


def pytest_configure() -> None:
    """One thread, no GPU, and the same hypothesis examples in every run."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    settings.register_profile("house", deadline=None, derandomize=True, max_examples=120)
    settings.load_profile("house")


@pytest.fixture(scope="session")
def enumerable(tmp_path_factory: pytest.TempPathFactory) -> tiny.Tiny:
    return tiny.enumerable(tmp_path_factory.mktemp("enumerable"))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as the stage `base` leaves it, untrained: width 16, window 128."""
    folder = tmp_path_factory.mktemp("base")
    found = itertools.islice(generated.documents(tiny.pages(pages="primer"), seed=1), 50)
    tokenizer = base.train_tokenizer((document.text for document in found), 300)
    config = base.Pretrain(
        kind="pretrain",
        vocabulary=300,
        width=16,
        layers=2,
        heads=2,
        feed_forward=32,
        window=128,
        epochs=1,
        length=32,
        train=tiny.train_config(),
    )
    model = base.create(config, tokenizer, seed=1)
    base.add_markers(model, tokenizer, seed=1)
    tokenizer.save_pretrained(folder)
    checkpoint.save(model, folder, folder, {})
    return folder


@pytest.fixture(scope="session")
def base_coder(base_folder: Path) -> TextCoder:
    return TextCoder(base_folder)

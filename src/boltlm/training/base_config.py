"""Settings of the stage `base`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from boltlm.corpus.corpora import CorpusEntry
from boltlm.corpus.inputs import require_input
from boltlm.corpus.sources import local_path
from boltlm.param_types import CommandText, Name, NonNegativeInt
from boltlm.params import from_key
from boltlm.training.config import CheckpointConfig, PretrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSettings:
    """Everything that the stage `base` reads from params.yaml."""

    data_seed: NonNegativeInt
    inputs: Mapping[Name, CommandText]
    corpus: CorpusEntry = from_key("corpora.base")
    base: PretrainConfig | CheckpointConfig

    def __post_init__(self) -> None:
        if isinstance(self.base, CheckpointConfig):
            path = self.base.model if Path(self.base.model).exists() else None
            key = "base.model"
        else:
            key, path = "corpora.base.source.path", local_path(self.corpus.source)
        if path is not None:
            require_input(key, path, self.inputs)

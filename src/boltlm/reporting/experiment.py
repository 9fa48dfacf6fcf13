"""What the figures of one experiment are drawn from, and the paper's values where they apply."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from boltlm.corpus.corpora import CorpusEntry
from boltlm.corpus.sources import HubSource
from boltlm.reporting.arms import Arm, ReportSettings, em_chain, is_continual
from boltlm.reporting.quantities import Quantity, accuracies, shown_arms
from boltlm.reporting.results import Results
from boltlm.training.config import CheckpointConfig, PretrainConfig

PAPER_BASE, PAPER_CORPUS = "TinyLlama/TinyLlama_v1.1", "HuggingFaceTB/finemath"
PAPER_TABLE_1 = {  # MATH, GSM8K, MMLU-STEM (docs/method.md, section 8)
    "raw_repeat": (0.0574, 0.0576, 0.2731),
    "raw_fresh": (0.1118, 0.1327, 0.3063),
    "wrap_orig": (0.1106, 0.1243, 0.3140),
    "wrap_cot": (0.1936, 0.2108, 0.3451),
    "latent": (0.2538, 0.3359, 0.3587),
    "unpaired": (0.2238, 0.2017, 0.3333),
}
# Nats per document at iterations 1 and 4, in Fig. B.6.
PAPER_PARTS: Mapping[tuple[str, str], float] = {
    ("em1", "utility_per_document"): -1290,
    ("em4", "utility_per_document"): -1320,
    ("em1", "simplicity_per_document"): -3090,
    ("em4", "simplicity_per_document"): -2920,
    ("em1", "diversity_per_document"): 2790,
    ("em4", "diversity_per_document"): 2730,
    ("em1", "elbo_k1_per_document"): -1590,
    ("em4", "elbo_k1_per_document"): -1510,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureSettings(ReportSettings):
    """Settings of the stage `figures`; by `base` and `corpora` the paper's values apply or not."""

    base: PretrainConfig | CheckpointConfig
    corpora: Mapping[str, CorpusEntry]


class Experiment:
    """What the figures are drawn from."""

    def __init__(self, settings: FigureSettings, results: Results) -> None:
        self.settings, self.results = settings, results
        self.arms = shown_arms(results)
        self.chain = em_chain(results.arms)
        self.is_continual = is_continual(results.arms)

    @cached_property
    def is_papers(self) -> bool:
        """Whether base model and training corpora are those of the paper."""
        used = {entry.corpus for entry in self.settings.models.values()}
        sources = [self.settings.corpora[name].source for name in used]
        base = self.settings.base
        return (
            isinstance(base, CheckpointConfig)
            and base.model == PAPER_BASE
            and all(isinstance(s, HubSource) and s.name == PAPER_CORPUS for s in sources)
        )

    @cached_property
    def accuracies(self) -> list[Quantity]:
        return accuracies(self.results, "standard")

    @cached_property
    def mix_families(self) -> dict[str, list[Arm]]:
        """Models that differ by their share of raw text alone, by the first of them."""
        families: dict[str, list[Arm]] = {}
        models = self.settings.models
        keys = {a.name: replace(models[a.name], mix_raw=0, seed=None) for a in self.arms[:-1]}
        for arm in self.arms[:-1]:
            first = next(name for name in keys if keys[name] == keys[arm.name])
            families.setdefault(first, []).append(arm)
        return {name: arms for name, arms in families.items() if len(arms) > 1}

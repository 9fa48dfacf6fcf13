"""Settings of the stage `report` (docs/reporting.md)."""

from dataclasses import dataclass

from boltlm.estep.config import SamplingConfig
from boltlm.evaluation.config import EvaluateConfig
from boltlm.param_types import NonNegativeInt, PositiveInt
from boltlm.reporting.arms import ReportSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowserConfig:
    """Params section `report`. `documents`: how many documents of each corpus the latent browser
    shows, a sample that `seed` chooses. `token_gains`: whether the gain of each token is computed,
    which needs the models. `max_megabytes`: documents beyond this size are left out."""

    documents: NonNegativeInt
    token_gains: bool
    max_megabytes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class HtmlReportSettings(ReportSettings):
    """Settings of the stage `report` and of `boltlm browse`."""

    seed: NonNegativeInt
    context_chunks: NonNegativeInt
    max_latent_tokens: PositiveInt
    sampling: SamplingConfig
    evaluate: EvaluateConfig
    report: BrowserConfig

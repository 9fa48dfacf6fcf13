"""The table of all figures: what each shows, which of the paper's it follows, how it is drawn.

What a figure of the paper shows in detail is not known here for all of them; each caption says what
is drawn (docs/reporting.md).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from boltlm.reporting.comparisons import (
    Drawn,
    draw_bounds,
    draw_finetuned,
    draw_k_samples,
    draw_mixes,
    draw_prompts,
    draw_table_1,
)
from boltlm.reporting.curves import draw_curves, plot_log_weight, plot_training, plot_validation
from boltlm.reporting.experiment import PAPER_PARTS, Experiment
from boltlm.reporting.iterations import draw_by_iteration
from boltlm.reporting.plotting import SkippedPlot
from boltlm.reporting.quantities import (
    Quantity,
    accuracies,
    general_corpora,
    likelihood,
    of_metric,
    raw_likelihood,
)
from boltlm.reporting.seed_figures import draw_seeds

PARTS = ("utility", "simplicity", "diversity")
DIAGNOSTICS = ("numbers_match", "numbers_match_selected", "latent_tokens_mean", "ess_mean")
DIAGNOSTICS += ("distinct_latents_mean", "masked_mass", "forced_fraction")


ERRORS = (
    "Error bars and bands are ± one standard error: over trainings with other seeds where there are"
    " several, else over clusters of documents or questions."
)


@dataclass(frozen=True, slots=True)
class FigureSpec:
    """`stem`: of its files; `title`: what it shows, for the caption. `errors`: what the caption
    says of them."""

    stem: str
    title: str
    draw: Callable[[Experiment], Drawn]
    errors: str = ERRORS


def _curves(
    e: Experiment, quantities: Iterable[Quantity], *, x: str = "tokens", shows: str
) -> Drawn:
    return draw_curves(e.results, list(quantities), x=x, shows=shows.split())


def _methods(e: Experiment, x: str = "tokens") -> Drawn:
    if e.chain:
        return SkippedPlot("for experiments without an EM chain")
    arms = [arm for arm in e.arms if not arm.mix_raw]
    return draw_curves(e.results, e.accuracies, x=x, arms=arms)


def _by_kind(e: Experiment, continual: bool, x: str = "tokens") -> Drawn:
    if not e.chain or e.is_continual != continual:
        kind = "whose iterations go on from each other" if continual else "that restarts each time"
        return SkippedPlot(f"for an EM chain {kind}")
    return draw_curves(e.results, [likelihood(), *e.accuracies], x=x)


def _final_or_curves(e: Experiment, quantities: Sequence[Quantity], shows: str) -> Drawn:
    """Curves where snapshots were evaluated, else final models by iteration."""
    if any(e.results.snapshot_curves.values()):
        return _curves(e, quantities, shows=shows)
    return draw_by_iteration(e.results, quantities)


def _general(e: Experiment) -> Drawn:
    corpora = general_corpora(e.results)
    if not corpora:
        return SkippedPlot("no further held-out corpus (evaluate.extra_corpora)")
    panels = [q for name in corpora for q in (raw_likelihood(name), likelihood(name))]
    return _final_or_curves(e, panels, "exact best")


def _elbo(e: Experiment) -> Drawn:
    ceilings = [
        m["ceiling_per_token"] for m in e.results.evaluation.values() if "ceiling_per_token" in m
    ]
    levels = {"ceiling: log p of the generator": ceilings[0]} if ceilings else {}
    return draw_by_iteration(e.results, [likelihood()], levels=levels)


def _parts(e: Experiment) -> Drawn:
    names = [*PARTS, "elbo_per_token_k1", *(f"{part}_per_document" for part in PARTS)]
    quantities = [of_metric(name) for name in (*names, "elbo_k1_per_document")]
    known = PAPER_PARTS if e.is_papers and not e.is_continual else None
    return draw_by_iteration(e.results, quantities, columns=4, references=known, controls=False)


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "seeds",
        "Several seeds: likelihood, right latents and accuracy by iteration.",
        lambda e: draw_seeds(e.results, [likelihood(), of_metric("numbers_match"), *e.accuracies]),
        "Error bars and bands are 95 % intervals of the mean (t distribution over seeds).",
    ),
    FigureSpec("elbo", "Held-out likelihood by iteration.", _elbo),
    FigureSpec(
        "accuracy",
        "Accuracy by iteration, with the other models as lines (the paper's Fig. 1, right).",
        lambda e: draw_by_iteration(e.results, e.accuracies),
    ),
    FigureSpec("methods", "Methods: accuracy by training tokens (Fig. 6).", _methods),
    FigureSpec(
        "iterations",
        "Iterations on fixed data: likelihood and accuracy by training tokens (Fig. 8).",
        lambda e: _by_kind(e, continual=False),
    ),
    FigureSpec(
        "finetuned",
        "Accuracy after fine-tuning (Fig. 9).",
        draw_finetuned,
        "Error bars are ± the larger of two standard errors, over trainings and over clusters of"
        " questions.",
    ),
    FigureSpec(
        "k_samples",
        "M_1 by the number of latents that the E-step draws (Fig. 10).",
        draw_k_samples,
        f"{ERRORS} Collected experiments: over seeds, none for a single one.",
    ),
    FigureSpec(
        "continual",
        "Continual training: likelihood and accuracy by all training tokens so far, with frozen"
        " generators (Fig. 11).",
        lambda e: _by_kind(e, continual=True),
    ),
    FigureSpec(
        "table_1", "Accuracy of the methods (Table 1); bars: the paper's values.", draw_table_1
    ),
    FigureSpec(
        "mix_raw", "Accuracy by the share of raw documents in the data (Fig. A.1).", draw_mixes
    ),
    FigureSpec("prompts", "Accuracy by the prompt set (Fig. A.2).", draw_prompts),
    FigureSpec(
        "methods_raw_tokens",
        "Methods: accuracy by raw tokens seen (Fig. A.3).",
        lambda e: _methods(e, "raw_tokens"),
    ),
    FigureSpec(
        "nll",
        "NLL of held-out raw text, without latents (Fig. B.1).",
        lambda e: _final_or_curves(
            e, [raw_likelihood(), of_metric("nll_in_context_per_token")], "exact best"
        ),
    ),
    FigureSpec(
        "accuracy_exact",
        "Accuracy of each snapshot, not the best so far (Fig. B.2).",
        lambda e: _curves(e, e.accuracies, shows="exact"),
    ),
    FigureSpec(
        "accuracy_synthetic",
        "Accuracy with the prompt set `synthetic` (Fig. B.3).",
        lambda e: _curves(e, accuracies(e.results, "synthetic"), shows="exact best"),
    ),
    FigureSpec("general", "Likelihood of general-domain text (Fig. B.4).", _general),
    FigureSpec(
        "likelihood",
        "Likelihood by raw tokens seen (Fig. B.5).",
        lambda e: _curves(e, [likelihood()], x="raw_tokens", shows="exact best"),
    ),
    FigureSpec(
        "parts",
        "Utility, simplicity and diversity per chunk and per document (Fig. B.6).",
        _parts,
    ),
    FigureSpec(
        "bounds", "The bound by the number of draws of the evaluation (Fig. B.7).", draw_bounds
    ),
    FigureSpec(
        "continual_raw_tokens",
        "Continual training by raw tokens seen (Fig. B.8).",
        lambda e: _by_kind(e, continual=True, x="raw_tokens"),
    ),
    FigureSpec(
        "diagnostics",
        "Latents that the model of each iteration draws for held-out chunks.",
        lambda e: draw_by_iteration(e.results, [of_metric(m) for m in DIAGNOSTICS], controls=False),
        "No errors are measured for these means over all chunks.",
    ),
    FigureSpec(
        "training",
        "Training loss by training tokens; the first steps may lie above the axis.",
        lambda e: plot_training(e.results),
        "",
    ),
    FigureSpec(
        "heldout",
        "Held-out metrics during training: values as points, the best so far as a line.",
        lambda e: plot_validation(e.results),
        "Validation measures no errors.",
    ),
    FigureSpec(
        "log_weight",
        "log w of the latents that each iteration is trained on.",
        lambda e: plot_log_weight(e.results),
        "The axis leaves out 0.1 % of the draws at either end.",
    ),
)

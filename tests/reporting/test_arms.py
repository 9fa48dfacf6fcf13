"""The role of each model follows from params.yaml, whatever the models are called."""

from collections.abc import Sequence

import pytest

from boltlm.errors import UserError
from boltlm.params import load
from boltlm.reporting.arms import em_chain, experiment_arms, is_continual
from tests.reporting.experiment import chain_params, model, report_params, report_settings
from tests.tiny import ROOT

LAPTOP = ("warmstart", "em1", "em2", "em3", "em4")
RENAMED = ("gpt", "first", "second")


@pytest.mark.parametrize("chain", [LAPTOP, LAPTOP[:3], RENAMED])
def test_the_chain_follows_from_which_model_sampled_which_latents(chain: Sequence[str]) -> None:
    arms = experiment_arms(report_settings(chain_params(chain)))
    assert [arm.name for arm in em_chain(arms)] == list(chain)
    assert [arm.iteration for arm in em_chain(arms)] == list(range(len(chain)))
    others = {arm.name: (arm.role, arm.generator) for arm in arms if arm.name not in chain}
    assert others == {
        "plain": ("raw", None),
        "mix": ("other", chain[0]),
        "taught": ("teacher", None),
        "frozen_em": ("frozen", chain[0]),
        "base": ("base", None),
    }


def test_of_equally_long_chains_the_first_in_params_is_taken() -> None:
    params = chain_params(LAPTOP[:2])
    chain = em_chain(experiment_arms(report_settings(params)))
    assert [arm.name for arm in chain] == ["warmstart", "em1"]
    params["models"] = dict(reversed(params["models"].items()))
    chain = em_chain(experiment_arms(report_settings(params)))
    assert [arm.name for arm in chain] == ["warmstart", "frozen_em"]


def test_without_sampled_latents_there_is_no_chain() -> None:
    params = report_params({"a": model("teacher/some"), "b": model("split/em", "raw")}, {})
    arms = experiment_arms(report_settings(params))
    assert [arm.role for arm in arms] == ["teacher", "raw", "base"]


def test_models_that_sample_for_each_other_are_refused_by_name() -> None:
    models = {"a": model("latents/x"), "b": model("latents/y")}
    params = report_params(models, {"x": "b", "y": "a"})
    with pytest.raises(UserError, match="a ← b ← a"):
        experiment_arms(report_settings(params))


def test_latents_that_do_not_exist_are_refused_by_name() -> None:
    params = report_params({"a": model("latents/x")}, {})
    with pytest.raises(UserError, match="latents/x"):
        report_settings(params)


def test_a_training_with_a_seed_of_its_own_says_so() -> None:
    params = chain_params(LAPTOP[:3])
    params["models"]["again"] = {**params["models"]["em1"], "seed": 7}
    params["models"]["plain_again"] = {**params["models"]["plain"], "seed": 8}
    arms = {arm.name: arm for arm in experiment_arms(report_settings(params))}
    assert arms["em1"].description == "iteration 1"
    assert arms["again"].description == "latents by warmstart, seed 7"
    assert arms["plain_again"].description == "raw text, seed 8"


def test_imported_latents_continue_the_chain() -> None:
    """Where the entry names the model in whose place another one drew them; without a name they are
    a teacher's."""
    params = report_params({name: model(f"teacher/{name}") for name in ("m0", "m1", "m2", "x")}, {})
    imported = load(ROOT / "presets" / "paper-released.yaml")["teachers"]["em1"]
    drawn_by = {"m1": "m0", "m2": "m1", "x": None}
    params["teachers"] = {name: {**imported, "drawn_by": by} for name, by in drawn_by.items()} | {
        "m0": {"kind": "dataset", "corpus": "em"}
    }
    params["models"]["again"] = model("teacher/m1")
    params["models"]["plain"] = model("teacher/m1", "raw")
    arms = {arm.name: arm for arm in experiment_arms(report_settings(params))}
    assert [arm.name for arm in em_chain(list(arms.values()))] == ["m0", "m1", "m2"]
    assert (arms["again"].role, arms["again"].description) == ("frozen", "latents by m0, imported")
    assert (arms["x"].role, arms["plain"].description) == ("teacher", "raw text")


def test_trainings_k_variants_and_continual_chains_are_recognised() -> None:
    """em1 with another K alone is a variant of it; with another budget too it is not."""
    params = chain_params(LAPTOP[:3])
    params["latents"]["wide"] = {**params["latents"]["fixed"], "k_samples": 16}
    params["models"]["k16"] = {**params["models"]["em1"], "data": "latents/wide"}
    longer = {"budget": {"kind": "epochs", "amount": 99}}
    params["models"]["k16_longer"] = {**params["models"]["k16"], **longer}
    params["models"]["em1_again"] = {**params["models"]["em1"], "seed": 7}
    arms = experiment_arms(report_settings(params))
    by_name = {arm.name: arm for arm in arms}
    ks = {name: arm.k_samples for name, arm in by_name.items() if arm.k_samples}
    assert ks == {"em1": 4, "frozen_em": 4, "k16": 16, "em1_again": 4}
    assert [name for name, arm in by_name.items() if arm.training_of == "em1"] == ["em1_again"]
    assert not is_continual(arms)
    for earlier, later in (("warmstart", "em1"), ("em1", "em2")):
        params["models"][later]["parent"] = earlier
    assert is_continual(experiment_arms(report_settings(params)))

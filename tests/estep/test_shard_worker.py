"""The E-step over a corpus: the same samples whatever the shards, interruptions and reruns."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from boltlm.corpus.reference_latents import reference_latents
from boltlm.errors import UserError
from boltlm.estep.contexts import ChunkInContext, chunks_in_context
from boltlm.estep.diagnostics import WeightDiagnostics
from boltlm.estep.estep import EStep
from boltlm.estep.samplers import TransformersSampler
from boltlm.estep.shard_worker import group_by_chunk
from boltlm.records import Chunk, Sample, read_shard, read_table, shard_paths, write_shard
from boltlm.tokens import TextCoder
from tests import reference
from tests.estep.stage_harness import DOCUMENTS, LatentsStage, content, small_params


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> LatentsStage:
    """All documents in one shard."""
    stage = LatentsStage(tmp_path_factory.mktemp("one-shard"), base_folder, 100)
    stage.run()
    return stage


def test_every_chunk_has_k_samples(one_shard: LatentsStage) -> None:
    """K samples of each chunk in reading order, and no others."""
    chunks = list(read_table(one_shard.chunks, Chunk))
    assert len({chunk.doc_id for chunk in chunks}) == DOCUMENTS
    assert [(s.doc_id, s.chunk, s.sample) for s in one_shard.samples()] == [
        (chunk.doc_id, chunk.chunk, k) for chunk in chunks for k in range(3)
    ]


@pytest.mark.parametrize("shard_documents", [1, 3])
def test_samples_do_not_depend_on_the_shards(
    one_shard: LatentsStage, base_folder: Path, tmp_path: Path, shard_documents: int
) -> None:
    """docs/method.md, 2.5 and 4.4: the size of a shard is no part of the experiment."""
    stage = LatentsStage(tmp_path, base_folder, shard_documents)
    metrics, _ = stage.run()
    assert content(stage.samples()) == content(one_shard.samples())
    assert len(list(stage.out.iterdir())) == -(-DOCUMENTS // shard_documents)
    for path in sorted(stage.out.iterdir()):
        doc_ids = {chunk.doc_id for chunk in read_shard(stage.chunks / path.name, Chunk)}
        assert {sample.doc_id for sample in read_shard(path, Sample)} == doc_ids
    assert metrics["samples"] == 3 * metrics["chunks"] == len(one_shard.samples())


def test_an_interrupted_stage_resumes(
    one_shard: LatentsStage, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards are complete when it is interrupted; the next run processes the third, and the
    result is that of an uninterrupted run."""
    stage = LatentsStage(tmp_path, base_folder, 3)
    processed: list[set[str]] = []
    run = EStep.run

    def interrupted_run(
        self: EStep, chunks: Sequence[ChunkInContext], *arguments: Any
    ) -> list[list[Sample]]:
        processed.append({chunk.doc_id for chunk in chunks})
        if len(processed) == 3:
            raise KeyboardInterrupt
        return run(self, chunks, *arguments)

    monkeypatch.setattr(EStep, "run", interrupted_run)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    metrics, _ = stage.run()
    assert len(processed) == 4
    assert processed[3] == processed[2]
    assert content(stage.samples()) == content(one_shard.samples())
    assert metrics["chunks"] == len(one_shard.samples()) / 3
    stage.run()
    assert len(processed) == 4


@pytest.mark.parametrize("change", [{"seed": 2}, {"max_latent_tokens": 5}, {"context_chunks": 0}])
def test_other_settings_do_not_reuse_shards(
    base_folder: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    """Shards that were drawn with another seed, length limit or context must not be reused; with
    the first settings again, the first shards are."""
    stage = LatentsStage(tmp_path, base_folder, 100)
    first_metrics, first_timing = stage.run()
    first = stage.samples()
    stage.params |= change
    stage.run()
    second = stage.samples()
    assert content(second) != content(first)
    stage.params |= {key: small_params()[key] for key in change}
    metrics, timing = stage.run()
    assert metrics == pytest.approx(first_metrics, nan_ok=True)
    assert stage.samples()[0].log_q == first[0].log_q
    assert first_timing.keys() == {
        "seconds",
        "sampled_tokens_per_second",
        "scored_tokens_per_second",
        "sampling_time_fraction",
    }
    assert timing == {}, "no draws were made, so there is nothing that was measured"


@pytest.fixture
def sampler_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The index of the first draw and the number of draws of each call of the sampler."""
    calls: list[tuple[int, int]] = []
    sample = TransformersSampler.sample

    def recorded_sample(
        self: Any, prompts: Any, keys: Any, num_samples: int, first_index: int = 0
    ) -> Any:
        calls.append((first_index, num_samples))
        return sample(self, prompts, keys, num_samples, first_index)

    monkeypatch.setattr(TransformersSampler, "sample", recorded_sample)
    return calls


def test_another_k_reuses_existing_draws(
    base_folder: Path, tmp_path: Path, sampler_calls: list[tuple[int, int]]
) -> None:
    """After K = 3, K = 5 draws two more per chunk and K = 2 none; both equal a new run with that
    K."""
    stage = LatentsStage(tmp_path / "reused", base_folder, 100)
    stage.run()
    three = stage.samples()
    stage.params["k_samples"] = 5
    stage.run()
    five = stage.samples()
    stage.params["k_samples"] = 2
    _, timing = stage.run()
    assert timing == {}
    two = stage.samples()
    assert sampler_calls == [(0, 3), (3, 2)]
    assert [(s.tokens, s.log_q) for s in five if s.sample < 3] == [
        (s.tokens, s.log_q) for s in three
    ]
    for k, samples in ((5, five), (2, two)):
        new = LatentsStage(tmp_path / f"new{k}", base_folder, 100)
        new.params["k_samples"] = k
        new.run()
        assert content(new.samples()) == content(samples)


def test_a_control_shares_the_draws_and_not_the_selection(
    base_folder: Path, tmp_path: Path, sampler_calls: list[tuple[int, int]]
) -> None:
    """An entry with the same model and another selection draws nothing. In whichever order the two
    are run, before and after a change of K, each has its own selection: that of a run alone."""

    def both(stage: LatentsStage, names: tuple[str, str]) -> dict[str, list[Sample]]:
        samples = {}
        for name in names:
            stage.run(name)
            samples[name] = stage.samples()
        return samples

    stage, shards = LatentsStage(tmp_path / "shared", base_folder, 3), 3
    stage.params["k_samples"] = 16
    fewer = both(stage, ("em1", "uniform"))
    assert sampler_calls == [(0, 16)] * shards
    stage.params["k_samples"] = 17
    more = both(stage, ("uniform", "em1"))
    assert sampler_calls == [(0, 16)] * shards + [(16, 1)] * shards
    stage.params["k_samples"] = 16
    assert both(stage, ("em1", "uniform")) == fewer
    for samples in (fewer, more):
        first, second = (
            [replace(s, selected=False) for s in samples[name]] for name in ("em1", "uniform")
        )
        assert first == second
        assert samples["em1"] != samples["uniform"]
    alone = LatentsStage(tmp_path / "alone", base_folder, 3)
    alone.params["k_samples"] = 17
    alone.run("uniform")
    assert content(alone.samples()) == content(more["uniform"])


def test_forward_tokens_are_counted_over_the_corpus(
    one_shard: LatentsStage, base_folder: Path
) -> None:
    """The same sum over prompts and sequences that are written out."""
    metrics, _ = one_shard.run()
    coder = TextCoder(base_folder)
    chunks = chunks_in_context(list(read_table(one_shard.chunks, Chunk)), 2, 10**6)
    assert max(len(chunk.context) for chunk in chunks) > 20
    total = 0
    for chunk, group in zip(chunks, group_by_chunk(one_shard.samples()), strict=True):
        posterior = reference.posterior_prompt(coder.special_tokens, chunk.context, chunk.text)
        prior = reference.prior_prompt(coder.special_tokens, chunk.context)
        total += len(posterior) + len(prior)
        total += sum(2 * (len(s.tokens) + 1) + len(chunk.text) for s in group)
    assert metrics["forward_tokens"] == total


def test_summaries_are_made_with_the_shards(base_folder: Path, tmp_path: Path) -> None:
    """When all shards are there, no table is read again; a summary that is missing or damaged is
    made anew; the metrics are those of the whole table."""
    stage = LatentsStage(tmp_path, base_folder, shard_documents=2)
    metrics, _ = stage.run()
    summaries = sorted((tmp_path / "work").rglob("summaries/*.json"))
    assert len(summaries) == len(shard_paths(stage.chunks)) > 1
    references = reference_latents(tmp_path / "split" / "em", stage.chunks)
    whole = WeightDiagnostics(group_by_chunk(stage.samples()), references)
    expected = whole.diagnostics() | whole.exact_match_metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    written = [path.stat().st_mtime_ns for path in summaries]
    summaries[0].write_text("{", encoding="utf-8")
    summaries[1].unlink()
    assert stage.run()[0] == metrics
    assert [path.stat().st_mtime_ns for path in summaries[2:]] == written[2:]


def test_the_iteration_before_is_reused(
    base_folder: Path, tmp_path: Path, sampler_calls: list[tuple[int, int]]
) -> None:
    """Its own draws, or the latent that it selected, beside those of this entry, which do not
    depend on what is reused. A second run draws nothing."""
    stage = LatentsStage(tmp_path, base_folder, 100)
    stage.run()
    earlier = group_by_chunk(stage.samples())
    shutil.copytree(stage.out, stage.previous)
    stage.run("next")
    own = group_by_chunk(stage.samples())
    assert content(stage.samples()) != content([s for group in earlier for s in group])
    del sampler_calls[:]
    for reuse, kept in (("draws", earlier), ("selected", [_selected(g) for g in earlier])):
        stage.params["estep"]["reuse"] = reuse
        metrics, _ = stage.run("next")
        groups = group_by_chunk(stage.samples())
        assert metrics["candidates"] == sum(map(len, groups))
        for group, new, old in zip(groups, own, kept, strict=True):
            assert [s.tokens for s in group] == [s.tokens for s in [*new, *old]]
            for sample, same in zip(group, [*new, *old], strict=True):  # one model under two names
                assert sample.log_weight == pytest.approx(same.log_weight, abs=1e-3)
        selected = [s.source for group in groups for s in group if s.selected]
        earlier_source = "previous" if reuse == "draws" else "retained"
        share = selected.count(earlier_source) / len(groups)
        assert metrics["selected_earlier_fraction"] == pytest.approx(share)
        again, _ = stage.run("next")
        assert again == metrics
    assert sampler_calls == [], "the draws from the proposal are shared"


def _selected(group: list[Sample]) -> list[Sample]:
    return [s for s in group if s.selected]


def test_latents_of_another_model_or_corpus_are_not_reused(
    base_folder: Path, tmp_path: Path
) -> None:
    """Each is found before anything is drawn for the shard, and one line says what to do."""
    stage = LatentsStage(tmp_path, base_folder, 100)
    stage.run()
    stage.params["estep"]["reuse"] = "draws"
    shutil.copytree(stage.out, stage.previous)
    (stage.previous / "00000.parquet").rename(stage.previous / "00001.parquet")
    with pytest.raises(UserError, match="no such file; `previous` must name latents of the same"):
        stage.run("next")
    shutil.rmtree(stage.previous)
    shutil.copytree(stage.out, stage.previous)
    stage.previous_model = tmp_path / "other"
    shutil.copytree(base_folder, stage.previous_model)
    weights = stage.previous_model / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="`previous_model` must be the model that made `previous`"):
        stage.run("next")
    path = stage.previous / "00000.parquet"
    rows = [s for s in read_shard(path, Sample) if s.chunk == 0]
    write_shard(path, Sample, rows)
    stage.params["estep"]["reuse"] = "selected"
    with pytest.raises(UserError, match="no draws to reuse for chunk 1 of"):
        stage.run("next")


def test_sequential_monte_carlo_as_a_stage(base_folder: Path, tmp_path: Path) -> None:
    """Every chunk has its particles, one of them selected, whatever the shards."""
    results = []
    for size in (100, 3):
        stage = LatentsStage(tmp_path / str(size), base_folder, size)
        stage.params["sequences"] |= {"layout": "document", "context_loss": True}
        stage.params["estep"]["method"] = "smc"
        metrics, _ = stage.run()
        groups = group_by_chunk(stage.samples())
        assert all(len(group) == 3 and len(_selected(group)) == 1 for group in groups)
        assert metrics["candidates"] == metrics["samples"] == 3 * len(groups)
        assert metrics["bound_per_token"] < 0
        results.append((content(stage.samples()), metrics["forward_tokens"]))
    assert results[0] == results[1]

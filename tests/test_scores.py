"""The paired bootstrap, and finished tasks on disk."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune import scores
from llmprune.scores import AGGREGATIONS, Documents, Scores, difference, keep, kept

VALUES = st.lists(st.floats(-50, 1, allow_nan=False), min_size=1, max_size=40)


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
@given(values=VALUES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_equal_models_differ_by_exactly_nothing(aggregation, values, seed):
    weights = [1.0 + number for number in range(len(values))] if aggregation != "mean" else None
    documents = Documents(aggregation, values, weights)
    found = difference(documents, documents, seed=seed, resamples=50)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_covers_a_known_difference_as_often_as_it_says():
    generator = np.random.default_rng(0)
    runs, count, covered = 400, 120, 0
    for seed in range(runs):
        hardness = generator.normal(0, 3, count)
        model = Documents("mean", list(hardness + generator.normal(-0.2, 1, count)))
        found = difference(model, Documents("mean", list(hardness)), seed=seed, resamples=400)
        covered += found.low <= -0.2 <= found.high
    # 95 % give 380 +- 4.4; a percentile interval of 120 documents is a little short.
    assert 0.91 <= covered / runs <= 0.98


def test_pairing_takes_what_both_models_find_hard_out_of_the_interval():
    generator = np.random.default_rng(0)
    hardness = generator.normal(0, 3, 200)
    model = Documents("mean", list(hardness + generator.normal(0, 0.1, 200)))
    found = difference(model, Documents("mean", list(hardness)))
    assert found.high - found.low < 0.05


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_the_difference_is_between_what_the_harness_aggregates(aggregation):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    generator = random.Random(0)
    one, other, weights = ([generator.uniform(-60, -1) for _ in range(30)] for _ in range(3))
    weights = [-weight for weight in weights]
    weighted = aggregation in ("weighted_perplexity", "bits_per_byte")
    aggregate = getattr(metrics, aggregation)
    expected = [aggregate(list(zip(values, weights, strict=True)) if weighted else values) for values in (one, other)]
    given_weights = weights if weighted else None
    found = difference(Documents(aggregation, one, given_weights), Documents(aggregation, other, given_weights), resamples=10)
    assert found.value == pytest.approx(expected[0] - expected[1], rel=1e-12)


def test_the_interval_is_that_of_a_plain_loop_over_the_same_draws():
    generator = random.Random(0)
    one, other, weights = ([generator.uniform(1, 9) for _ in range(7)] for _ in range(3))
    draws = np.random.default_rng(3).integers(7, size=(40, 7))
    loop = []
    for draw in draws:
        total = sum(weights[i] for i in draw)
        loop.append(math.exp(sum(one[i] for i in draw) / -total) - math.exp(sum(other[i] for i in draw) / -total))
    found = difference(
        Documents("weighted_perplexity", one, weights), Documents("weighted_perplexity", other, weights), seed=3, resamples=40
    )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(loop, [0.025, 0.975])), rel=1e-12)


def test_drawing_in_pieces_changes_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    one, other = (Documents("mean", list(generator.normal(size=50))) for _ in range(2))
    whole = difference(one, other, resamples=300)
    monkeypatch.setattr(scores, "DRAWS", 50 * 7)
    assert difference(one, other, resamples=300) == whole


def finished(**changes: object) -> Scores:
    values: dict[str, object] = {
        "samples": 2,
        "fewshot": 0,
        "version": 1.0,
        "metrics": {"acc": 0.5, "acc_stderr": None},
        "higher_is_better": {"acc": True},
        "documents": {"acc": Documents("mean", [0.0, 1.0])},
        "documents_sha256": "0" * 64,
    }
    return Scores(**{**values, **changes})


@pytest.fixture
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("_cache")
def test_scores_come_back_as_they_were_kept_and_under_their_key_only():
    keep({"task": "a"}, finished())
    assert kept({"task": "a"}) == finished()
    assert kept({"task": "b"}) is None


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("damage", ["", "{}", "null", '{"scores": {"samples": "many"}}'])
def test_a_damaged_file_counts_as_none(damage, tmp_path):
    keep({}, finished())
    (file,) = (tmp_path / "scores").iterdir()
    file.write_text(damage)
    assert kept({}) is None


def test_the_main_metric_is_the_one_asked_for_where_the_task_has_it():
    both = finished(higher_is_better={"acc": True, "acc_norm": True})
    assert both.main_metric() == "acc_norm"
    assert both.main_metric("acc") == "acc"
    assert finished().main_metric("acc_norm") == "acc"
    assert finished(higher_is_better={"word_perplexity": False, "byte_perplexity": False}).main_metric() == "word_perplexity"

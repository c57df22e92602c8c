"""Tiny models of other architectures, trained and measured by the benchmark scripts."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent.parent / "evals" / "bench"))
from bench_trained_families import ROWS, measure, row_of, unigram
from train_tiny import SHAPES, Protocol, rate, stories, trained

QUICK = Protocol(steps=2, batch=2, seqlen=24, calibration=4, test=4)
pytestmark = pytest.mark.needs_data


@pytest.fixture(scope="module", autouse=True)
def _one_block():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "gpt2", SHAPES["gpt2"] | {"n_layer": 1})
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def test_a_family_is_measured_in_every_row_asked_for(root):
    names = ["magnitude-2:4", "wanda-2:4"]
    rows = measure("gpt2", QUICK, root, names)
    assert [row["row"] for row in rows] == ["dense", *names]
    assert [row["sparsity"] for row in rows] == [None, 0.5, 0.5]
    assert [row["beats"] for row in rows] == [None, None, "magnitude-2:4"]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert rows[0]["over_dense"] == 1
    assert 1 < rows[0]["writer"] < rows[0]["unigram"]


def test_training_again_gives_the_same_weights_and_a_shorter_text_other_ones(root, tmp_path):
    def weights(protocol, folder):
        return load_file(trained("gpt2", protocol, folder) / "model.safetensors")

    first, again, shorter = weights(QUICK, root), weights(QUICK, tmp_path), weights(replace(QUICK, steps=1), tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(shorter[name], tensor) for name, tensor in first.items())


def test_the_parts_of_a_text_share_no_sample_and_each_starts_with_bos(root):
    text = stories(QUICK, root)
    samples = [tuple(ids) for part in (text.train_NT, text.calibration_NT, text.test_NT) for ids in part.tolist()]
    assert len(set(samples)) == len(samples) == 2 * 2 + 4 + 4
    assert {ids[0] for ids in samples} == {1}


def test_the_rate_warms_up_peaks_once_and_ends_at_a_tenth():
    rates = [rate(step, 200) for step in range(200)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_unigrams_that_were_seen_equally_often_are_as_bad_as_chance():
    ids_NT = torch.cat([torch.zeros(512, 1), torch.arange(512).view(-1, 1)], dim=1).long()
    assert unigram(ids_NT, ids_NT[:7]) == pytest.approx(512)


def test_a_gain_is_positive_where_the_loss_is_lower():
    losses = {"dense": [1.0, 1.0], "magnitude-50": [2.0, 4.0], "wanda-50": [1.5, 2.5]}
    row = row_of("gpt2", "wanda-50", losses)
    assert (row["beats"], row["gain"], row["gain_error"]) == ("magnitude-50", 1.0, 0.5)


def test_every_level_has_a_row_of_every_main_method_after_the_one_it_should_beat():
    names = list(ROWS)
    for level in ("30", "50", "70", "2:4"):
        places = [names.index(f"{method}-{level}") for method in ("magnitude", "wanda", "sparsegpt")]
        assert places == sorted(places)

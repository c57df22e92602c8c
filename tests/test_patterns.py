"""Patterns: exact counts, dominance, ties to the lowest index."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.patterns import NM, Unstructured, lowest, removed_count


def reference_lowest(score_GN: torch.Tensor, count: int) -> torch.Tensor:
    """Stable sort, one row at a time."""
    marked = torch.zeros_like(score_GN, dtype=torch.bool)
    for row, scores in enumerate(score_GN.tolist()):
        for index in sorted(range(len(scores)), key=lambda i: scores[i])[:count]:
            marked[row, index] = True
    return marked


@st.composite
def scores(draw, columns=None):
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 40) if columns is None else columns)
    # Few distinct values: ties everywhere.
    values = draw(st.lists(st.integers(0, 4), min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float32).view(rows, width)


@given(scores(), st.data())
def test_lowest_equals_a_stable_sort_also_with_ties(score, data):
    count = data.draw(st.integers(0, score.shape[1]))
    assert torch.equal(lowest(score, count), reference_lowest(score, count))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("columns", [1, 7, 48, 100, 576])
def test_every_row_loses_exactly_the_floor_of_its_share(sparsity, columns):
    keep = Unstructured(sparsity).keep(torch.rand(5, columns))
    assert ((~keep).sum(1) == removed_count(columns, sparsity)).all()


def test_counts_are_free_of_binary_rounding():
    assert int(100 * 0.29) == 28
    assert removed_count(100, 0.29) == 29


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_layer_group_removes_the_lowest_of_the_whole_matrix(sparsity):
    score = torch.rand(7, 13)
    keep = Unstructured(sparsity, "layer").keep(score)
    assert (~keep).sum() == removed_count(91, sparsity)
    assert score[~keep].max() <= score[keep].min()


@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 8), (1, 16), (7, 12), (128, 256)]), st.data())
def test_nm_keeps_exactly_n_in_every_group_the_highest_ones_first_index_removed(nm, data):
    n, m = nm
    score = data.draw(scores(columns=st.integers(1, 4).map(lambda groups: groups * m)))
    keep = NM(n, m).keep(score)
    assert (keep.view(-1, m).sum(1) == n).all()
    assert torch.equal(keep.view(-1, m), ~reference_lowest(score.reshape(-1, m), m - n))


def test_masks_of_growing_sparsity_are_nested():
    score = torch.rand(9, 50)
    keeps = [Unstructured(s).keep(score) for s in (0.5, 0.6, 0.7)]
    for looser, tighter in itertools.pairwise(keeps):
        assert not (tighter & ~looser).any()

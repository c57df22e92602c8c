"""The bounded KL: against the full one in float64, and by its laws."""

import pytest
import torch

from llmprune import teacher
from llmprune.teacher import Teacher

VOCABULARY = 97


def logits(seed, *, positions=9, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(positions, VOCABULARY, generator=generator)


def full_kl(dense, candidate):
    dense, candidate = (each[:-1].double().log_softmax(dim=1) for each in (dense, candidate))
    return float((dense.exp() * (dense - candidate)).sum(dim=1).mean())


def bounded_kl(dense, candidate, k):
    """The top k and the rest of every position, one by one in float64."""
    dense, candidate = (each[:-1].double().softmax(dim=1) for each in (dense, candidate))
    total = 0.0
    for p, q in zip(dense, candidate, strict=True):
        top = p.argsort(descending=True)[:k]
        rest = torch.ones_like(p, dtype=torch.bool).index_fill(0, top, False)
        p, q = (torch.cat((each[top], each[rest].sum()[None])) for each in (p, q))
        total += float((p * (p / q).log()).nan_to_num(0.0).sum())
    return total / len(dense)


@pytest.mark.parametrize("k", [1, 8, 96])
def test_value_equals_the_top_k_and_the_rest_one_by_one(k):
    dense, candidate = logits(0), logits(1)
    assert Teacher(lambda _: dense, k).kl(0, candidate) == pytest.approx(bounded_kl(dense, candidate, k), rel=1e-5)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_value_grows_with_k_to_the_full_kl(scale):
    dense, candidate = logits(0, scale=scale), logits(1, scale=scale)
    values = [Teacher(lambda _: dense, k).kl(0, candidate) for k in (1, 2, 5, 20, 60, 97, 1000)]
    full = full_kl(dense, candidate)
    assert values == pytest.approx(sorted(values), rel=1e-6, abs=1e-6)
    assert values[0] >= -1e-6
    assert values[0] < 0.95 * full
    assert values[-1] == values[-2] == pytest.approx(full, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [3, 97])
def test_the_dense_model_itself_is_at_exactly_zero(dtype, k):
    dense = logits(0, scale=8.0).to(dtype)
    assert Teacher(lambda _: dense, k).kl(0, dense.clone()) == 0


def test_a_constant_added_to_the_logits_changes_nothing():
    dense, candidate = logits(0), logits(1)
    value = Teacher(lambda _: dense, 10).kl(0, candidate)
    shift = torch.linspace(-50, 50, 9)[:, None]
    assert Teacher(lambda _: dense + shift, 10).kl(0, candidate) == pytest.approx(value, rel=1e-4)
    assert Teacher(lambda _: dense, 10).kl(0, candidate - shift) == pytest.approx(value, rel=1e-4)


def test_the_last_position_does_not_count():
    dense, candidate = logits(0), logits(1)
    other = torch.cat((candidate[:-1], logits(2)[-1:]))
    dense_teacher = Teacher(lambda _: dense, 10)
    assert dense_teacher.kl(0, other) == dense_teacher.kl(0, candidate)


def test_mass_moved_to_unlikely_tokens_is_seen():
    dense = logits(0)
    candidate = dense.clone()
    candidate.scatter_add_(1, dense.argsort(dim=1)[:, :40], torch.full((9, 40), 12.0))
    assert Teacher(lambda _: dense, 8).kl(0, candidate) > 1


@pytest.mark.parametrize("chunk", [1, 97, 300, 1 << 24])
def test_chunks_change_nothing(monkeypatch, chunk):
    dense, candidate = logits(0), logits(1)
    expected = Teacher(lambda _: dense, 8).kl(0, candidate)
    monkeypatch.setattr(teacher, "CHUNK", chunk)
    assert Teacher(lambda _: dense, 8).kl(0, candidate) == pytest.approx(expected, rel=1e-6)


def test_the_dense_model_is_asked_once_about_every_window():
    asked = []

    def dense(window):
        asked.append(window)
        return logits(window)

    dense_teacher = Teacher(dense, 8)
    dense_teacher.look([3, 1, 3])
    values = [dense_teacher.kl(window, logits(9)) for window in (1, 2, 3, 2, 1)]
    assert asked == [3, 1, 2]
    assert values[0] == values[4] != values[1] == values[3]


def test_logits_far_apart_stay_a_finite_lower_bound():
    # exp() of the others vanishes in float32, in either of the two models or both.
    sharp, flat = torch.zeros(4, 5), torch.zeros(4, 5)
    sharp[:, 0] = 200
    for dense, candidate in ((sharp, flat), (flat, sharp), (sharp, sharp.roll(1, dims=1))):
        for k in (1, 3, 5):
            value = Teacher(lambda _, dense=dense: dense, k).kl(0, candidate)
            assert 0 <= value <= full_kl(dense, candidate) * (1 + 1e-6) + 1e-9


def test_tokens_the_dense_model_rules_out_cost_nothing_and_broken_candidates_are_not_finite():
    dense, candidate = logits(0), logits(1)
    ruled_out = dense.clone()
    ruled_out[:, 5] = -torch.inf
    assert Teacher(lambda _: ruled_out, 97).kl(0, candidate) == pytest.approx(bounded_kl(ruled_out, candidate, 97), rel=1e-5)
    for broken in (torch.nan, torch.inf):
        candidate[2, 7] = broken
        assert not torch.tensor(Teacher(lambda _: dense, 8).kl(0, candidate)).isfinite()


def test_a_window_takes_eight_bytes_for_each_of_the_k_tokens_of_a_position_and_four_more():
    dense_teacher = Teacher(lambda _: logits(0), 16)
    dense_teacher.look([0])
    stored = dense_teacher._seen[0]
    assert sum(each.numel() * each.element_size() for each in (stored.token_TK, stored.log_TK, stored.rest_T)) == 8 * (
        8 * 16 + 4
    )

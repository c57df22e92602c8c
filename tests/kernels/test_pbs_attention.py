"""Permuted block-sparse attention: the order alone changes nothing, and what is left out is what the rule says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from llmprune.kernels.pbs_attention import (
    STRIDE,
    Rule,
    Selection,
    attend,
    block_scores,
    causal_blocks,
    covered_mass,
    earlier_blocks,
    keep_blocks,
    key_order,
    own_blocks,
    pbs_attention,
    reference,
    select,
    speedup_by_operations,
    visible,
)

HEADS, KV, WIDTH = 4, 2, 8
# Shorter than a segment, as long, a token more, and with a last block and a last segment that are not complete.
LENGTHS = (1, 16, 17, 32, 100, 129)
SMALL = {"block": 8, "segment": 16}


def problem(tokens, seed=0, dtype=torch.float64, heads=HEADS, kv=KV, width=WIDTH, batch=2):
    """Query, key and value; keys of very different lengths, so that attention is uneven."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn((batch, h, tokens, width), generator=generator) for h in (heads, kv, kv))
    key *= 3 * torch.rand((batch, kv, tokens, 1), generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def full(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def heavy(tokens, count, seed=0):
    """Attention of one head as models have it: `count` keys at random places that every query likes, among noise."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn((1, 1, tokens, 64), generator=generator) for _ in range(3))
    query[..., 0] += 6
    places = torch.randperm(tokens, generator=generator)[:count]
    key[:, :, places, 0] += 6
    return query, key, value


def distance(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


rules = st.builds(
    lambda block, blocks, share, scores, threshold: Rule(threshold, block, block * blocks, share, scores=scores),
    st.sampled_from([8, 16]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["mean", "antidiagonal"]),
    st.sampled_from([0.01, 0.3, 0.9, 1.0]),
)


@settings(max_examples=15, deadline=None)
@given(rules, st.integers(1, 110), st.integers(0, 99))
def test_an_order_moves_keys_within_complete_segments_only(rule, tokens, seed):
    query, key, _ = problem(tokens, seed, torch.float32)
    order_BPN = key_order(query, key, rule)
    places = torch.arange(tokens)
    assert order_BPN.shape == (2, KV if rule.share_heads else HEADS, tokens)
    assert torch.equal(order_BPN.sort(dim=-1).values, places.expand_as(order_BPN))
    assert torch.equal(order_BPN // rule.segment, (places // rule.segment).expand_as(order_BPN))
    complete = 0 if tokens <= rule.segment else tokens // rule.segment * rule.segment
    assert torch.equal(order_BPN[..., complete:], places[complete:].expand_as(order_BPN[..., complete:]))


@pytest.mark.parametrize("share_heads", [True, False])
def test_the_key_that_the_last_queries_attend_to_most_comes_first_and_ties_keep_their_order(share_heads):
    query, key, _ = problem(48, dtype=torch.float32)
    rule = Rule(block=8, segment=16, share_heads=share_heads)
    key[:] = 0
    key[:, 1, 21] = query[:, 2:, -8:].mean(dim=(1, 2))
    places = key_order(query, key, rule)[:, -1]
    assert places[0].tolist() == [*range(16), 21, *range(16, 21), *range(22, 48)]
    assert torch.equal(key_order(query, key, rule)[:, 0], torch.arange(48).expand(2, -1))


@settings(max_examples=15, deadline=None)
@given(rules, st.integers(1, 110), st.integers(0, 99))
def test_own_segments_are_kept_and_later_ones_never_and_the_first_token_always_is(rule, tokens, seed):
    query, key, _ = problem(tokens, seed, torch.float32)
    selection = select(query, key, rule)
    kept_BHTT = selection.kept_BHTT
    own_TT, earlier_TT = own_blocks(tokens, rule), earlier_blocks(tokens, rule)
    assert kept_BHTT[..., own_TT].all()
    assert not kept_BHTT[..., ~(own_TT | earlier_TT)].any()
    assert visible(selection, rule)[..., 0].all()
    assert kept_BHTT.any(dim=-1).all()


@settings(max_examples=12, deadline=None)
@given(rules, st.integers(33, 110), st.integers(0, 99))
def test_kept_blocks_reach_the_threshold_and_no_more_than_needed_and_are_nested(rule, tokens, seed):
    query, key, _ = problem(tokens, seed, torch.float32)
    order_BPN = key_order(query, key, rule)
    scores_BHTT = block_scores(query, key, order_BPN, rule)
    earlier_TT = earlier_blocks(tokens, rule)
    some = earlier_TT.any(dim=-1)
    assert torch.allclose(scores_BHTT.sum(dim=-1)[..., some], torch.ones(()))
    before = torch.zeros_like(scores_BHTT, dtype=torch.bool)
    for threshold in (0.2, 0.6, 0.9, 1.0):
        plain = Rule(threshold, rule.block, rule.segment, keep_first=False)
        kept_BHTT = keep_blocks(scores_BHTT, order_BPN, plain)
        assert (kept_BHTT | before).equal(kept_BHTT)
        before = kept_BHTT
        chosen_BHTT = (kept_BHTT & earlier_TT)[..., some, :]
        mass_BHT = (scores_BHTT[..., some, :] * chosen_BHTT).sum(dim=-1)
        assert (mass_BHT >= threshold - 1e-5).all()
        least_BHT = scores_BHTT[..., some, :].masked_fill(~chosen_BHTT, torch.inf).amin(dim=-1)
        assert threshold == 1 or (mass_BHT - least_BHT < threshold).all()


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("share_heads", [True, False])
def test_a_threshold_of_one_is_full_attention(tokens, share_heads):
    query, key, value = problem(tokens)
    for threshold in (1, 1.0):
        rule = Rule(threshold, **SMALL, share_heads=share_heads)
        assert (pbs_attention(query, key, value, rule) - full(query, key, value)).abs().max() < 1e-12
        expected = reference(query, key, value, select(query, key, rule), rule)
        assert (expected - full(query, key, value)).abs().max() < 1e-12


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(0, 99))
def test_any_order_within_segments_changes_nothing_by_itself(tokens, seed):
    query, key, value = problem(tokens, seed)
    rule = Rule(1, **SMALL)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((2, HEADS, tokens), generator=generator) + torch.arange(tokens) // rule.segment * 2
    order_BPN = noise.argsort(dim=-1)
    kept_TT = own_blocks(tokens, rule) | earlier_blocks(tokens, rule)
    selection = Selection(order_BPN, kept_TT.expand(2, HEADS, -1, -1))
    assert (attend(query, key, value, selection, rule) - full(query, key, value)).abs().max() < 1e-12
    assert (reference(query, key, value, selection, rule) - full(query, key, value)).abs().max() < 1e-12


@settings(max_examples=10, deadline=None)
@given(rules, st.integers(1, 110), st.integers(0, 99))
def test_blocks_of_queries_compute_the_reference(rule, tokens, seed):
    query, key, value = problem(tokens, seed)
    selection = select(query, key, rule)
    out = attend(query, key, value, selection, rule, scale=0.2)
    assert (out - reference(query, key, value, selection, rule, scale=0.2)).abs().max() < 1e-12
    assert out.transpose(1, 2).is_contiguous()


def test_the_reference_is_softmax_over_the_kept_blocks_that_hold_earlier_keys():
    query, key, value = problem(40, batch=1)
    rule = Rule(0.4, **SMALL)
    selection = select(query, key, rule)
    out = reference(query, key, value, selection, rule)
    for head, row in ((0, 3), (1, 20), (3, 39)):
        slots = selection.order_BPN[0, head // 2].tolist()
        kept = selection.kept_BHTT[0, head, row // 8]
        keys = [place for slot, place in enumerate(slots) if place <= row and kept[slot // 8]]
        weights = (key[0, head // 2, keys] @ query[0, head, row] * WIDTH**-0.5).softmax(dim=0)
        assert torch.allclose(out[0, head, row], weights @ value[0, head // 2, keys])


def test_a_later_token_changes_no_earlier_output():
    query, key, value = problem(60)
    rule = Rule(0.5, **SMALL)
    selection = select(query, key, rule)
    before = attend(query, key, value, selection, rule)
    for row in (0, 7, 20, 58):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, :, row + 1 :] += 5
        other_value[:, :, row + 1 :] -= 3
        for run in (attend, reference):
            out = run(query, other_key, other_value, selection, rule)
            assert torch.allclose(out[:, :, : row + 1], before[:, :, : row + 1], rtol=0, atol=1e-12)


def test_blocks_that_no_query_keeps_are_never_used():
    query, key, value = problem(60)
    rule = Rule(0.5, **SMALL)
    selection = select(query, key, rule)
    kept_BHTT = selection.kept_BHTT.clone()
    kept_BHTT[..., 1] &= ~earlier_blocks(60, rule)[:, 1]
    selection = Selection(selection.order_BPN, kept_BHTT)
    clean = attend(query, key, value, selection, rule)
    for head in range(KV):
        places = selection.order_BPN[:, head, 8:16]
        for sequence in range(2):
            key[sequence, head, places[sequence]] = value[sequence, head, places[sequence]] = torch.nan
    out = attend(query, key, value, selection, rule)
    assert torch.equal(out[:, :, 16:], clean[:, :, 16:])
    assert out[:, :, :16].isnan().any()


def test_where_scores_are_nan_everything_is_kept():
    query, key, _ = problem(60, dtype=torch.float32)
    query[:, :, 40] = torch.nan
    assert select(query, key, Rule(0.1, **SMALL)).kept_BHTT[:, :, 5, :6].all()


def test_scores_are_of_the_means_of_blocks_in_the_new_order():
    query, key, _ = problem(44, dtype=torch.float32)
    rule = Rule(**SMALL)
    order_BPN = key_order(query, key, rule)
    scores_BHTT = block_scores(query, key, order_BPN, rule)
    for head, row in ((1, 2), (3, 5)):
        mean = query[1, head, row * 8 : row * 8 + 8].mean(dim=0)
        moved = key[1, head // 2, order_BPN[1, head // 2]]
        logits = [float(moved[b * 8 : b * 8 + 8].mean(dim=0) @ mean) * WIDTH**-0.5 for b in range(row // 2 * 2)]
        assert torch.allclose(scores_BHTT[1, head, row, : len(logits)], torch.tensor(logits).softmax(dim=0), atol=1e-6)
        assert not scores_BHTT[1, head, row, len(logits) :].any()


def test_antidiagonal_scores_are_sums_along_antidiagonals():
    query, key, _ = problem(60, dtype=torch.float32, batch=1)
    rule = Rule(block=16, segment=32, scores="antidiagonal")
    order_BPN = key_order(query, key, rule)
    moved = key[0, 1, order_BPN[0, 1]]
    scores_T = block_scores(query, key, order_BPN, rule)[0, 3, 2]
    rows = []
    for start in range(32, 48, STRIDE):
        logits = [
            sum(float(query[0, 3, start + STRIDE - 1 - s] @ moved[b * STRIDE + s]) for s in range(STRIDE))
            for b in range(32 // STRIDE)
        ]
        rows.append((torch.tensor(logits) * WIDTH**-0.5 / STRIDE).softmax(dim=0))
    expected = torch.stack(rows).mean(dim=0).unflatten(0, (2, 2)).sum(dim=1)
    assert torch.allclose(scores_T[:2], expected, atol=1e-6)
    assert not scores_T[2:].any()


def test_covered_mass_is_the_kept_part_of_full_attention_and_grows_with_the_threshold():
    query, key, _ = problem(60, dtype=torch.float32)
    rows = torch.tensor([0, 17, 31, 59])
    before = torch.zeros(2, HEADS, 4)
    for threshold in (0.1, 0.5, 0.9, 1.0):
        rule = Rule(threshold, **SMALL)
        selection = select(query, key, rule)
        mass = covered_mass(query, key, selection, rule, rows)
        scores = query @ key.repeat_interleave(2, dim=1).mT * WIDTH**-0.5
        weights = scores.masked_fill(torch.ones(60, 60, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)
        expected = (weights * visible(selection, rule)).sum(dim=-1)[..., rows]
        assert torch.allclose(mass, expected, atol=1e-6)
        assert (mass >= before - 1e-6).all()
        before = mass
    assert torch.allclose(before, torch.ones(()))


def test_sorting_heavy_keys_needs_fewer_blocks_and_errs_less():
    query, key, value = heavy(1024, 30)
    exact = full(query, key, value)
    errors, blocks = {}, {}
    for sort in (True, False):
        for threshold in (0.5, 0.7, 0.9, 0.99):
            rule = Rule(threshold, block=32, segment=128)
            selection = select(query, key, rule, sort=sort)
            errors[sort, threshold] = distance(attend(query, key, value, selection, rule), exact)
            blocks[sort, threshold] = int(selection.kept_BHTT.sum())
    for threshold in (0.5, 0.7, 0.9):
        assert blocks[True, threshold] < 0.95 * blocks[False, threshold]
        assert errors[True, threshold] < errors[False, threshold]
    assert errors[True, 0.99] < errors[True, 0.9] < errors[True, 0.7] < errors[True, 0.5]


def test_operations_are_those_of_blocks_of_the_order_and_of_the_scores():
    rule = Rule(block=8, segment=16)
    assert causal_blocks(60, rule) == 36
    dense, order, scores = 36 * 2 * 8 * 8 * 4, 60 * 8 * 4 / 2, 8 * 8 * 4
    assert speedup_by_operations(18, 60, rule, width=4, repeats=2) == pytest.approx(dense / (dense / 2 + order + scores))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0}, r"threshold is 0: give a share"),
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"threshold": float("nan")}, r"threshold is nan"),
        ({"block": 0}, r"blocks of 0"),
        ({"block": 128, "segment": 200}, r"segment of 200 tokens"),
        ({"block": 128, "segment": 64}, r"segment of 64 tokens"),
        ({"scores": "max"}, r"scores 'max'"),
        ({"scores": "antidiagonal", "block": 12, "segment": 24}, r"multiple of 8 tokens, which 12"),
    ],
)
def test_rules_that_cannot_be_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Rule(**options)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k[:, :, :30], v[:, :, :30]),
        lambda q, k, v: (q, k, v[..., :4]),
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q, k.float(), v),
        lambda q, k, v: (q, k, v.to("meta")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="are to be"):
        pbs_attention(*wrong(*problem(40)), Rule(**SMALL))
    with pytest.raises(ValueError, match="Unknown backend 'magic'"):
        pbs_attention(*problem(40), Rule(**SMALL), backend="magic")


def run_triton(device, outputs, *words, **environment):
    """The script in a process of its own: one cannot both interpret and compile."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_pbs_attention.py")
    done = subprocess.run(
        [sys.executable, script, device, *words], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{outputs} outputs agree"


def test_the_triton_kernel_computes_the_reference_in_the_interpreter():
    run_triton("cpu", 6, TRITON_INTERPRET="1")


@pytest.mark.complete
def test_the_triton_kernel_finds_its_blocks_in_long_prompts():
    run_triton("cpu", 1, "long", TRITON_INTERPRET="1")


@pytest.mark.needs_cuda
def test_the_triton_kernel_computes_the_reference_on_cuda():
    run_triton("cuda", 9, TRITON_INTERPRET="0")


@pytest.fixture
def launches(tmp_path, monkeypatch):
    """The Triton kernel of a target's configuration, recorded or emulated."""
    pytest.importorskip("triton")
    from launches import Launches

    from llmprune.kernels import pbs_attention_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def prepare(gpu, *, run):
        found = Launches(pbs_attention_triton.forward, run=run)
        monkeypatch.setattr(pbs_attention_triton, "forward", found)
        monkeypatch.setattr(pbs_attention_triton, "_gpu", lambda device: gpu)
        return found.launches

    return prepare


GPUS = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "wgmma", "sm_120": "mma", "gfx942": "amd"}
OPCODES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
# The widths of heads that models have, and on the two GPUs with least room every dtype.
COMPILED = [
    *((target, torch.bfloat16, 128) for target in GPUS),
    *(
        (target, dtype, width)
        for target in ("sm_80", "gfx942")
        for dtype, width in ((torch.float16, 64), (torch.bfloat16, 96), (torch.bfloat16, 256), (torch.float32, 128))
    ),
]


@pytest.mark.complete
@pytest.mark.parametrize(("target", "dtype", "width"), COMPILED, ids=str)
def test_the_triton_kernel_compiles_for_tensor_cores_without_spills(target, dtype, width, launches):
    from aot import SHARED

    recorded = launches(GPUS[target], run=False)
    query, key, value = problem(512, dtype=dtype, width=width, batch=1)
    pbs_attention(query, key, value, Rule(), backend="triton")
    (launch,) = recorded
    compiled = launch.compile(target)
    assert compiled.spills == 0
    assert compiled.shared <= SHARED[target]
    if dtype != torch.float32:
        assert sum(count for name, count in compiled.opcodes.items() if name.startswith(OPCODES[target]))
    assert compiled.loads["dwordx4" if target.startswith("gfx") else "v4.b32"] or "cp.async" in compiled.ptx


@pytest.mark.complete
def test_the_compiled_kernel_computes_the_reference_in_bfloat16_and_reads_no_block_that_is_not_kept(launches):
    recorded = launches("mma", run=True)
    query, key, value = problem(200, dtype=torch.bfloat16, heads=2, kv=1, width=64, batch=1)
    rule = Rule(0.3, block=64, segment=64)
    selection = select(query, key, rule)
    kept_BHTT = selection.kept_BHTT.clone()
    kept_BHTT[..., 2:, 1] = False
    selection = Selection(selection.order_BPN, kept_BHTT)
    expected = reference(query.double(), key.double(), value.double(), selection, rule)
    poisoned = selection.order_BPN[0, 0, 64:128]
    key[:, :, poisoned] = value[:, :, poisoned] = torch.nan
    out = attend(query, key, value, selection, rule, backend="triton")
    assert distance(out[:, :, :64], expected[:, :, :64]) < 5e-3
    assert distance(out[:, :, 128:], expected[:, :, 128:]) < 5e-3
    # Every tile of queries reads the rows of its kept blocks, and each of them once.
    tiles = 64 // recorded[0].constants["ROWS"]
    own = torch.tensor([64, 64, 64, 8])
    rows = int(((kept_BHTT & earlier_blocks(200, rule)).sum(dim=-1) * 64 + own).sum()) * tiles
    assert recorded[0].fetched["key_ptr"] == recorded[0].fetched["value_ptr"] == rows * 64 * 2

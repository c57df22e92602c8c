"""The supernet: its counts in whole units, its files, what it lets later blocks see, and its candidates as real models."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from cutting import cut
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, build
from transformers import AutoModelForCausalLM

from llmprune.anatomy import Anatomy, Cut, Kept, Sizes, anatomy
from llmprune.errors import LLMPruneError
from llmprune.models import Skeleton
from llmprune.ranks import Ranks
from llmprune.supernet import READER, Position, Shrunk, Supernet

GROUPS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}
# Families, biases, norms of queries and keys; heads that go by KV group, or one of every group.
CASES = {
    "llama": ("llama", GROUPS, "kv_group"),
    "llama tied, balanced": ("llama_tied", GROUPS, "q_balanced"),
    "llama, one KV head": ("llama", {}, "kv_group"),
    "llama, one KV head, balanced": ("llama", {}, "q_balanced"),
    "llama, biases everywhere": ("llama", {**GROUPS, "attention_bias": True, "mlp_bias": True}, "kv_group"),
    "llama, biases everywhere, balanced": ("llama", {**GROUPS, "attention_bias": True, "mlp_bias": True}, "q_balanced"),
    "mistral": ("mistral", GROUPS, "kv_group"),
    "qwen2": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3}, "kv_group"),
    "qwen3": ("qwen3", {**GROUPS, "attention_bias": True}, "kv_group"),
    "qwen3, balanced": ("qwen3", GROUPS, "q_balanced"),
}
STEP = {"attention": 1, "mlp": 13}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(inputs, seed=0):
    inputs_TI = noise(3 * inputs, inputs, seed=seed)
    return inputs_TI.T @ inputs_TI


def sub_layers(bodies, heads, multiple=1):
    return [
        Position.of(bodies, block, sublayer, heads=heads, multiple=multiple)
        for block in range(len(bodies.blocks))
        for sublayer in READER
    ]


def supernet_of(skeleton, positions, folder, *, levels=9):
    """Every position at levels around half its units."""
    centre = [position.units // 2 for position in positions]
    supernet = Supernet(folder, 0, positions, centre, [STEP[position.sublayer] for position in positions], levels)
    folder.mkdir(exist_ok=True)
    for number, position in enumerate(positions):
        linear = reader(skeleton, position)
        weight_OI = skeleton.checkpoint.read(f"{linear.name}.weight").float()
        counts = [supernet.kept_units(number, level) for level in supernet.levels(number)]
        made = position.eliminate(weight_OI, hessian(linear.shape[1], number), counts, first_order="abs", step=16)
        supernet.write(number, list(made), skeleton.checkpoint.entries[f"{linear.name}.weight"].dtype)
    return supernet


def reader(skeleton, position):
    return next(each for each in skeleton.linears[position.block] if each.role == READER[position.sublayer])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model of a case: its directory, skeleton and supernet."""
    made = {}

    def of(case):
        if case not in made:
            variant, changes, heads = CASES[case]
            folder = build(variant, tmp_path_factory.mktemp(variant), **changes)
            skeleton = Skeleton(folder)
            positions = sub_layers(anatomy(skeleton.config), heads)
            made[case] = folder, skeleton, supernet_of(skeleton, positions, folder / "supernet")
        return made[case]

    return of


# Counting -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 400), st.sampled_from([1, 3, 16, 128]), st.sampled_from([(8, 8), (8, 2), (6, 3), (5, 1)]), st.integers(1, 9)
)
def test_units_are_whole_and_account_for_every_input(channels, multiple, heads, head_dim):
    bodies = Anatomy("llama", 24, head_dim, (Sizes(channels, *heads),), {"mlp.down_proj": Cut(None, "channel")})
    mlp = Position.of(bodies, 0, "mlp", heads="kv_group", multiple=multiple)
    assert mlp.units * mlp.inputs + mlp.rest == channels
    assert 0 <= mlp.rest < multiple
    for mode in ("kv_group", "q_balanced"):
        attention = Position.of(bodies, 0, "attention", heads=mode, multiple=multiple)
        assert attention.units * attention.inputs * attention.balance == heads[0] * head_dim
        assert attention.rest == 0


@given(st.integers(1, 50), st.data())
def test_levels_keep_a_whole_number_of_units_and_the_centre_is_one_of_them(units, data):
    position = Position(0, "mlp", units, 16, 1, 0, 1, 0)
    kept, step = data.draw(st.integers(0, units)), data.draw(st.integers(1, units))
    supernet = Supernet("nowhere", 0, [position], [kept], [step], data.draw(st.sampled_from([3, 5, 9])))
    counts = [supernet.kept_units(0, level) for level in supernet.levels(0)]
    assert supernet.kept_units(0, 0) == kept
    assert kept in counts
    assert all(0 <= count <= units for count in counts)
    assert counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("heads", ["kv_group", "q_balanced"])
def test_levels_are_nested_and_as_wide_as_they_say(models, heads):
    _, _, supernet = models("llama" if heads == "kv_group" else "qwen3, balanced")
    for number, position in enumerate(supernet.positions):
        before = set(range(10**4))
        for level in supernet.levels(number):
            kept, weight_OK = supernet.read(number, level)
            units = supernet.kept_units(number, level)
            if position.sublayer == "mlp":
                assert len(kept) == units
            elif heads == "kv_group":
                assert Counter(head // 2 for head in kept) == dict.fromkeys({head // 2 for head in kept}, 2)
                assert len(kept) == 2 * units
            else:
                assert Counter(head // 2 for head in kept) == (dict.fromkeys(range(3), units) if units else {})
            assert list(kept) == sorted(kept)
            assert set(kept) <= before
            assert weight_OK.shape == (36, len(position.columns(kept, 12)))
            before = set(kept)


@pytest.mark.parametrize("multiple", [16, 20])
def test_channels_beyond_the_last_whole_unit_go_before_any_unit_does(multiple):
    bodies = Anatomy("llama", 24, 4, (Sizes(HIDDEN, 2, 2),), {"mlp.down_proj": Cut(None, "channel")})
    position = Position.of(bodies, 0, "mlp", heads="kv_group", multiple=multiple)
    counts = range(position.units, -1, -1)
    made = position.eliminate(noise(24, HIDDEN), hessian(HIDDEN), counts, first_order="off", step=4)
    assert [len(kept) for kept, _ in made] == [multiple * count for count in counts]


# Files --------------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path):
    position = Position(0, "mlp", 3, 2, 1, 0, 1, 0)
    supernet = Supernet(tmp_path, 0, [position], [2], [1], 9)
    levels = [(tuple(range(2 * count)), noise(5, 2 * count, seed=count)) for count in (3, 2, 1, 0)]
    supernet.write(0, levels, torch.bfloat16)
    for level, (kept, weight_OK) in zip(supernet.levels(0), levels, strict=True):
        found, stored = supernet.read(0, level)
        assert found == kept
        assert torch.equal(stored, weight_OK.bfloat16())


def test_a_supernet_holds_the_kept_columns_and_nothing_of_the_others(models):
    _, skeleton, supernet = models("llama")
    for number, position in enumerate(supernet.positions):
        entire = 4 * reader(skeleton, position).numel
        density = sum(supernet.kept_units(number, level) / position.units for level in supernet.levels(number))
        assert supernet.file(number).stat().st_size == pytest.approx(density * entire, abs=4000)


def test_a_level_of_another_search_is_refused(models, tmp_path):
    _, _, supernet = models("llama")
    shutil.copytree(supernet.folder, tmp_path / "copy")
    wider = Supernet(tmp_path / "copy", 0, supernet.positions, supernet.centre, [1] * len(supernet.steps), 99)
    with pytest.raises(LLMPruneError, match="from another search: pass --overwrite"):
        wider.read(1, wider.levels(1)[-1])


def test_only_the_present_iteration_has_files(tmp_path):
    position = Position(0, "mlp", 2, 2, 1, 0, 1, 0)
    first, second = (Supernet(tmp_path, iteration, [position], [1], [1], 3) for iteration in (0, 1))
    levels = [((0, 1, 2, 3), noise(3, 4)), ((0, 1), noise(3, 2)), ((), noise(3, 0))]
    first.write(0, levels, torch.float32)
    second.write(0, levels, torch.float32)
    second.remove_others()
    assert [file.name for file in tmp_path.iterdir()] == [second.file(0).name]
    second.remove()
    assert not list(tmp_path.iterdir())


# What later blocks see ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "qwen3, balanced"])
@pytest.mark.parametrize("accumulate", ["expectation", "uniform", "center"])
def test_the_mean_of_weights_gives_the_mean_of_outputs(models, case, accumulate):
    _, skeleton, supernet = models(case)
    for number, position in enumerate(supernet.positions[:2]):
        linear = reader(skeleton, position)
        inputs_TI = noise(20, linear.shape[1], seed=7).double()
        wanted_TO, total = torch.zeros(20, linear.shape[0], dtype=torch.float64), 0.0
        for level in supernet.levels(number):
            kept, weight_OK = supernet.read(number, level)
            share = {"expectation": len(kept), "uniform": 1, "center": level == 0}[accumulate]
            wanted_TO += share * (inputs_TI[:, position.columns(kept, 12)] @ weight_OK.double().T)
            total += share
        expected_OI = supernet.expected(number, linear, 12, accumulate)
        torch.testing.assert_close(inputs_TI @ expected_OI.double().T, wanted_TO / total, rtol=1e-5, atol=1e-5)


def test_the_centre_is_level_0_and_not_the_dense_model(models):
    _, skeleton, supernet = models("llama")
    for number, position in enumerate(supernet.positions):
        linear = reader(skeleton, position)
        kept, weight_OK = supernet.read(number, 0)
        expected_OI = supernet.expected(number, linear, 12, "center")
        columns = position.columns(kept, 12)
        assert torch.equal(expected_OI[:, columns], weight_OK)
        assert torch.count_nonzero(expected_OI) <= weight_OK.numel()
        assert not torch.allclose(expected_OI, skeleton.checkpoint.read(f"{linear.name}.weight"), atol=0.1)


def test_a_sub_layer_whose_levels_keep_nothing_is_expected_to_do_nothing(models, tmp_path):
    _, skeleton, supernet = models("llama")
    position = supernet.positions[0]
    alone = Supernet(tmp_path, 0, [position], [0], [position.units + 1], 3)
    alone.write(0, [((), torch.zeros(36, 0))], torch.float32)
    for accumulate in ("expectation", "uniform", "center"):
        assert not alone.expected(0, reader(skeleton, position), 12, accumulate).any()


# Candidates -----------------------------------------------------------------------------------------------------------


def windows(count=16, tokens=20):
    return torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(1))


def draw(supernet, source):
    return tuple(source.choice(supernet.levels(number)) for number in range(len(supernet.positions)))


def written(folder, supernet, candidate, out, heads, format):
    """The model that a candidate would be written as, by way of the dense one with its weights."""
    positions, tensors = supernet.positions, load_file(folder / "model.safetensors")
    bodies = anatomy(Skeleton(folder).config)
    kept_B = [sizes.everything() for sizes in bodies.blocks]
    for number, (position, level) in enumerate(zip(positions, candidate, strict=True)):
        kept, weight_OK = supernet.read(number, level)
        name = f"model.layers.{position.block}." + ("self_attn.o" if position.group else "mlp.down") + "_proj.weight"
        tensors[name] = torch.zeros_like(tensors[name])
        tensors[name][:, position.columns(kept, bodies.head_dim)] = weight_OK
        own = kept_B[position.block]
        kept_B[position.block] = Kept(own.channels, kept) if position.group else Kept(kept, own.heads)
    source = out / "source"
    source.mkdir(parents=True)
    shutil.copy(folder / "config.json", source)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    cut(source, kept_B, out / format, heads_mode=heads, format=format)
    return AutoModelForCausalLM.from_pretrained(out / format, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_candidate_is_the_model_that_would_be_written_and_the_masked_dense_one(models, tmp_path, case):
    folder, skeleton, supernet = models(case)
    ids_NT, source = windows(), random.Random(0)
    ends = [tuple(levels[-1] for levels in map(supernet.levels, range(len(supernet.positions))))]
    candidates = Shrunk(skeleton, ids_NT, supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    with candidates.resident():
        for number, candidate in enumerate([*(draw(supernet, source) for _ in range(2)), *ends]):
            candidates.become(candidate)
            found = candidates.logits(3)
            for format in ("auto", "masked"):
                model = written(folder, supernet, candidate, tmp_path / f"{number}{format}", CASES[case][2], format)
                with torch.no_grad():
                    wanted = model(candidates.ids_WT[3:4]).logits[0]
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["llama, biases everywhere, balanced", "llama tied, balanced", "qwen3"])
def test_back_at_the_dense_model_its_logits_are_the_same_bits(models, case):
    folder, skeleton, supernet = models(case)
    ids_NT, source = windows(), random.Random(1)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    candidates = Shrunk(skeleton, ids_NT, supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    with candidates.resident():
        before = candidates.logits(0)
        for _ in range(3):
            candidates.become(draw(supernet, source))
            assert not torch.equal(candidates.logits(0), before)
            assert torch.equal(candidates._dense_logits(0), before)
        candidates.become(draw(supernet, source))
    with torch.no_grad():
        assert torch.equal(stock(candidates.ids_WT[:1]).logits[0], before)
    # Once more, after everything was put away in the middle of a candidate.
    again = Shrunk(skeleton, ids_NT, supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    with again.resident():
        assert torch.equal(again.logits(0), before)


def test_the_way_to_a_candidate_does_not_matter(models):
    _, skeleton, supernet = models("llama")
    source = random.Random(2)
    one, other = draw(supernet, source), draw(supernet, source)
    candidates = Shrunk(skeleton, windows(), supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    with candidates.resident():
        candidates.become(one)
        direct = candidates.logits(0)
        candidates.become(other)
        candidates.become(one)
        assert torch.equal(candidates.logits(0), direct)


def test_a_candidate_is_really_smaller(models):
    _, skeleton, supernet = models("llama")
    candidates = Shrunk(skeleton, windows(), supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    with candidates.resident():
        dense = sum(parameter.numel() for parameter in skeleton.model.parameters())
        candidates.become((0,) * len(supernet.positions))
        small = sum(parameter.numel() for parameter in skeleton.model.parameters())
        gone = sum(
            position.cost * (position.units - kept) for position, kept in zip(supernet.positions, supernet.centre, strict=True)
        )
    assert dense - small == gone > 0


def test_a_checkpoint_in_bfloat16_is_evaluated_in_float32(tmp_path):
    folder = build("llama", tmp_path / "model", dtype=torch.bfloat16, **GROUPS)
    skeleton = Skeleton(folder)
    supernet = supernet_of(skeleton, sub_layers(anatomy(skeleton.config), "kv_group"), tmp_path / "supernet", levels=3)
    candidates = Shrunk(skeleton, windows(), supernet, anatomy(skeleton.config), top_k=10, ranks=Ranks())
    centre = (0,) * len(supernet.positions)
    with candidates.resident():
        candidates.become(centre)
        found = candidates.logits(0)
        model = written(folder, supernet, centre, tmp_path / "out", "kv_group", "auto")
        with torch.no_grad():
            wanted = model(candidates.ids_WT[:1]).logits[0]
    assert json.loads((tmp_path / "out" / "auto" / "config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)

"""A plan and its applications agree: masked, shrunk, expanded and padded tensors, parameter counts, config.json."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLOCKS, VARIANTS, build
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import LLMPruneError
from llmprune.surgery import Anatomy, Kept, Plan, Sizes, anatomy, config_json, expand, mask, pad, shrink

LLAMA_LIKE = ["llama", "mistral", "qwen2", "qwen3"]
HIDDEN, HEAD_DIM = 8, 2


def config_of(family: str = "llama", **changes: object):
    """A configuration of three blocks with 5 channels and 4 query heads in 2 KV groups."""
    sizes: dict[str, object] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 5,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": 11,
    }
    return AutoConfig.for_model(family, **{**sizes, **changes})


def random_block(body: Anatomy, block: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(block)
    shapes = body.shapes(body.blocks[block]) | {"untouched.weight": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def kept_of(channels, heads) -> Kept:
    return Kept(tuple(channels), tuple(heads))


@st.composite
def bodies_and_kept(draw) -> tuple[Anatomy, Kept, str]:
    """Any family that can be cut, any sizes, any legal choice of what stays."""
    family = draw(st.sampled_from(LLAMA_LIKE))
    kv_heads, group, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    biases: dict[str, object] = {}
    if family == "llama":
        biases["mlp_bias"] = draw(st.booleans())
    if family in ("llama", "qwen3"):
        biases["attention_bias"] = draw(st.booleans())
    hidden = 6 * HIDDEN * 3  # a multiple of every number of heads
    body = anatomy(
        config_of(
            family,
            hidden_size=hidden,
            intermediate_size=channels,
            num_attention_heads=kv_heads * group,
            num_key_value_heads=kv_heads,
            **biases,
        )
    )
    mode = draw(st.sampled_from(["kv_group", "q_balanced"]))
    if mode == "kv_group":
        groups = draw(st.sets(st.integers(0, kv_heads - 1)))
        heads = sorted(g * group + i for g in groups for i in range(group))
    else:
        count = draw(st.integers(0, group))
        order = draw(st.lists(st.permutations(range(group)), min_size=kv_heads, max_size=kv_heads))
        heads = sorted(g * group + i for g in range(kv_heads) for i in order[g][:count])
    return body, kept_of(sorted(draw(st.sets(st.integers(0, channels - 1)))), heads), mode


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_the_model(variant):
    model_type, options = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **options)
    with torch.device("meta"):
        block = AutoModelForCausalLM.from_config(config).get_submodule(BLOCKS[model_type])[1]
    body = anatomy(config)
    found = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    shapes = body.shapes(body.blocks[1])
    assert shapes.items() <= found.items()
    assert all("norm" in name or "ln_" in name for name in found.keys() - shapes.keys())


def masked_by_loops(tensors, kept: Kept, body: Anatomy):
    """What goes, one unit after another."""
    sizes, size = body.blocks[0], body.head_dim
    masked = {name: tensor.clone() for name, tensor in tensors.items()}

    def zero(linear, rows=None, columns=None):
        if rows is not None:
            masked[f"{linear}.weight"][rows] = 0
            if f"{linear}.bias" in masked:
                masked[f"{linear}.bias"][rows] = 0
        else:
            masked[f"{linear}.weight"][:, columns] = 0

    for channel in set(range(sizes.channels)) - set(kept.channels):
        zero("mlp.gate_proj", rows=channel)
        zero("mlp.up_proj", rows=channel)
        zero("mlp.down_proj", columns=channel)
    for head in set(range(sizes.heads)) - set(kept.heads):
        zero("self_attn.q_proj", rows=slice(head * size, (head + 1) * size))
        zero("self_attn.o_proj", columns=slice(head * size, (head + 1) * size))
    for kv_head in range(sizes.kv_heads):
        if not any(head // sizes.group == kv_head for head in kept.heads):
            zero("self_attn.k_proj", rows=slice(kv_head * size, (kv_head + 1) * size))
            zero("self_attn.v_proj", rows=slice(kv_head * size, (kv_head + 1) * size))
    if not kept.heads and "self_attn.o_proj.bias" not in masked:
        for name in masked:
            if name.startswith(("self_attn", "input_layernorm")):
                masked[name].zero_()
    if not kept.channels and "mlp.down_proj.bias" not in masked:
        masked["post_attention_layernorm.weight"].zero_()
    return masked


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@given(bodies_and_kept())
@settings(deadline=None, max_examples=60)
def test_mask_zeroes_what_goes_and_nothing_else(case):
    body, kept, _ = case
    tensors = random_block(body)
    assert_same(mask(tensors, kept, body, 0), masked_by_loops(tensors, kept, body))


@given(bodies_and_kept())
@settings(deadline=None, max_examples=60)
def test_expanding_the_shrunk_block_gives_the_masked_one(case):
    body, kept, _ = case
    tensors = random_block(body)
    assert_same(expand(shrink(tensors, kept, body, 0), kept, body, 0), mask(tensors, kept, body, 0))


@given(bodies_and_kept())
@settings(deadline=None, max_examples=60)
def test_the_shrunk_block_has_the_shapes_and_the_parameters_that_are_counted(case):
    body, kept, mode = case
    shrunk = shrink(random_block(body), kept, body, 0)
    del shrunk["untouched.weight"]
    sizes = body.stored_sizes(kept, 0)
    assert {name: tuple(tensor.shape) for name, tensor in shrunk.items()} == body.shapes(sizes)
    assert all(tensor.is_contiguous() for tensor in shrunk.values())
    # In closed form: so much a unit, and what a sub-layer has of its own as long as it is there.
    units = {"kv_group": sizes.kv_heads, "q_balanced": sizes.group}[mode]
    fixed = body.parameters(body.blocks[0]) - body.channel_cost * body.blocks[0].channels
    fixed -= body.head_cost(0, mode) * body.head_units(0, mode)
    if kept.channels and kept.heads:
        assert body.parameters(sizes) == fixed + body.channel_cost * sizes.channels + body.head_cost(0, mode) * units


@given(bodies_and_kept())
@settings(deadline=None, max_examples=40)
def test_padding_adds_zero_units_after_those_that_stay(case):
    body, kept, mode = case
    everything = body.blocks[0].everything()
    plan = Plan.of(body, [kept, everything, kept], parent="p", heads_mode=mode, method="m")
    to = plan.padded(body)
    tensors = random_block(body)
    padded = pad(tensors, kept, body, 0, to)
    assert {name: tuple(tensor.shape) for name, tensor in padded.items() if name != "untouched.weight"} == body.shapes(to)
    rows = len(kept.channels)
    assert torch.equal(padded["mlp.up_proj.weight"][:rows], tensors["mlp.up_proj.weight"][list(kept.channels)])
    assert not padded["mlp.up_proj.weight"][rows:].any()
    assert not padded["mlp.down_proj.weight"][:, rows:].any()
    assert int((padded["self_attn.o_proj.weight"] != 0).sum()) == len(kept.heads) * body.head_dim * body.hidden


def test_the_cost_of_a_unit_is_what_one_unit_less_saves():
    body = anatomy(config_of("qwen2"))
    # gate, up, down; then q, k, v with biases and o.
    assert body.channel_cost == 3 * HIDDEN
    assert body.head_cost(0, "kv_group") == 2 * (2 * HIDDEN * HEAD_DIM + HEAD_DIM) + 2 * (HIDDEN * HEAD_DIM + HEAD_DIM)
    assert body.head_cost(0, "q_balanced") == 2 * (2 * HIDDEN * HEAD_DIM + HEAD_DIM)


def test_zeros_are_positive_whatever_was_there():
    body = anatomy(config_of())
    tensors = {name: torch.full_like(tensor, -0.0) for name, tensor in random_block(body).items()}
    tensors["mlp.up_proj.weight"][0] = float("nan")
    masked = mask(tensors, kept_of([1], [0, 1]), body, 0)
    assert not torch.signbit(masked["mlp.up_proj.weight"][0]).any()
    assert torch.equal(masked["mlp.up_proj.weight"][0], torch.zeros(HIDDEN))
    assert torch.signbit(masked["mlp.up_proj.weight"][1]).all()


def test_keeping_everything_changes_nothing():
    body = anatomy(config_of())
    tensors = random_block(body)
    everything = body.blocks[0].everything()
    assert_same(mask(tensors, everything, body, 0), tensors)
    assert_same(shrink(tensors, everything, body, 0), tensors)


def test_shrunk_tensors_hold_none_of_the_original_memory():
    body = anatomy(config_of())
    tensors = random_block(body)
    shrunk = shrink(tensors, body.blocks[0].everything(), body, 0)
    assert not {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in shrunk.values()}


def test_a_sublayer_whose_output_has_a_bias_keeps_one_zero_unit_for_it():
    body = anatomy(config_of("llama", mlp_bias=True, attention_bias=True))
    shrunk = shrink(random_block(body), kept_of([], []), body, 0)
    assert body.stored_sizes(kept_of([], []), 0) == Sizes(1, 2, 1)
    assert not shrunk["mlp.down_proj.weight"].any()
    assert not shrunk["self_attn.o_proj.weight"].any()
    assert torch.equal(shrunk["mlp.down_proj.bias"], random_block(body)["mlp.down_proj.bias"])


def test_a_block_that_is_gone_altogether_expands_to_zeros_of_the_dtype_given():
    body = anatomy(config_of())
    expanded = expand({}, kept_of([], []), body, 0, dtype=torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in expanded.items()} == body.shapes(body.blocks[0])
    assert all(tensor.dtype == torch.bfloat16 and not tensor.any() for tensor in expanded.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_masked_block_computes_what_the_dense_one_does_without_those_units(variant, tmp_path):
    """The reference: zeros put into the inputs of o and down of the dense model while it runs."""
    model = AutoModelForCausalLM.from_pretrained(build(variant, tmp_path)).eval()
    body = anatomy(model.config)
    sizes = body.blocks[1]
    group = sizes.group
    # Where there is one KV head only, its heads go or stay together.
    heads = tuple(range(sizes.heads)) if sizes.kv_heads == 1 else tuple(range(group, 2 * group))
    kept = kept_of([0, 3, 7, 50, 51], heads)
    block = model.get_submodule(BLOCKS[model.config.model_type])[1]
    down = next(name for name, linear in body.linears.items() if linear.into == "channel")
    output = next(name for name, linear in body.linears.items() if linear.into == "head")

    def without(keep):
        def hook(module, args):
            return (torch.where(keep, args[0], 0.0),)

        return hook

    keep_channels = torch.zeros(sizes.channels, dtype=torch.bool)
    keep_channels[list(kept.channels)] = True
    keep_heads = torch.zeros(sizes.heads, body.head_dim, dtype=torch.bool)
    keep_heads[list(kept.heads)] = True
    hooks = [
        block.get_submodule(down).register_forward_pre_hook(without(keep_channels)),
        block.get_submodule(output).register_forward_pre_hook(without(keep_heads.flatten())),
    ]
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        dense = model(ids).logits
        tensors = {name: parameter.data for name, parameter in block.named_parameters()}
        for name, tensor in mask(tensors, kept, body, 1).items():
            block.get_parameter(name).data.copy_(tensor)
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(dense, expected, rtol=1e-2)


def plan_of(*kept: Kept, mode="kv_group", family="llama", **changes) -> Plan:
    body = anatomy(config_of(family, num_hidden_layers=len(kept), **changes))
    return Plan.of(body, kept, parent="abc", heads_mode=mode, method="cfsp")


@given(bodies_and_kept())
@settings(deadline=None, max_examples=30)
def test_a_plan_survives_json(case):
    body, kept, mode = case
    plan = Plan.of(body, [kept] * 3, parent="abc", heads_mode=mode, method="tyr")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("kept", "mode", "words"),
    [
        (kept_of([1, 0], []), "kv_group", "ascending"),
        (kept_of([0, 0], []), "kv_group", "ascending"),
        (kept_of([5], []), "kv_group", "which has 5"),
        (kept_of([-1], []), "kv_group", "which has 5"),
        (kept_of([], [4]), "kv_group", "which has 4"),
        (kept_of([], [0]), "kv_group", "part of a KV group of 2"),
        (kept_of([], [0, 2]), "kv_group", "part of a KV group of 2"),
        (kept_of([], [0, 1]), "q_balanced", "0 query heads of one KV group and 2 of another"),
        (kept_of([], [0, 2, 3]), "q_balanced", "1 query heads of one KV group and 2 of another"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_sentence(kept, mode, words):
    with pytest.raises(LLMPruneError, match=words):
        plan_of(kept, mode=mode)
    text = json.loads(plan_of(kept_of([0], [0, 1, 2, 3]), mode=mode).to_json())
    text["blocks"][0] = {"channels": kept.channels, "heads": kept.heads}
    with pytest.raises(LLMPruneError, match=words) as caught:
        Plan.from_json(json.dumps(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"parent"', '"mother"'),
        lambda text: text.replace('"kv_group"', '"q_free"'),
        lambda text: text.replace('"channels":[0]', '"channels":["zero"]'),
        lambda text: text.replace('"blocks":[', '"blocks":[{"channels":[],"heads":[]},'),
    ],
)
def test_a_damaged_plan_is_refused_in_one_sentence(damage):
    text = plan_of(kept_of([0], [0, 1])).to_json()
    assert damage(text) != text
    with pytest.raises(LLMPruneError, match="make it anew") as caught:
        Plan.from_json(damage(text))
    assert "\n" not in str(caught.value)


def test_a_plan_for_another_model_is_refused():
    plan = plan_of(kept_of([0], [0, 1]))
    body = anatomy(config_of(num_hidden_layers=1))
    plan.check(body, "abc")
    with pytest.raises(LLMPruneError, match="another model of the same sizes"):
        plan.check(body, "abd")
    for other in (
        config_of(num_hidden_layers=2),
        config_of("qwen3", num_hidden_layers=1),
        config_of(num_hidden_layers=1, head_dim=4),
    ):
        with pytest.raises(LLMPruneError, match="give the model that it was made for"):
            plan.check(anatomy(other), "abc")


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("heads", [2, 4])
def test_blocks_that_are_all_alike_need_no_class_of_ours(family, heads):
    plan = plan_of(*[kept_of([0, i + 1], range(heads)) for i in range(3)], family=family)
    content, needs_file = config_json(config_of(family).to_dict(), plan, anatomy(config_of(family)))
    assert not needs_file
    assert not {"auto_map", "per_layer_config"} & content.keys()
    assert (content["model_type"], content["intermediate_size"], content["head_dim"]) == (family, 2, HEAD_DIM)
    assert (content["num_attention_heads"], content["num_key_value_heads"]) == (heads, heads // 2)
    AutoConfig.for_model(**content)


@pytest.mark.parametrize("family", LLAMA_LIKE)
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_our_class_is_taken_exactly_where_the_stock_configuration_refuses_the_heads(family, heads):
    config = config_of(family, num_attention_heads=8, num_key_value_heads=8)
    plan = plan_of(kept_of([0], range(heads)), family=family, num_attention_heads=8, num_key_value_heads=8)
    content, needs_file = config_json(config.to_dict(), plan, anatomy(config_of(family, num_hidden_layers=1)))
    try:
        config_of(family, num_attention_heads=heads, num_key_value_heads=heads)
        accepted = True
    except Exception:  # huggingface_hub's own kind
        accepted = False
    assert needs_file != accepted
    assert content["num_attention_heads"] == heads


def test_other_blocks_are_named_where_they_differ_from_the_widest():
    plan = plan_of(kept_of([0], [0, 1]), kept_of([], range(4)), kept_of([0, 2], []))
    content, needs_file = config_json(config_of().to_dict(), plan, anatomy(config_of()))
    assert needs_file
    assert content["per_layer_config"] == {
        "0": {"intermediate_size": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        "1": {"skip": ["mlp"]},
        "2": {"skip": ["attention"]},
    }
    assert (content["intermediate_size"], content["num_attention_heads"], content["num_key_value_heads"]) == (2, 4, 2)
    assert content["model_type"] == "llmprune_llama"
    assert content["architectures"] == ["LLMPruneLlamaForCausalLM"]
    assert set(content["auto_map"].values()) == {
        "modeling_llmprune.LLMPruneLlamaConfig",
        "modeling_llmprune.LLMPruneLlamaForCausalLM",
    }


def test_the_original_configuration_is_left_as_it_is():
    original = config_of().to_dict()
    before = json.dumps(original, default=str)
    for format in ("auto", "padded", "masked"):
        config_json(original, plan_of(*[kept_of([0], [0, 1])] * 3), anatomy(config_of()), format)
    assert json.dumps(original, default=str) == before


def test_sizes_of_a_model_that_has_been_cut_are_those_of_each_block():
    plan = plan_of(kept_of([0], [0, 1]), kept_of([], range(4)), kept_of([0, 2], []))
    content, _ = config_json(config_of().to_dict(), plan, anatomy(config_of()))
    again = anatomy(AutoConfig.for_model(**content))
    assert again.family == "llama"
    assert again.blocks == (Sizes(1, 2, 1), Sizes(0, 4, 2), Sizes(2, 0, 0))


@pytest.mark.parametrize("mode", ["kv_group", "q_balanced"])
def test_padded_heads_are_the_fewest_that_hold_every_block_and_divide_the_hidden_size(mode):
    # 12 heads in 6 groups of 2, hidden size 24: 10 heads do not divide it, 12 do.
    sizes = {"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 6}
    heads = range(10) if mode == "kv_group" else range(0, 12, 2)
    llama = plan_of(kept_of([0, 1], heads), kept_of([], []), mode=mode, **sizes)
    mistral = plan_of(kept_of([0, 1], heads), kept_of([], []), mode=mode, family="mistral", **sizes)
    found = llama.padded(anatomy(config_of(num_hidden_layers=2, **sizes)))
    assert found == (Sizes(2, 12, 6) if mode == "kv_group" else Sizes(2, 6, 6))
    narrow = mistral.padded(anatomy(config_of("mistral", num_hidden_layers=2, **sizes)))
    assert narrow == (Sizes(2, 10, 5) if mode == "kv_group" else Sizes(2, 6, 6))


def test_padding_that_no_stock_class_takes_is_refused():
    body = anatomy(config_of("llmprune_llama", hidden_size=9))
    plan = Plan.of(body, [kept_of([0], [0, 1])] * 3, parent="p", method="m")
    with pytest.raises(LLMPruneError, match="leave out --format padded"):
        config_json({}, plan, body, "padded")


@pytest.mark.parametrize("variant", ["gemma2", "phi3", "opt", "gpt_neox", "gpt2"])
def test_a_family_without_classes_of_ours_is_named_and_offered_masks(variant):
    model_type, options = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **options)
    body = anatomy(config)
    plan = Plan.of(body, [sizes.everything() for sizes in body.blocks], parent="p", method="m")
    for format in ("auto", "padded"):
        with pytest.raises(LLMPruneError, match=f"{model_type}.*--format masked"):
            config_json(config.to_dict(), plan, body, format)
    assert config_json(config.to_dict(), plan, body, "masked") == (config.to_dict(), False)


def test_an_unknown_family_is_named():
    with pytest.raises(LLMPruneError, match="bloom"):
        anatomy(AutoConfig.for_model("bloom", n_layer=1, n_head=2, hidden_size=8))


def test_a_bias_on_down_needs_our_class_and_a_slot_in_it():
    body = anatomy(config_of("qwen3")).with_down_bias()
    plan = plan_of(*[kept_of([0], range(4))] * 3, family="qwen3")
    content, needs_file = config_json(config_of("qwen3").to_dict(), plan, body)
    assert needs_file
    assert anatomy(AutoConfig.for_model(**content)).shapes(Sizes(1, 4, 2)) == body.shapes(Sizes(1, 4, 2))
    assert config_json(config_of("qwen3").to_dict(), plan, body, "masked")[1]
    with pytest.raises(LLMPruneError, match="no bias"):
        config_json(config_of("qwen3").to_dict(), plan, body, "padded")

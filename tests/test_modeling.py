"""Models of blocks with different widths are the masked dense model, whatever is done with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cutting import anatomy_of, cut
from safetensors.torch import load_file, save_file
from tiny import MIXED, build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmprune import modeling_llmprune
from llmprune.surgery import MODELING_FILE, Kept

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
# Two prompts, the second one shorter: padded on the left.
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 20, 21, 22, 23, 24]])
ATTEND = (IDS != 0).long()

# Attention removed in the first block (which a cache counts by), an MLP in the second; 6 heads in 3 KV groups.
CUTS = {
    "kv_group": [Kept((0, 3, 7, 50), ()), Kept((), (2, 3)), Kept(tuple(range(30)), (0, 1, 4, 5))],
    "q_balanced": [Kept((0, 3, 7, 50), (0, 3, 5)), Kept((), ()), Kept(tuple(range(30)), tuple(range(6)))],
}


def build_dense(variant, folder, **changes):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3}
    if not variant.startswith("qwen2"):
        heads["head_dim"] = 6
    if variant == "qwen2":
        changes |= {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}
    return build(variant, folder, **{**heads, **changes})


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Dense models by variant, each built once."""
    found = {}

    def get(variant):
        if variant not in found:
            found[variant] = build_dense(variant, tmp_path_factory.mktemp(variant))
        return found[variant]

    return get


@pytest.fixture
def shrunk(dense, tmp_path):
    """The directory of a cut Llama."""
    cut(dense("llama"), CUTS["kv_group"], tmp_path / "shrunk")
    return tmp_path / "shrunk"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def load_strictly(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def logits(model, ids=IDS, attend=ATTEND, **options):
    with torch.no_grad():
        return model(ids, attention_mask=attend, **options).logits[attend.bool()]


def generate(model, **options):
    torch.manual_seed(0)
    return model.generate(IDS, attention_mask=ATTEND, do_sample=False, min_new_tokens=12, max_new_tokens=12, **options)


def assert_close(found, expected, tolerance=1e-5):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("mode", CUTS)
@pytest.mark.parametrize("variant", [*FAMILIES, "llama_tied"])
def test_masked_and_shrunk_and_padded_are_one_model(dense, variant, mode, tmp_path):
    source, models = dense(variant), {}
    for format in ("auto", "masked", "padded"):
        cut(source, CUTS[mode], tmp_path / format, heads_mode=mode, format=format)
        models[format] = load_strictly(tmp_path / format)
    masked, small, padded = models["masked"], models["auto"], models["padded"]
    family = source_type = AutoConfig.from_pretrained(source).model_type
    assert small.config.model_type == f"llmprune_{family}"
    assert masked.config.model_type == padded.config.model_type == source_type
    assert small.num_parameters() < padded.num_parameters() < masked.num_parameters()
    expected = logits(masked)
    assert not torch.allclose(expected, logits(load(source)), rtol=1e-2)
    assert_close(logits(small), expected)
    assert_close(logits(padded), expected)
    tokens = generate(masked)
    assert len(set(tokens[:, IDS.shape[1] :].flatten().tolist())) > 3
    for model in (small, padded):
        assert torch.equal(generate(model), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_gives_the_same_tokens(dense, family, tmp_path):
    cut(dense(family), CUTS["kv_group"], tmp_path)
    model = load(tmp_path)
    expected = generate(model, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert torch.equal(generate(model, **options), expected), options


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_one_by_one_through_the_cache_give_the_logits_of_all_at_once(dense, family, tmp_path):
    cut(dense(family), CUTS["kv_group"], tmp_path)
    model, ids = load(tmp_path), IDS[:1]
    cache, steps = None, []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert cache.get_seq_length() == t + 1
            steps.append(out.logits[0])
    assert_close(torch.cat(steps), logits(model, ids, torch.ones_like(ids)))


def test_a_static_cache_with_memory_set_aside_takes_an_absent_attention(shrunk):
    model = load(shrunk)
    cache = StaticCache(config=model.config, max_cache_len=16)
    heads = [layer.num_key_value_heads for layer in model.config.per_layer_config]
    cache.early_initialization(2, heads, model.config.head_dim, torch.float32, torch.device("cpu"))
    assert_close(logits(model, past_key_values=cache), logits(model))


def test_parameters_are_those_counted_and_what_lies_outside_the_blocks(dense, tmp_path):
    plan = cut(dense("qwen3"), CUTS["kv_group"], tmp_path)
    model = load(tmp_path)
    outside = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters(anatomy_of(dense("qwen3"))) + outside
    assert sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values()) == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_can_be_cut_again(dense, family, tmp_path):
    cut(dense(family), [Kept((0, 3, 7, 50), (0, 1)), Kept((), (2, 3, 4, 5)), Kept(tuple(range(30)), ())], tmp_path / "once")
    again = [Kept((1, 3), (0, 1)), Kept((), (2, 3)), Kept(tuple(range(5, 30)), ())]
    at_once = [Kept((3, 50), (0, 1)), Kept((), (4, 5)), Kept(tuple(range(5, 30)), ())]
    cut(tmp_path / "once", again, tmp_path / "twice")
    cut(dense(family), at_once, tmp_path / "at once")
    assert_close(logits(load_strictly(tmp_path / "twice")), logits(load(tmp_path / "at once")), 1e-6)
    cut(tmp_path / "once", again, tmp_path / "masked", format="masked")
    cut(tmp_path / "once", again, tmp_path / "padded", format="padded")
    for folder in ("masked", "padded"):
        assert_close(logits(load_strictly(tmp_path / folder)), logits(load(tmp_path / "at once")))
    # Cut to one width, it needs no class of ours any more.
    alike = [Kept((0, 3, 7, 50), (0, 1)), Kept((1, 2, 3, 4), (2, 3)), Kept((5, 6, 7, 8), (4, 5))]
    cut(dense(family), [*alike[:2], Kept(tuple(range(30)), (4, 5))], tmp_path / "nearly alike")
    cut(tmp_path / "nearly alike", [Kept((0, 1, 2, 3), (0, 1))] * 2 + [Kept((5, 6, 7, 8), (0, 1))], tmp_path / "alike")
    stock = load_strictly(tmp_path / "alike")
    assert type(stock).__module__.startswith("transformers.")
    cut(dense(family), alike, tmp_path / "alike at once")
    assert_close(logits(stock), logits(load(tmp_path / "alike at once")), 1e-6)


def test_biases_of_a_removed_sublayer_stay(tmp_path):
    source = build_dense("llama", tmp_path / "dense", attention_bias=True, mlp_bias=True)
    for format in ("auto", "masked"):
        cut(source, CUTS["kv_group"], tmp_path / format, format=format)
    assert_close(logits(load_strictly(tmp_path / "auto")), logits(load(tmp_path / "masked")))


def test_a_bias_on_down_is_added_to_the_output(dense, tmp_path):
    folder = tmp_path / "model"
    cut(dense("mistral"), [Kept(tuple(range(20)), tuple(range(6)))] * 3, folder)
    before = load(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llmprune_mistral", "down_proj_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    bias = torch.linspace(-1, 1, before.config.hidden_size)
    tensors |= {f"model.layers.{i}.mlp.down_proj.bias": bias.clone() for i in range(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for layer in before.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: output + bias)
    assert_close(logits(load_strictly(folder)), logits(before))


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [2.0, 2.1, 2.2],
        "factor": 2.0,
        "original_max_position_embeddings": 6,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_of_every_kind_are_those_of_the_dense_model(rope, tmp_path):
    """Some are computed again while the model runs, from a configuration that must not refuse to answer."""
    rope_parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    source = build_dense("llama", tmp_path / "dense", rope_parameters=rope_parameters, max_position_embeddings=6)
    for format in ("auto", "masked"):
        cut(source, CUTS["kv_group"], tmp_path / format, format=format)
    assert_close(logits(load_strictly(tmp_path / "auto")), logits(load(tmp_path / "masked")))


def test_the_attention_implementation_can_be_changed(shrunk):
    model = load(shrunk, attn_implementation="eager")
    expected = logits(model)
    used = []

    def counted(module, *args, **kwargs):
        used.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("counted_sdpa", counted)
    model.set_attn_implementation("sdpa")
    assert_close(logits(model), expected)
    with torch.no_grad():
        model.set_attn_implementation("counted_sdpa")
        model(IDS[:1])
    assert used == [1, 2]


def test_hidden_states_come_one_a_block_and_attentions_one_an_attention(shrunk):
    model = load(shrunk, attn_implementation="eager")
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4
    assert [attention.shape[1] for attention in out.attentions] == [2, 4]


def test_gradients_are_the_same_with_checkpoints(shrunk):
    gradients = []
    for checkpoints in (False, True):
        model = load(shrunk).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(IDS, attention_mask=ATTEND, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_what_is_saved_again_is_complete_and_the_same(shrunk, tmp_path):
    model = load(shrunk)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "again" / MODELING_FILE).read_text() == (shrunk / MODELING_FILE).read_text()
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (shrunk, tmp_path / "again"))
    assert {key: second[key] for key in ("auto_map", "per_layer_config", "model_type", "architectures")} == {
        key: first[key] for key in ("auto_map", "per_layer_config", "model_type", "architectures")
    }
    assert torch.equal(logits(load_strictly(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("variant", ["llama", "llama_tied"])
def test_weights_of_16_bits_stay_so_from_disk_to_forward(dense, variant, tmp_path):
    source = build_dense(variant, tmp_path / "dense", dtype=torch.bfloat16)
    for format in ("auto", "masked"):
        cut(source, CUTS["kv_group"], tmp_path / format, format=format)
    small, masked = load_strictly(tmp_path / "auto"), load(tmp_path / "masked")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    # Three digits: sums come in another order.
    assert_close(logits(small).float(), logits(masked).float(), 2e-2)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_place_it(shrunk, device_map):
    assert torch.equal(logits(load(shrunk, device_map=device_map)), logits(load(shrunk)))


def test_building_takes_no_memory_for_blocks_of_the_widest_size(shrunk, monkeypatch):
    """Not even for a moment: every linear that is made is one that stays."""
    made = []
    original = torch.nn.Linear.__init__

    def counting(self, into, out, *args, **kwargs):
        made.append((out, into))
        original(self, into, out, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Linear, "__init__", counting)
    config = AutoConfig.from_pretrained(shrunk)
    model = AutoModelForCausalLM.from_config(config)
    stay = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    # Absent sub-layers are made and dropped; there is one of each kind.
    assert len(made) <= len(stay) - 1 + 4 + 3
    assert config.num_hidden_layers == 3


def test_a_configuration_of_uneven_groups_is_refused(shrunk):
    config = json.loads((shrunk / "config.json").read_text())
    config["per_layer_config"]["2"] = {"num_attention_heads": 3}
    (shrunk / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="Layer 2 has 3 query heads"):
        AutoConfig.from_pretrained(shrunk)


def test_reading_one_width_of_many_is_refused_and_each_block_tells_its_own(shrunk):
    config = load(shrunk).config
    with pytest.raises(RuntimeError, match="intermediate_size"):
        _ = config.intermediate_size
    assert [layer.intermediate_size for layer in config.per_layer_config][::2] == [4, 30]


def test_the_bundled_file_imports_nothing_that_is_not_beside_it_or_in_transformers():
    text = Path(modeling_llmprune.__file__).read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "collections", "contextlib", "huggingface_hub", "torch", "transformers"}


def test_a_tokenizer_beside_a_cut_model_is_read_as_beside_the_dense_one(dense, shrunk):
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (dense("llama"), shrunk))
    text = "A text, with 123 numbers."
    assert type(first) is type(second)
    assert first(text).input_ids == second(text).input_ids


def test_the_pipeline_generates(shrunk):
    made = pipeline("text-generation", model=str(shrunk), device="cpu")
    assert made("one two", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("one two")

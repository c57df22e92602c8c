"""`llmprune.load`: every model that resolve takes becomes a ready one, anything else is one sentence."""

import json
import shutil

import pytest
import torch
from in_process import llmprune as cli
from safetensors.torch import load_file, save_file
from tiny import build

import llmprune
from llmprune import LLMPruneError
from llmprune.output import STATE

IDS = torch.arange(3, 11).unsqueeze(0)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(pristine, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.mark.parametrize("variant", ["llama_tied", "opt", "gpt_neox", "gpt2", "gemma3_text"])
def test_a_directory_loads_as_transformers_loads_it(variant, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = build(variant, tmp_path)
    loaded = llmprune.load(folder, device="cpu")
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits)


def test_a_pruned_directory_loads_with_its_zeros(pristine, tmp_path):
    out = tmp_path / "out"
    cli("prune", "--model", pristine, "--method", "magnitude", "--output", out, "-q")
    loaded = llmprune.load(out, device="cpu")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_dtype_is_the_stored_one_unless_asked(tmp_path):
    folder = build("llama", tmp_path, dtype=torch.bfloat16)
    assert llmprune.load(folder, device="cpu").dtype == torch.bfloat16
    assert llmprune.load(folder, device="cpu", dtype="float32").dtype == torch.float32


def test_an_architecture_that_cannot_be_pruned_still_loads(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=32, hidden_size=8, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert llmprune.load(tmp_path, device="cpu").config.model_type == "bloom"


def refused(folder, *words, **options):
    with pytest.raises(LLMPruneError) as caught:
        llmprune.load(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_directory_without_a_model_is_refused(tmp_path):
    refused(tmp_path, "no config.json")


def test_an_unfinished_run_is_refused(model):
    (model / STATE).mkdir()
    refused(model, "unfinished run")


def test_a_checkpoint_that_lacks_tensors_is_refused(model):
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, "lacks 1 tensors", "layers.1.mlp.up_proj")


def test_a_truncated_shard_is_refused(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(model, "truncated")


def test_shapes_that_contradict_the_configuration_are_refused(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    refused(model, "cannot load")


@pytest.mark.parametrize("value", ["float8", "cuda:99"])
def test_an_unknown_dtype_or_device_is_refused(pristine, value):
    with pytest.raises(LLMPruneError):
        llmprune.load(pristine, **{"device" if "cuda" in value else "dtype": value})


def test_code_runs_only_when_trusted(tmp_path):
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    build("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "auto_map")
    assert type(llmprune.load(tmp_path, device="cpu", trust_remote_code=True)).__name__ == "OwnForCausalLM"

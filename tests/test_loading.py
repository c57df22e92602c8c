"""`llmprune.load`: every model that resolve takes becomes a ready one, anything else is one sentence."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cutting import cut
from in_process import llmprune as cli
from safetensors.torch import load_file, save_file
from tiny import build

import llmprune
from llmprune import LLMPruneError
from llmprune.output import STATE
from llmprune.surgery import Kept

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


UNEVEN = [Kept((0, 3, 7, 50), ()), Kept((), (0, 1, 2)), Kept(tuple(range(30)), (0, 1, 2))]
UNIFORM = [Kept((0, 3, 7, 50), (0, 1, 2))] * 3


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A Llama cut to blocks of different widths: whole, in 16 bits and many shards, tied; and cut to one width."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("uneven")
    for name, variant in (("llama", "llama"), ("tied", "llama_tied"), ("qwen3", "qwen3")):
        cut(build(variant, folder / f"dense {name}"), UNEVEN, folder / name)
    dense = folder / "dense llama"
    cut(dense, UNEVEN, folder / "padded", format="padded")
    cut(dense, UNIFORM, folder / "uniform")
    sharded = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    sharded.save_pretrained(folder / "sharded", max_shard_size="10KB")
    return folder


def test_a_model_of_uneven_blocks_loads_without_trust(uneven):
    loaded = llmprune.load(uneven / "llama", device="cpu")
    assert type(loaded).__module__ == "llmprune.modeling_llmprune"
    assert not loaded.training
    assert torch.isfinite(loaded(IDS).logits).all()
    trusted = llmprune.load(uneven / "llama", device="cpu", trust_remote_code=True)
    assert type(trusted).__module__ == "llmprune.modeling_llmprune"


def test_an_uneven_model_that_lacks_tensors_is_refused(uneven, tmp_path):
    model = shutil.copytree(uneven / "llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(model, "lacks 1 tensors", "layers.2.mlp.up_proj")


# What a fresh process says of each directory: the class's module, the logits, and what the model writes.
TELL = """
import json, sys, torch, transformers
from pathlib import Path
folder, told = Path(sys.argv[1]), {}
def tell(name, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
    ids = torch.tensor([[0, 0, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    attend = (ids != 0).long()
    with torch.no_grad():
        logits = model(ids, attention_mask=attend).logits[attend.bool()]
    written = model.generate(ids, attention_mask=attend, do_sample=False, min_new_tokens=6, max_new_tokens=6)
    told[name] = [type(model).__module__, logits.float().tolist(), written.tolist()]
"""
WITH_LLMPRUNE = f"""
import llmprune, sys
assert not {{"torch", "transformers"}} & set(sys.modules)
{TELL}
from transformers import AutoConfig
told["config"] = type(AutoConfig.from_pretrained(folder / "qwen3")).__name__
for name in ("llama", "tied", "qwen3", "sharded"):
    tell(name)
print(json.dumps(told))
"""
WITHOUT_LLMPRUNE = f"""
import sys
sys.modules["llmprune"] = None  # any import of it fails
{TELL}
try:
    tell("llama")
except ValueError as error:
    told["refusal"] = str(error)
for name in ("llama", "tied", "qwen3", "sharded"):
    tell(name, trust_remote_code=True)
for name in ("padded", "uniform"):
    tell(name)
assert not any(name.startswith("llmprune") for name, module in sys.modules.items() if module)
del sys.modules["llmprune"]
import llmprune
told["first"] = told["llama"]
tell("llama")
print()  # ends the line in which transformers has asked whether to run code
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(uneven, tmp_path_factory):
    """What two fresh processes say, one that imports llmprune first, one that cannot until the end."""
    cache = str(tmp_path_factory.mktemp("modules"))
    environment = {**os.environ, "HF_MODULES_CACHE": cache, "PYTHONPATH": str(Path(__file__).parents[1])}

    def ask(code):
        result = subprocess.run(
            [sys.executable, "-c", code, str(uneven)],
            env=environment,
            cwd=cache,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    with ThreadPoolExecutor() as pool:
        return dict(zip(("with", "without"), pool.map(ask, (WITH_LLMPRUNE, WITHOUT_LLMPRUNE)), strict=True))


@pytest.mark.slow
def test_after_import_llmprune_transformers_loads_uneven_models(told):
    assert told["with"].pop("config") == "LLMPruneQwen3Config"
    assert {answer[0] for answer in told["with"].values()} == {"llmprune.modeling_llmprune"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "sharded"])
def test_without_llmprune_the_bundled_file_gives_the_same_logits_and_tokens(told, name):
    module, logits, tokens = told["without"]["first" if name == "llama" else name]
    assert module.startswith("transformers_modules.")
    assert [logits, tokens] == told["with"][name][1:]


@pytest.mark.slow
def test_without_llmprune_and_without_trust_the_message_says_what_to_pass(told):
    assert "trust_remote_code=True" in told["without"]["refusal"]


@pytest.mark.slow
def test_llmprune_imported_after_transformers_is_in_time(told):
    assert told["without"]["llama"][0] == "llmprune.modeling_llmprune"


@pytest.mark.slow
def test_uniform_and_padded_models_need_neither_llmprune_nor_trust(told):
    for name in ("uniform", "padded"):
        assert told["without"][name][0] == "transformers.models.llama.modeling_llama"
    assert told["without"]["padded"][2] == told["with"]["llama"][2]
    padded, small = torch.tensor(told["without"]["padded"][1]), torch.tensor(told["with"]["llama"][1])
    torch.testing.assert_close(padded, small, rtol=1e-5, atol=1e-5 * float(small.abs().max()))

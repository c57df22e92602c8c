"""Whatever a user gets wrong: exit code 2, one sentence on stderr, and nothing that looks like a model."""

import json
import os
import resource
import shutil
import struct

import forked
import pytest
import torch
from in_process import Outcome, llmprune
from safetensors.torch import load_file, save_file
from tiny import LIMIT, build
from transformers import AutoModelForCausalLM

from llmprune.output import RECORD, STATE

QUICK = ("--device", "cpu", "--calibration", "random", "--samples", "2", "--seqlen", "8")

# Matrices this small gain nothing from a second thread, and on a busy machine the threads wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("models") / "tiny", shard_size="1GB")


@pytest.fixture
def model(pristine, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "model")


def snapshot(folder):
    """Every file and folder below, with its content and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def looks_like_a_model(folder):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return any((folder / name).exists() for name in (RECORD, "model.safetensors", "model.safetensors.index.json"))
    return True


def assert_refused(outcome, *words):
    """Exit code 2 and one line that says `words`."""
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    for word in words:
        assert word in outcome.err


def refused_before_the_start(tmp_path, args, *words):
    """`prune` refuses and has created nothing."""
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    assert_refused(llmprune("prune", *QUICK, "--output", out, *args), *words)
    assert snapshot(tmp_path) == before


# Options.

OPTIONS = {
    "unknown_method": (["--method", "wandaa"], ["wandaa", "wanda", "sparsegpt"]),
    "unknown_pattern": (["--pattern", "2-4"], ["2-4", "2:4"]),
    "pattern_that_keeps_all": (["--pattern", "4:4"], ["4:4", "0 < N < M"]),
    "pattern_that_keeps_none": (["--pattern", "0:4"], ["0:4", "0 < N < M"]),
    "pattern_that_does_not_divide": (["--pattern", "2:5"], ["2:5", "model.layers.0.self_attn.q_proj", "36"]),
    "sparsity_1": (["--sparsity", "1"], ["1.0", "[0, 1)"]),
    "sparsity_negative": (["--sparsity", "-0.1"], ["-0.1", "[0, 1)"]),
    "sparsity_nan": (["--sparsity", "nan"], ["nan", "[0, 1)"]),
    "sparsity_text": (["--sparsity", "abc"], ["sparsity", "abc", "number"]),
    "sparsity_against_pattern": (["--sparsity", "0.3", "--pattern", "2:4"], ["0.3", "2:4", "0.5"]),
    "group_with_pattern": (["--group", "layer", "--pattern", "2:4"], ["--group", "2:4"]),
    "unknown_group": (["--group", "column"], ["group", "column", "row"]),
    "no_samples": (["--samples", "0"], ["samples", "0"]),
    "samples_text": (["--samples", "many"], ["samples", "many"]),
    "seqlen_1": (["--seqlen", "1"], ["seqlen", "1"]),
    "seqlen_beyond_the_model": (["--seqlen", str(LIMIT + 1)], [str(LIMIT + 1), f"at most {LIMIT}"]),
    "seed_negative": (["--seed", "-1"], ["seed", "-1"]),
    "no_micro_batch": (["--micro-batch", "0"], ["micro_batch", "0"]),
    "unknown_dtype": (["--dtype", "float8"], ["dtype", "float8", "bfloat16"]),
    "unknown_device": (["--device", "tpu"], ["tpu", "cpu", "cuda"]),
    "odd_device": (["--device", "cuda:first"], ["cuda:first", "cuda:N"]),
    "unknown_propagation": (["--propagate", "sideways"], ["propagate", "sideways", "pruned"]),
    "unknown_order": (["--sequential", "layer"], ["sequential", "layer", "sublayer"]),
    "calibration_missing": (["--calibration", "nothing-here.txt"], ["nothing-here.txt"]),
    "evaluation_on_noise": (["--evaluate", "random"], ["random"]),
    "evaluation_missing": (["--evaluate", "nothing-here.txt"], ["nothing-here.txt"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_refused_before_the_start(case, pristine, tmp_path):
    args, words = OPTIONS[case]
    refused_before_the_start(tmp_path, ["--model", pristine, *args], *words)


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_prune_and_plan_refuse_the_same(command, pristine, tmp_path):
    for args, words in (OPTIONS["unknown_method"], OPTIONS["pattern_that_does_not_divide"]):
        assert_refused(llmprune(command, "--model", pristine, "--output", tmp_path / "out", *args), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused(pristine, tmp_path):
    refused_before_the_start(tmp_path, ["--model", pristine, "--device", "cuda"], "cuda", "--device cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lama", ["'lama'", "llama?"]),
        ("gpt-2", ["'gpt-2'", "gpt2?"]),
        ("zzzzzz", ["'zzzzzz'", "llmprune models"]),
        ("./no/such/folder", ["./no/such/folder"]),
        ("nobody/nothing-at-all", ["nobody/nothing-at-all", "Hub"]),
    ],
)
def test_an_unknown_model_is_refused_and_near_names_are_given(name, words, tmp_path):
    refused_before_the_start(tmp_path, ["--model", name], *words)


def test_a_missing_model_option_is_refused(tmp_path):
    refused_before_the_start(tmp_path, [], "--model")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.txt").write_text("hello")
    refused_before_the_start(tmp_path, ["--model", tmp_path / "model.txt"], "model.txt", ".gguf")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ["text.txt"]), (" \n\n", ["text.txt"]), ("too short", ["text.txt", "9"])],
    ids=["empty", "blank", "short"],
)
def test_calibration_text_without_enough_in_it_is_refused(text, words, pristine, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    refused_before_the_start(tmp_path, ["--model", pristine, "--calibration", tmp_path / "text.txt"], *words)


# Recipes.

RECIPES = {
    "unknown_key": ("sparsty: 0.5\n", ["sparsty", "sparsity", "recipe.yaml"]),
    "wrong_type": ("micro_batch: many\n", ["micro_batch", "many"]),
    "list_for_a_number": ("sparsity: [0.5, 0.6]\n", ["sparsity"]),
    "invalid_yaml": ("method: [wanda\nsparsity: 0.5\n", ["recipe.yaml", "YAML"]),
    "not_a_mapping": ("- method\n- wanda\n", ["recipe.yaml", "sparsity: 0.5"]),
    "empty": ("", ["recipe.yaml"]),
    "number_as_key": ("7: wanda\n", ["7"]),
    "not_utf8": (b"method: \xff\xfe\n", ["recipe.yaml"]),
    "runs_code": ("method: !!python/object/apply:os.getcwd []\n", ["recipe.yaml"]),
    "contradiction": ("sparsity: 0.3\npattern: '2:4'\n", ["0.3", "2:4"]),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_recipe_is_refused(case, pristine, tmp_path):
    content, words = RECIPES[case]
    (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused_before_the_start(tmp_path, ["--model", pristine, "--recipe", tmp_path / "recipe.yaml"], *words)


def test_a_missing_recipe_is_refused(pristine, tmp_path):
    refused_before_the_start(tmp_path, ["--model", pristine, "--recipe", tmp_path / "no.yaml"], "no.yaml")


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(pristine, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {pristine}\nmethod: sparsegpt\nsparsity: 0.25\nseed: 3\n")
    outcome = llmprune("plan", *QUICK, "--json", "--recipe", recipe, "--sparsity", "0.75")
    settled = json.loads(outcome.out)["recipe"]
    found = {key: settled[key] for key in ("method", "sparsity", "seed", "pattern")}
    assert found == {"method": "sparsegpt", "sparsity": 0.75, "seed": 3, "pattern": "unstructured"}


def test_the_recipe_beside_the_weights_repeats_the_run(pristine, tmp_path):
    first = llmprune("prune", *QUICK, "--json", "--model", pristine, "--pattern", "2:4", "--output", tmp_path / "one")
    again = llmprune("prune", "--json", "--recipe", tmp_path / "one" / "recipe.yaml", "--output", tmp_path / "two")
    assert json.loads(again.out)["shards"] == json.loads(first.out)["shards"]


# The model directory.


def cut(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def cut_the_header(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def empty_the_weights(model):
    (model / "model.safetensors").write_bytes(b"")


def append(model):
    with open(model / "model.safetensors", "ab") as stream:
        stream.write(b"more")


def garble_the_header(model):
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = bytes(range(200, 232))
    file.write_bytes(content)


def list_as_header(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"[1] ")


def absurd_header_length(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")


def lose_a_shard(model):
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def garble_the_index(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": ')


def only_pickle(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def no_weights(model):
    (model / "model.safetensors").unlink()


def no_config(model):
    (model / "config.json").unlink()


def garble_the_config(model):
    (model / "config.json").write_text("{")


def list_as_config(model):
    (model / "config.json").write_text("[]")


def edit_tensors(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def lose_a_tensor(model):
    edit_tensors(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def lose_the_head(model):
    edit_tensors(model, lambda tensors: tensors.pop("lm_head.weight"))


def reshape_a_tensor(model):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))


def quantise_a_tensor(model):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


def edit_config(**changes):
    def damage(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


DAMAGES = {
    "truncated": (cut, ["model.safetensors", "truncated"]),
    "truncated_header": (cut_the_header, ["model.safetensors", "truncated"]),
    "empty": (empty_the_weights, ["model.safetensors", "truncated"]),
    "longer_than_declared": (append, ["model.safetensors", "corrupt"]),
    "corrupt_header": (garble_the_header, ["model.safetensors", "corrupt"]),
    "list_as_header": (list_as_header, ["model.safetensors", "corrupt"]),
    "absurd_header_length": (absurd_header_length, ["model.safetensors", "corrupt"]),
    "missing_shard": (lose_a_shard, ["model-00002-of-00002.safetensors"]),
    "corrupt_index": (garble_the_index, ["model.safetensors.index.json"]),
    "pickle_only": (only_pickle, ["pickle", "save_pretrained"]),
    "no_weights": (no_weights, ["model.safetensors"]),
    "no_config": (no_config, ["config.json"]),
    "corrupt_config": (garble_the_config, ["config.json", "JSON"]),
    "list_as_config": (list_as_config, ["config.json"]),
    "missing_tensor": (lose_a_tensor, ["model.layers.1.mlp.up_proj.weight", "lacks"]),
    "missing_head": (lose_the_head, ["lm_head.weight", "lacks"]),
    "shape_mismatch": (reshape_a_tensor, ["model.layers.1.mlp.up_proj.weight", "[52, 35]", "[52, 36]"]),
    "integer_weights": (quantise_a_tensor, ["model.layers.1.mlp.up_proj.weight", "int8"]),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), ["quantised", "gptq"]),
    "remote_code": (
        edit_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        ["auto_map", "--trust-remote-code"],
    ),
    "unsupported_architecture": (edit_config(model_type="bert"), ["'bert'", "llama"]),
    "no_architecture": (edit_config(model_type=None), ["llama"]),
    "config_of_a_wrong_type": (edit_config(hidden_size="big"), ["config.json", "hidden_size"]),
    "impossible_config": (edit_config(num_attention_heads=0), ["config.json"]),
    "no_blocks": (edit_config(num_hidden_layers=0), ["config.json"]),
    "another_size": (edit_config(num_hidden_layers=4), ["model.layers.3.", "lacks"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_foreign_model_is_refused_before_the_start(case, model, tmp_path):
    damage, words = DAMAGES[case]
    damage(model)
    refused_before_the_start(tmp_path, ["--model", model], *words)


def spoil(value, name):
    def damage(model):
        edit_tensors(model, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))

    return damage


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_weights_that_are_no_numbers_are_refused_by_name(method, name, value, model, tmp_path):
    spoil(value, name)(model)
    out = tmp_path / "out"
    outcome = llmprune("prune", *QUICK, "--model", model, "--method", method, "--output", out)
    assert_refused(outcome, name)
    assert not looks_like_a_model(out)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("order", [("block", "pruned"), ("sublayer", "pruned"), ("block", "dense")], ids="-".join)
def test_activations_that_overflow_are_refused_by_block(order, method, model, tmp_path):
    # Finite in float32, too large for float16.
    edit_tensors(model, lambda tensors: tensors["model.layers.1.mlp.gate_proj.weight"].mul_(1e4))
    edit_tensors(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1e4))
    out = tmp_path / "out"
    options = ("--method", method, "--sequential", order[0], "--propagate", order[1])
    outcome = llmprune("prune", *QUICK, *options, "--model", model, "--dtype", "float16", "--output", out)
    # With the dense order the block's output is seen before the statistics are.
    where = "Block 1 " if order[1] == "dense" else "'model.layers.1.mlp.down_proj'"
    assert_refused(outcome, where, "float16", "--dtype float32")
    assert not looks_like_a_model(out)


def test_a_damaged_tokenizer_is_refused(model, tmp_path):
    (model / "tokenizer.json").write_text("{")
    (tmp_path / "text.txt").write_text("Some words to calibrate on. " * 40)
    refused_before_the_start(tmp_path, ["--model", model, "--calibration", tmp_path / "text.txt"], "tokenizer", str(model))


def test_text_without_a_tokenizer_is_refused_and_random_ids_are_not(model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (tmp_path / "text.txt").write_text("Some words to calibrate on. " * 40)
    refused_before_the_start(tmp_path, ["--model", model, "--calibration", tmp_path / "text.txt"], "no tokenizer")
    assert llmprune("prune", *QUICK, "--model", model, "--output", tmp_path / "out").code == 0


# The directory for activations.


def test_an_offload_directory_that_is_a_file_is_refused(pristine, tmp_path):
    (tmp_path / "file").write_text("a file")
    outcome = llmprune(
        *("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out"),
        *("--offload-activations", tmp_path / "file"),
    )
    assert_refused(outcome, "--offload-activations", "file")


def test_an_offload_disk_without_room_is_an_error_and_no_crash(pristine, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    outcome = llmprune(
        *("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out"),
        *("--offload-activations", tmp_path / "scratch"),
    )
    assert_refused(outcome, "--offload-activations", "No space left")
    assert list((tmp_path / "scratch").iterdir()) == []


# The output directory.


@pytest.fixture
def occupied(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    (out / "adapter_model.safetensors").write_bytes(b"mine")
    (out / "notes").mkdir()
    (out / "notes" / "model.safetensors").write_bytes(b"mine too")
    return out


def test_a_directory_with_other_content_is_refused(pristine, occupied, tmp_path):
    refused_before_the_start(tmp_path, ["--model", pristine], "--overwrite")


def test_overwrite_leaves_unrelated_files(pristine, occupied):
    before = snapshot(occupied)
    outcome = llmprune("prune", *QUICK, "--model", pristine, "--output", occupied, "--overwrite")
    assert outcome.code == 0, outcome.err
    after = snapshot(occupied)
    assert {name: after.get(name) for name in before if name != "notes"} == {
        name: entry for name, entry in before.items() if name != "notes"
    }
    AutoModelForCausalLM.from_pretrained(occupied)


def test_overwrite_replaces_a_model_that_is_there(pristine, tmp_path):
    out = build("gpt2", tmp_path / "out", shard_size="20KB")
    outcome = llmprune("prune", *QUICK, "--model", pristine, "--output", out, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {file.name for file in out.glob("*.safetensors")} == set(index["weight_map"].values())


def test_a_run_of_another_kind_is_refused_and_left_alone(pristine, tmp_path):
    out = tmp_path / "out"
    assert llmprune("prune", *QUICK, "--model", pristine, "--output", out).code == 0
    before = snapshot(out)
    outcome = llmprune("prune", *QUICK, "--model", pristine, "--output", out, "--sparsity", "0.25")
    assert_refused(outcome, "sparsity was 0.5, is 0.25", "--overwrite")
    assert snapshot(out) == before


def test_an_output_that_is_a_file_is_refused(pristine, tmp_path):
    (tmp_path / "out").write_text("a file")
    refused_before_the_start(tmp_path, ["--model", pristine], "out is a file")


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_an_output_below_a_file_is_refused(mode, pristine, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "file").chmod(mode)
    refused_before_the_start(tmp_path, ["--model", pristine, "--output", tmp_path / "file" / "out"], "file")


def test_an_output_that_is_not_writable_is_refused(pristine, tmp_path, monkeypatch):
    # By asking os.access and not by permissions, which do not bind root.
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and str(path) == str(tmp_path)) and real(path, mode)
    )
    refused_before_the_start(tmp_path, ["--model", pristine], "Cannot write to")


@pytest.mark.parametrize("how", ["as it is", "with dots", "through a link"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_the_input_is_never_the_output(how, overwrite, model, tmp_path):
    output = {"as it is": model, "with dots": model / ".." / "model", "through a link": tmp_path / "link"}[how]
    if how == "through a link":
        output.symlink_to(model)
    refused_before_the_start(tmp_path, ["--model", model, "--output", output, *overwrite], "input")


def test_a_full_disk_is_refused_before_the_start(pristine, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused_before_the_start(tmp_path, ["--model", pristine], "GB free")


def test_a_failed_run_leaves_a_directory_that_a_good_run_can_use(model, pristine, tmp_path):
    spoil(float("nan"), "model.layers.0.mlp.down_proj.weight")(model)
    args = ("prune", *QUICK, "--output", tmp_path / "out", "--model")
    assert_refused(llmprune(*args, model), "down_proj")
    shutil.copytree(pristine, model, dirs_exist_ok=True)
    outcome = llmprune(*args, model, "--overwrite")
    assert outcome.code == 0, outcome.err


# What is printed, and what is not touched.


def test_the_same_command_again_changes_nothing(pristine, tmp_path):
    args = ("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out")
    first = llmprune(*args)
    before = snapshot(tmp_path / "out")
    again = llmprune(*args)
    assert (first.code, again.code) == (0, 0)
    assert "nothing to do" in again.out
    after = snapshot(tmp_path / "out")
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}


def test_plan_writes_nothing(pristine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = snapshot(pristine.parent)
    for options in ([], ["--json"], ["--output", tmp_path / "out"]):
        assert llmprune("plan", *QUICK, "--model", pristine, *options).code == 0
    assert snapshot(tmp_path) == {}
    assert snapshot(pristine.parent) == before


def test_pruning_leaves_the_source_alone(pristine, tmp_path):
    before = snapshot(pristine)
    assert llmprune("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out").code == 0
    assert snapshot(pristine) == before


def test_a_finished_run_leaves_no_state_behind(pristine, tmp_path):
    assert llmprune("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out").code == 0
    assert not (tmp_path / "out" / STATE).exists()
    assert list((tmp_path / "out").glob(".*")) == []


# As a process of its own: what in-process runs cannot see.


def test_json_is_all_that_a_process_prints(pristine, tmp_path, run_cli):
    result = run_cli("prune", *QUICK, "--model", pristine, "--output", tmp_path / "out", "--json", env=ONE_THREAD)
    record = json.loads(result.stdout)
    assert record["output"] == str(tmp_path / "out")
    assert record["sparsity"] == 0.5
    assert (result.returncode, result.stderr) == (0, "")


def test_quiet_prints_nothing_at_all(pristine, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on, and to measure. " * 40)
    process = forked.python(
        *("-m", "llmprune", "prune", "--model", pristine, "--output", tmp_path / "out", "--quiet", "--device", "cpu"),
        *("--calibration", text, "--evaluate", text, "--samples", "2", "--seqlen", "8"),
    )
    assert (*process.communicate(timeout=600), process.returncode) == ("", "", 0)
    assert looks_like_a_model(tmp_path / "out")


def test_a_process_reports_an_error_as_the_function_does(model, tmp_path):
    cut(model)
    process = forked.python("-m", "llmprune", "prune", *QUICK, "--model", model, "--output", tmp_path / "out")
    out, err = process.communicate(timeout=600)
    assert_refused(Outcome(process.returncode, out, err), "model.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["prune"], ["plan"]], ids=lambda command: "-".join(command) or "llmprune")
def test_help_imports_neither_torch_nor_transformers(command, run_python):
    code = f"""
import contextlib, io, sys
from llmprune.cli import main
sys.argv = ["llmprune", *{command}, "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
assert "--help" in out.getvalue()
print(sorted({{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_help_takes_less_than_half_a_second(run_cli):
    def processor_seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_cli("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The processor's time, since the wall clock also measures who else is using this machine, and one of many, since another
    # process in the same caches slows this one. Importing torch alone takes several times as long.
    assert any(processor_seconds() < 0.5 for _ in range(50))

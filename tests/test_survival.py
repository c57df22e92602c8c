"""Runs that are killed, interrupted, raced, short of disk, or spread over ranks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from crash_harness import digests
from safetensors.torch import save_file
from tiny import save_llama
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.checkpoint import Checkpoint
from llmprune.errors import LLMPruneError
from llmprune.output import sealed
from llmprune.verify import verify

HARNESS = Path(__file__).parent / "helpers" / "crash_harness.py"
OPTIONS = {"calibration": "random", "samples": 6, "seqlen": 24}
FLAGS = [f"--{key}={value}" for key, value in OPTIONS.items()]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, num_hidden_layers=4)


def weights(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def same(left, right):
    left, right = weights(left), weights(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def launch(ranks, model_dir, output, *flags):
    return forked.ranks(*[["prune", "--model", model_dir, "--output", output, *FLAGS, *flags]] * ranks)


def harness(model_dir, workdir, *flags, **recipe):
    """Run the crash harness in a process of its own, which forks the ones it kills. Returns what it prints on both streams."""
    process = forked.python(HARNESS, model_dir, workdir, *flags, "--recipe", json.dumps(recipe))
    out, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors
    return json.loads(out), errors


# Recipe to the kills of an ordinary test run.
KILLED = {
    "wanda": ({"method": "wanda"}, 4),
    "sparsegpt-sublayer": ({"method": "sparsegpt", "sequential": "sublayer"}, 3),
    "random": ({"method": "random", "calibration": None}, 3),
    "wanda-sublayer": ({"method": "wanda", "sequential": "sublayer"}, 1),
    "wanda-dense": ({"method": "wanda", "propagate": "dense"}, 1),
    "best": ({"method": "best"}, 3),
    "icbs": ({"method": "icbs", "icbs": "steps: 4, save_every: 1, block_size: 64, holdout: 4"}, 2),
    "wanda-offloaded": ({"method": "wanda", "offload_activations": "scratch"}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(model_dir, tmp_path, case):
    recipe, few = KILLED[case]
    kills = os.environ.get("LLMPRUNE_KILLS", str(few))
    if "offload_activations" in recipe:
        recipe = {**recipe, "offload_activations": str(tmp_path / recipe["offload_activations"])}
    counts, _ = harness(model_dir, tmp_path, "--kills", kills, **{**OPTIONS, **recipe})
    assert counts["kills"] == int(kills)
    assert not list(tmp_path.glob("scratch/*"))


@pytest.mark.slow
def test_of_two_runs_that_start_at_once_one_wins_and_the_other_is_refused(model_dir, tmp_path):
    _, errors = harness(model_dir, tmp_path, "--races", "3", **{**OPTIONS, "samples": 150})
    assert errors.count("in use by another llmprune run") == errors.count("refused: ") == 3


@pytest.mark.parametrize("block", [0, 2])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_once_there_is_room(model_dir, tmp_path, monkeypatch, block):
    from llmprune import output as output_module

    write_shard = output_module.write_shard

    def full(file, tensors):
        if any(f"layers.{block}." in name for name in tensors):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_shard(file, tensors)

    monkeypatch.setattr(output_module, "write_shard", full)
    with pytest.raises(LLMPruneError, match=r"No space left on device.*same command again"):
        llmprune.prune(str(model_dir), output=tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    llmprune.prune(str(model_dir), output=tmp_path / "out", **OPTIONS)
    llmprune.prune(str(model_dir), output=tmp_path / "whole", **OPTIONS)
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("fault", [errno.EIO, errno.EACCES])
def test_a_source_that_cannot_be_read_is_one_sentence_with_its_name(model_dir, tmp_path, monkeypatch, fault):
    real = os.open, open

    def broken(file, mode="r", *args, **kwargs):
        if str(file).endswith("model.safetensors") and kwargs.get("buffering") == 0:
            raise OSError(fault, os.strerror(fault))
        return real[1](file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(LLMPruneError, match=r"Could not read .*model\.safetensors"):
        llmprune.prune(str(model_dir), output=tmp_path / "out", **OPTIONS)


def test_a_changed_recipe_or_model_is_refused_by_name_while_a_run_is_unfinished(model_dir, tmp_path, monkeypatch):
    from llmprune import output as output_module

    def stop(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(output_module.Output, "finish", stop)
        with pytest.raises(OSError, match="full"):
            llmprune.prune(str(model_dir), output=tmp_path / "out", **OPTIONS)
    with pytest.raises(LLMPruneError, match="seed was 0, is 1"):
        llmprune.prune(str(model_dir), output=tmp_path / "out", seed=1, **OPTIONS)
    other = tmp_path / "other"
    other.mkdir()
    tensors = weights(model_dir)
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(LLMPruneError, match="model weights was"):
        llmprune.prune(str(other), output=tmp_path / "out", **OPTIONS)
    llmprune.prune(str(model_dir), output=tmp_path / "out", **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_prints_the_command_that_resumes(model_dir, tmp_path, number):
    out = tmp_path / "out"
    flags = ["--model", str(model_dir), "--output", str(out), "--calibration=random", "--samples=3000", "--seqlen=64"]
    process = forked.python("-m", "llmprune", "prune", *flags)
    while not (out / ".llmprune" / "journal.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert f"llmprune prune --model {model_dir} --output {out}" in stderr
    assert not list(out.glob(".*.tmp"))
    assert not (out / "config.json").exists()


@pytest.mark.slow
def test_two_and_four_ranks_write_the_bytes_of_one(model_dir, tmp_path):
    llmprune.prune(str(model_dir), output=tmp_path / "one", **OPTIONS)
    for ranks in (2, 4):
        codes, errors = launch(ranks, model_dir, tmp_path / str(ranks))
        assert codes == [0] * ranks, errors
        assert same(tmp_path / "one", tmp_path / str(ranks))


@pytest.mark.slow
def test_hessian_masks_agree_between_one_and_two_ranks(model_dir, tmp_path):
    options = {**OPTIONS, "method": "sparsegpt", "dtype": "float32"}
    llmprune.prune(str(model_dir), output=tmp_path / "one", **options)
    codes, errors = launch(2, model_dir, tmp_path / "two", "--method=sparsegpt", "--dtype=float32")
    assert codes == [0, 0], errors
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    differing = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    # Hessians are float32 sums whose order depends on the number of ranks; near-ties may fall the other way.
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in one.values())


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_and_another_number_of_ranks_resumes(model_dir, tmp_path):
    out, samples = tmp_path / "out", "--samples=1500"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "llmprune", "prune", "--model", str(model_dir), "--output", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *FLAGS, samples], stderr=subprocess.PIPE, text=True, env=env)
    journal = out / ".llmprune" / "journal.jsonl"
    while not journal.exists() or '"block 0"' not in journal.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    workers[-1].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("error: ") <= 1
    assert not (out / "config.json").exists()
    llmprune.prune(str(model_dir), output=out, **{**OPTIONS, "samples": 1500})
    llmprune.prune(str(model_dir), output=tmp_path / "whole", **{**OPTIONS, "samples": 1500})
    assert same(out, tmp_path / "whole")


@pytest.mark.slow
def test_more_ranks_than_samples_is_one_sentence(model_dir, tmp_path):
    codes, errors = launch(2, model_dir, tmp_path / "out", "--samples=1")
    assert codes == [2, 2]
    assert errors.count("error: 2 ranks cannot share 1 calibration samples") == errors.count("error: ") == 1


@pytest.fixture
def finished(model_dir, tmp_path):
    llmprune.prune(str(model_dir), output=tmp_path / "out", pattern="2:4", **OPTIONS)
    return tmp_path / "out"


def test_a_finished_output_verifies(finished):
    assert verify(finished) == []


@pytest.mark.slow
def test_one_flipped_byte_anywhere_is_found(tmp_path):
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    llmprune.prune(str(tmp_path / "model"), output=out, method="random")
    for file in out.iterdir():
        if file.name == "README.md":  # the card is everybody's to edit
            continue
        content = bytearray(file.read_bytes())
        # The record seals itself; of the other files it knows the hash, to which all bytes are alike.
        for position in range(0, len(content), 1 if file.name == "llmprune.json" else 5):
            content[position] ^= 1
            file.write_bytes(content)
            try:
                found = verify(out)
            except LLMPruneError as error:
                found = [str(error)]
            assert any(file.name in problem for problem in found), (file.name, position)
            content[position] ^= 1
        file.write_bytes(content)
    assert verify(out) == []


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude", "random"])
def test_the_same_command_twice_writes_the_same_bytes(model_dir, tmp_path, method):
    for name in ("one", "two"):
        llmprune.prune(str(model_dir), output=tmp_path / name, method=method, **OPTIONS)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_number_of_threads_does_not_change_a_mask(tmp_path, method):
    # Large enough that torch does share its work out.
    config = LlamaConfig(
        vocab_size=61, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, dtype="float32"
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            llmprune.prune(str(tmp_path / "model"), output=tmp_path / str(threads), method=method, **{**OPTIONS, "seqlen": 200})
    finally:
        torch.set_num_threads(before)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert all(torch.equal(one[name] == 0, two[name] == 0) for name in one)


def rewritten(folder, change):
    """Change a tensor and make the shard's hash agree, as a tool that re-saves would."""
    import hashlib

    shard = folder / "model-00002-of-00005.safetensors"
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.read(name) for name, entry in checkpoint.entries.items() if entry.file == shard}
    change(tensors["model.layers.0.mlp.up_proj.weight"])
    save_file(tensors, shard, metadata={"format": "pt"})
    record = json.loads((folder / "llmprune.json").read_text())
    record["shards"][shard.name] = hashlib.sha256(shard.read_bytes()).hexdigest()
    del record["sha256"]
    (folder / "llmprune.json").write_bytes(sealed(record, indent=2))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w[0].fill_(1.0), r"row 0, columns 0 to 3 are not 2:4"),
        (lambda w: w[w == 0].numel() and w.copy_(torch.where(w == 0, -0.0, w)), r"holds -0\.0"),
        (lambda w: w[0, :].fill_(float("nan")), "NaN"),
        (lambda w: w[3].fill_(0.0), "its record says"),
    ],
    ids=["pattern", "negative-zero", "nan", "more-zeros"],
)
def test_weights_that_break_the_record_are_found(finished, change, problem):
    import re

    rewritten(finished, change)
    assert any(re.search(problem, found) for found in verify(finished))


def test_a_changed_recipe_file_is_found(finished):
    (finished / "recipe.yaml").write_text("method: magnitude\n")
    assert verify(finished) == ["recipe.yaml is not what was written: its SHA-256 differs."]


def test_an_unfinished_or_foreign_directory_is_not_verified(model_dir, tmp_path):
    with pytest.raises(LLMPruneError, match="give a directory that llmprune wrote"):
        verify(model_dir)
    (tmp_path / ".llmprune").mkdir()
    with pytest.raises(LLMPruneError, match="unfinished run"):
        verify(tmp_path)

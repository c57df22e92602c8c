"""Several processes, one run: what each must agree on, whichever launcher starts them."""

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

FLAGS = ["--calibration=random", "--samples=6", "--seqlen=24", "--quiet"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model weights", "model config", "calibration tokens"])
def test_ranks_that_see_different_files_are_told_which_in_one_sentence(model_dir, tmp_path, what):
    other = tmp_path / "other"
    other.mkdir()
    for file in model_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    own = ["--model", model_dir], ["--model", other]
    if what == "model weights":
        weights = load_file(other / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] += 1
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    elif what == "model config":
        config = other / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    else:
        own = tuple([*flags, "--seed", str(rank)] for rank, flags in enumerate(own))
    codes, message = forked.ranks(*(["prune", *flags, *FLAGS, "--output", tmp_path / "out"] for flags in own))
    assert codes == [2, 2]
    assert message.count("error: ") == 1
    assert f"Rank 1 and rank 0 differ in {'seed' if what == 'calibration tokens' else what}" in message
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_accelerate_launch_starts_ranks_that_write_the_bytes_of_one(model_dir, tmp_path):
    command = ["llmprune", "prune", "--model", str(model_dir), *FLAGS, "--output"]
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--main_process_port={forked.free_port()}", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = [sys.executable, "-m", *launcher, *command, str(tmp_path / "two")]
    done = subprocess.run(full, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    alone = forked.python("-m", *command, tmp_path / "one")
    assert (*alone.communicate(timeout=300), alone.returncode) == ("", "", 0)
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert shards
    for shard in shards:
        one, two = load_file(tmp_path / "one" / shard), load_file(tmp_path / "two" / shard)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert Path(tmp_path / "two" / "llmprune.json").is_file()

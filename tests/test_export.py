"""`llmprune export`: fewer bytes, the same model to everything that reads one, and back."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from in_process import Outcome
from in_process import llmprune as cli
from safetensors.torch import load_file, save_file
from tiny import build, save_llama

import llmprune
from llmprune import LLMPruneError, output, packing
from llmprune.checkpoint import Checkpoint
from llmprune.structure import PLAN
from llmprune.tables import weights_bytes
from llmprune.verify import read_record, verify

RANDOM = ("--calibration", "random", "--samples", "8", "--seqlen", "8", "--device", "cpu", "-q")


def made(*args: str | Path) -> Path:
    """Run a command that has an --output."""
    outcome = cli(*args, "-q")
    assert (outcome.code, outcome.err) == (0, "")
    return Path(args[args.index("--output") + 1])


def exported(directory: Path, format: str, place: Path) -> Path:
    return made("export", directory, "--format", format, "--output", place)


def with_zeros(directory: Path) -> Path:
    """Somebody else's model: half of the weights of every matrix are zero, some of the others -0.0."""
    generator = torch.Generator().manual_seed(0)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if weight.ndim == 2:
                tensors[name] = torch.where(torch.rand(weight.shape, generator=generator) < 0.5, 0.0, weight)
                tensors[name][0, 0] = -0.0
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was pruned to 2:4, in bfloat16."""
    folder = tmp_path_factory.mktemp("export")
    save_llama(folder / "dense", dtype=torch.bfloat16, num_hidden_layers=2)
    flags = ("--method", "magnitude", "--pattern", "2:4", "--device", "cpu")
    return made("prune", "--model", folder / "dense", *flags, "--output", folder / "pruned")


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    return exported(pruned, "packed24", pruned.with_name("packed"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several shards that llmprune has not pruned."""
    folder = build("llama", tmp_path_factory.mktemp("foreign") / "model", dtype=torch.bfloat16, shard_size="60KB")
    return with_zeros(folder)


def shards(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors"))}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints read bit for bit the same."""
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.entries.keys() == second.entries.keys()
    pairs = ((first.read(name), second.read(name)) for name in first.entries)
    return all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in pairs
    )


@pytest.mark.parametrize("format", ["packed24", "bitmask"])
def test_what_is_turned_back_is_byte_for_byte_what_it_was(pruned: Path, tmp_path: Path, format: str) -> None:
    small = exported(pruned, format, tmp_path / "small")
    assert same_tensors(small, pruned)
    assert weights_bytes(small) < weights_bytes(pruned)
    back = exported(small, "dense", tmp_path / "back")
    written = {file.name for file in pruned.iterdir()}
    assert {file.name for file in back.iterdir()} == written
    for name in written - {"README.md", "llmprune.json"}:
        assert (back / name).read_bytes() == (pruned / name).read_bytes(), name
    said, before = read_record(back), read_record(pruned)
    assert {**said, "identity": None} == {**before, "identity": None}
    assert said["identity"].items() >= before["identity"].items()
    assert verify(small) == verify(back) == []


def test_the_other_shards_of_a_foreign_model_come_back_too(foreign: Path, tmp_path: Path) -> None:
    small = exported(foreign, "bitmask", tmp_path / "small")
    assert len(shards(small)) == len(shards(foreign)) > 1
    assert shards(exported(small, "dense", tmp_path / "back")) == shards(foreign)


def test_the_record_verify_and_the_card_say_the_format_and_the_bytes(pruned: Path, packed: Path) -> None:
    checkpoint, storage = Checkpoint.open(packed), read_record(packed)["storage"]
    linears = [fact["tensor"] for fact in read_record(pruned)["linears"].values()]
    small = sum(checkpoint.entries[name].nbytes for name in linears) * 9 // 16
    large = sum(entry.nbytes for name, entry in checkpoint.entries.items() if name not in linears)
    assert storage == {
        "format": "packed24",
        "bytes": small + large,
        "dense_bytes": checkpoint.nbytes,
        "packed": 14,
        "dense": ["lm_head.weight", "model.embed_tokens.weight"],
    }
    assert checkpoint.stored_bytes == small + large
    outcome = cli("verify", packed)
    assert outcome.code == 0
    assert f"packed as packed24: {small + large} bytes of {checkpoint.nbytes}" in outcome.out
    card = (packed / "README.md").read_text()
    assert "packed24: 0.65 of the bytes" in card
    assert "AutoModelForCausalLM" not in card
    assert cli("compare", pruned, packed).code == 0


def test_a_damaged_export_is_found(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    file = max(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert verify(copy) == [f"{file.name} is not what was written: its SHA-256 differs."]


@pytest.mark.parametrize("variant", ["llama_tied", "gpt_neox", "mixtral"])
def test_a_packed_model_loads_as_the_dense_one_does(variant: str, tmp_path: Path) -> None:
    folder = with_zeros(build(variant, tmp_path / "model", dtype=torch.bfloat16))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    small = exported(folder, "bitmask", tmp_path / "small")
    one, other = llmprune.load(small, device="cpu"), llmprune.load(folder, device="cpu")
    assert type(one) is type(other)
    assert (one.training, one.generation_config.top_k, one.config.name_or_path) == (False, 7, str(small))
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), theirs[name].view(torch.int16)), name
    tied = variant == "llama_tied"
    assert (one.get_input_embeddings().weight is one.get_output_embeddings().weight) == tied
    assert llmprune.load(small, device="cpu", dtype="float32").dtype == torch.float32


def test_transformers_alone_refuses_a_packed_model(packed: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_packed_model_that_lacks_a_tensor_is_refused(packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    file = next(file for file in copy.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(LLMPruneError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        llmprune.load(copy, device="cpu")


def test_pruning_or_recovering_a_packed_model_is_doing_so_to_the_dense_one(pruned: Path, packed: Path, tmp_path: Path) -> None:
    results = {}
    for name, model in (("dense", pruned), ("packed", packed)):
        wanda = made("prune", "--model", model, "--sparsity", "0.6", "--output", tmp_path / f"{name}-wanda", *RANDOM)
        steps = ("--steps", "1", "--samples", "16", "--calibration", "random", "--seqlen", "8", "--device", "cpu")
        recovered = made("recover", model, *steps, "--output", tmp_path / f"{name}-recovered")
        configs = [(place / "config.json").read_bytes() for place in (wanda, recovered)]
        results[name] = [shards(wanda), shards(recovered), configs]
        assert "storage" not in read_record(recovered)
        assert verify(recovered) == []
    assert results["dense"] == results["packed"]


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    dense = build("llama", tmp_path / "dense")
    cut = made("prune", "--model", dense, "--method", "cfsp", "--format", "masked", "--output", tmp_path / "cut", *RANDOM)
    small = exported(cut, "bitmask", tmp_path / "small")
    assert (small / PLAN).read_bytes() == (cut / PLAN).read_bytes()
    assert (small / "tokenizer.json").is_file()
    assert verify(small) == []


def test_a_model_that_was_packed_and_not_pruned_is_verified_and_has_no_report(foreign: Path, tmp_path: Path) -> None:
    small = exported(foreign, "bitmask", tmp_path / "small")
    outcome = cli("verify", small)
    assert outcome.code == 0
    assert outcome.out.endswith("shards have the recorded SHA-256.\n")
    for command in (("compare", small), ("push", small, "user/name"), ("recover", small)):
        assert "packed and not pruned" in sentence(cli(*command))
    file = next(iter(sorted(small.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert cli("verify", small).code == 1


def sentence(outcome: Outcome) -> str:
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    return outcome.err


def test_what_cannot_be_stored_so_is_refused_in_one_sentence(pruned: Path, packed: Path, tmp_path: Path) -> None:
    dense = pruned.with_name("dense")
    for model, format, words in (
        (dense, "packed24", "is 2:4 sparse"),
        (dense, "bitmask", "gets smaller as a bitmask"),
        (pruned, "dense", "is dense already"),
        (packed, "packed24", "packed as packed24 already"),
        (pruned, "zip", "Unknown --format 'zip': use packed24, bitmask or dense"),
    ):
        assert words in sentence(cli("export", model, "--format", format, "--output", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_2_of_4_with_other_than_multiples_of_16_inputs_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.tensor([[1.0, 0.0, 2.0, 0.0]]).repeat(8, 9)}, tmp_path / "model.safetensors")
    said = sentence(cli("export", tmp_path, "--format", "packed24", "--output", tmp_path / "out"))
    assert "a.weight, for one, has 36 inputs, no multiple of 16; use --format bitmask" in said


def test_the_matrix_that_is_nearest_to_2_of_4_is_named_by_its_first_full_group(tmp_path: Path) -> None:
    near = torch.zeros(8, 32)
    near[3, 8:11] = near[5, :4] = 1.0
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(8, 32), "b.weight": near}, tmp_path / "model.safetensors")
    said = sentence(cli("export", tmp_path, "--format", "packed24", "--output", tmp_path / "out"))
    assert "b.weight, the nearest to it, has 3 nonzeros in row 3, group 2 (inputs 8 to 11)" in said


def test_a_model_quantised_by_another_method_is_refused(foreign: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(foreign, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised (gptq)" in sentence(cli("export", copy, "--format", "bitmask"))


def test_a_place_that_holds_something_is_kept_unless_it_is_the_same_export(foreign: Path, tmp_path: Path) -> None:
    model = shutil.copytree(foreign, tmp_path / "model")
    small = tmp_path / "model-bitmask"
    assert cli("export", model, "--format", "bitmask").code == 0
    before = shards(small)
    assert "nothing to do" in cli("export", model, "--format", "bitmask").out
    assert "--overwrite" in sentence(cli("export", small, "--format", "dense", "--output", model))
    assert "is the input model itself" in sentence(cli("export", small, "--format", "dense", "--output", small, "--overwrite"))
    other = exported(small, "dense", tmp_path / "other")
    assert "exported as was dense, is bitmask" in sentence(cli("export", model, "--format", "bitmask", "--output", other))
    made("export", model, "--format", "bitmask", "--output", other, "--overwrite")
    assert shards(other) == before


def test_too_little_room_is_said_before_anything_is_written(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "free_bytes", lambda directory: 64 << 20)
    assert "make room" in sentence(cli("export", foreign, "--format", "bitmask", "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_whatever_write_fails_nothing_half_written_looks_whole_and_the_rerun_gives_the_same(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported(foreign, "bitmask", tmp_path / "whole")
    place, replace = tmp_path / "out", os.replace
    for failing in itertools.count(1):
        calls = itertools.count(1)

        def fail(source, target, calls=calls, failing=failing):
            if str(place) in str(target) and next(calls) == failing:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        outcome = cli("export", foreign, "--format", "bitmask", "--output", place, "-q")
        monkeypatch.setattr(os, "replace", replace)
        if outcome.code == 0:
            break
        assert "No space left" in sentence(outcome)
        assert not (place / "llmprune.json").exists()
        with pytest.raises(LLMPruneError):
            llmprune.load(place, device="cpu")
        exported(foreign, "bitmask", place)
        assert shards(place) == shards(whole)
        assert (place / "llmprune.json").read_bytes() == (whole / "llmprune.json").read_bytes()
        shutil.rmtree(place)
    assert failing > len(shards(whole)) + 3


def test_a_source_that_changes_meanwhile_is_found(foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = packing.fit
    monkeypatch.setattr(packing, "fit", lambda weight, format: fit(weight.roll(1, 0)[1:], format))
    said = sentence(cli("export", foreign, "--format", "bitmask", "--output", tmp_path / "out"))
    assert "changed while it was exported" in said
    assert not (tmp_path / "out" / "llmprune.json").exists()


def test_python_has_the_same_call(pruned: Path, packed: Path, tmp_path: Path) -> None:
    result = llmprune.export(pruned, "packed24", output=tmp_path / "out")
    assert isinstance(result, llmprune.Exported)
    assert result.record == read_record(result.directory)
    assert shards(result.directory) == shards(packed)

"""The output directory: what survives a crash, what is refused, what a reader may trust."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune import output as output_module
from llmprune.checkpoint import Checkpoint, read_header, write_shard
from llmprune.errors import LLMPruneError
from llmprune.output import STATE, Journal, Output

IDENTITY = {"method": "wanda", "seed": "0"}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    tensors = {f"layers.{i}.w": torch.randn(4, 6) for i in range(3)} | {"embed": torch.randn(9, 4).bfloat16()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def opened(source, folder, identity=IDENTITY, **options):
    blocks = [[f"layers.{i}.w"] for i in range(3)]
    return Output(folder, source, blocks, ["embed"], identity, **options)


def written(output, source, count):
    output.write_outer()
    for index in range(output.finished_blocks, count):
        name = f"layers.{index}.w"
        output.write_block(index, {name: source.read(name)}, {name: {"zeros": 0}})


def test_a_checkpoint_reads_what_safetensors_wrote(source):
    expected = load_file(source.directory / "model.safetensors")
    assert source.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmprune.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_while_we_read_is_an_error_with_its_name(source):
    file = source.directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LLMPruneError, match=r"model\.safetensors"):
        [source.read(name) for name in source.entries]


def test_a_finished_directory_is_a_model_and_its_journal_is_gone(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 3)
    out.finish("recipe: 1\n", {"complete": True})
    out.release()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == source.entries.keys()
    result = Checkpoint.open(tmp_path / "out")
    for name in source.entries:
        assert torch.equal(result.read(name), source.read(name))
    assert not (tmp_path / "out" / STATE).exists()
    assert opened(source, tmp_path / "out").complete


def test_an_unfinished_directory_does_not_look_like_a_model(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert not names & {"config.json", "model.safetensors.index.json", "llmprune.json"}


def test_finished_blocks_are_remembered(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    again = opened(source, tmp_path / "out")
    assert again.finished_blocks == 2
    assert torch.equal(again.read_block(1)["layers.1.w"], source.read("layers.1.w"))


def test_another_identity_is_refused_and_told_what_changed(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 1)
    out.release()
    with pytest.raises(LLMPruneError, match=r"seed was 0, is 1.*--overwrite"):
        opened(source, tmp_path / "out", {"method": "wanda", "seed": "1"})
    assert opened(source, tmp_path / "out", {"method": "wanda", "seed": "1"}, overwrite=True).finished_blocks == 0


def test_a_directory_in_use_is_refused_with_the_holders_process(source, tmp_path):
    held = opened(source, tmp_path / "out")
    with pytest.raises(LLMPruneError, match="in use by another llmprune run"):
        opened(source, tmp_path / "out")
    held.release()
    opened(source, tmp_path / "out").release()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_finished_shard_is_noticed_on_resume(source, tmp_path, damage):
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-1])
    else:
        content[-3] ^= 1
        shard.write_bytes(content)
    with pytest.raises(LLMPruneError, match=shard.name):
        opened(source, tmp_path / "out")


def test_a_last_line_cut_short_by_a_crash_is_dropped(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    journal = tmp_path / "out" / STATE / "journal.jsonl"
    for cut in (1, 5, 30):
        journal.write_bytes(journal.read_bytes()[:-cut])
        again = opened(source, tmp_path / "out")
        assert again.finished_blocks == 1
        written(again, source, 2)
        again.release()


def test_damage_before_the_last_line_is_refused(source, tmp_path):
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    journal = tmp_path / "out" / STATE / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0], "garbage\n", *lines[2:]]))
    with pytest.raises(LLMPruneError, match="damaged in line 2"):
        opened(source, tmp_path / "out")


def test_a_journal_serves_any_kind_of_step(tmp_path):
    (tmp_path / STATE).mkdir()
    file = tmp_path / STATE / "journal.jsonl"
    Journal(file, IDENTITY).record("generation 7", {}, {"best": 1.5})
    assert Journal(file, IDENTITY).facts("generation 7") == {"best": 1.5}


def test_large_groups_are_cut_into_shards_and_small_ones_are_not(source, tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "SHARD_BYTES", 60)
    out = opened(source, tmp_path / "out")
    written(out, source, 3)
    out.finish("", {"complete": True})
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert len(read_header(file)) == 1


def test_too_little_disk_is_noticed_before_writing(source, tmp_path, monkeypatch):
    out = opened(source, tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10})())
    with pytest.raises(LLMPruneError, match="make room"):
        out.check_space()

"""The output directory: what survives a crash, what is refused, what a reader may trust."""

import fcntl
import hashlib
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune import output as output_module
from llmprune.checkpoint import DTYPES, Checkpoint, read_header, write_shard
from llmprune.errors import LLMPruneError
from llmprune.output import STATE, Journal, Output, sealed

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
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_what_the_library_writes_byte_for_byte(tmp_path):
    tensors = {f'{dtype} é"{i}': torch.zeros(i, 2).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "rows": torch.randn(5, 7).bfloat16()}
    digest = write_shard(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


def test_a_shard_may_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_shard(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


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


def test_overwriting_takes_away_what_was_written_about_the_earlier_model(source, tmp_path):
    directory = tmp_path / "out"
    out = opened(source, directory)
    written(out, source, 3)
    out.finish("", {})
    out.release()
    gone = ["report.html", "report/tasks.png", ".eval_results/llmprune-boolq.yaml"]
    stays = ["notes.txt", ".eval_results/mine.yaml"]
    for name in (*gone, *stays):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("x")
    opened(source, directory, overwrite=True).release()
    assert not any((directory / name).exists() for name in (*gone, "report"))
    assert all((directory / name).exists() for name in stays)


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


@pytest.mark.parametrize("moment", ["open", "flock"])
def test_a_run_that_ends_while_another_takes_the_lock_leaves_that_one_alone_in_the_directory(
    source, tmp_path, monkeypatch, moment
):
    ending = opened(source, tmp_path / "out")

    def interposed(operation):
        def call(*args):
            ending.release()
            return operation(*args)

        return call

    if moment == "open":
        monkeypatch.setattr(output_module, "open", interposed(open), raising=False)
    else:
        monkeypatch.setattr(fcntl, "flock", interposed(fcntl.flock))
    held = opened(source, tmp_path / "out")
    with pytest.raises(LLMPruneError, match="in use by another llmprune run"):
        opened(source, tmp_path / "out")
    written(held, source, 3)
    held.finish("", {})
    held.release()


def listing(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_clearing_that_is_interrupted_anywhere_is_taken_up_by_the_next_run(source, tmp_path, monkeypatch):
    def whole(folder, identity, **options):
        out = opened(source, folder, identity, **options)
        written(out, source, 3)
        out.finish("", {})
        out.release()

    later = {**IDENTITY, "seed": "1"}
    whole(tmp_path / "fresh", later)
    old, out = tmp_path / "old", tmp_path / "out"
    # What only the earlier model had must not stay beside the later one.
    (source.directory / "chat_template.jinja").write_text("")
    whole(old, IDENTITY)
    (source.directory / "chat_template.jinja").unlink()
    unlink = os.unlink
    for number in itertools.count(1):
        shutil.copytree(old, out)
        removed = itertools.count(1)

        def interrupted(*args, number=number, removed=removed, **options):
            if next(removed) == number:
                raise KeyboardInterrupt
            unlink(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", interrupted)
            try:
                opened(source, out, later, overwrite=True).release()
            except KeyboardInterrupt:
                pass
            else:
                break
        whole(out, later)
        assert listing(out) == listing(tmp_path / "fresh")
        shutil.rmtree(out)
    assert number > len(listing(old))


def test_a_finished_run_whose_state_was_left_behind_is_finished(source, tmp_path, monkeypatch):
    out = opened(source, tmp_path / "out")
    written(out, source, 3)
    out.finish("", {})
    with monkeypatch.context() as patch:
        patch.setattr(Output, "_remove_state", lambda self: None)
        out.release()
    assert (tmp_path / "out" / STATE / "journal.jsonl").exists()
    again = opened(source, tmp_path / "out")
    assert again.complete
    again.release()
    assert not (tmp_path / "out" / STATE).exists()


def test_a_directory_whose_only_sign_of_ours_is_a_lock_is_not_taken(source, tmp_path):
    (tmp_path / "out" / STATE).mkdir(parents=True)
    (tmp_path / "out" / STATE / "lock").write_text("7")
    opened(source, tmp_path / "out").release()
    (tmp_path / "out" / STATE).mkdir(parents=True)
    (tmp_path / "out" / "model.safetensors").write_text("somebody's")
    with pytest.raises(LLMPruneError, match="holds other files"):
        opened(source, tmp_path / "out")


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


@pytest.fixture
def journal(source, tmp_path):
    """The journal of a run that has finished its second block."""
    out = opened(source, tmp_path / "out")
    written(out, source, 2)
    out.release()
    return tmp_path / "out" / STATE / "journal.jsonl"


def test_a_last_line_cut_short_anywhere_by_a_crash_is_dropped(source, journal):
    content = journal.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(content)):
        journal.write_bytes(content[:end])
        again = opened(source, journal.parent.parent)
        assert again.finished_blocks == 1
        again.journal.record("block 1", {}, {})
        again.release()
        assert len(journal.read_bytes().splitlines()) == 4


def test_a_changed_byte_anywhere_in_the_journal_is_refused_or_taken_for_an_end_cut_short(source, journal):
    content = bytearray(journal.read_bytes())
    last = content.rindex(b"\n", 0, -1) + 1
    for position in range(len(content)):
        content[position] ^= 1
        journal.write_bytes(content)
        content[position] ^= 1
        if position < last - 1:
            with pytest.raises(LLMPruneError, match=r"journal\.jsonl is damaged in line \d"):
                opened(source, journal.parent.parent)
        else:
            out = opened(source, journal.parent.parent)
            # Without the line break before it, the last line takes the one above with it.
            assert out.finished_blocks == (1 if position >= last else 0)
            out.release()


@pytest.mark.parametrize("header", [b"", b"{}\n", b'{"identity": {"method": "wanda", "seed": "0"}}\n', sealed({"format": 2})])
def test_a_journal_of_another_version_is_refused(source, journal, header):
    _, *steps = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(header + b"".join(steps) * bool(header))
    with pytest.raises(LLMPruneError, match=r"another version of llmprune: pass --overwrite"):
        opened(source, journal.parent.parent)


def test_a_run_of_another_version_is_refused_by_its_number(source, tmp_path):
    out = opened(source, tmp_path / "out", {**IDENTITY, "llmprune version": "0.1"})
    written(out, source, 1)
    out.release()
    with pytest.raises(LLMPruneError, match=r"llmprune version was 0\.1, is 0\.2"):
        opened(source, tmp_path / "out", {**IDENTITY, "llmprune version": "0.2"})


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

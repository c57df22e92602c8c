"""Every file operation of a run fails once: one sentence, nothing half-written looks whole, the rerun gives the same bytes.

The faults are counted and not chosen: the first operation fails, then the second, until a run gets through without meeting one.
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from crash_harness import digests
from in_process import llmprune
from tiny import build

from llmprune.checkpoint import INDEX
from llmprune.errors import LLMPruneError
from llmprune.output import STATE, Output
from llmprune.verify import read_record, verify

NOBODY = 65534
READING = {"open", "read"}
TAKING_SPACE = {"mkdir", "create", "write"}
WRITING = TAKING_SPACE | {"fsync", "replace", "unlink", "rmdir", "open to sync"}


class Disk:
    """Counts operations of some kinds on files below a folder and lets the n-th fail. A full disk stays full.

    A write fails after half of what it was given.
    """

    def __init__(self, folder, fails, error, kinds):
        self.folder, self.fails, self.error, self.kinds = str(folder), fails, error, kinds
        self._count = itertools.count(1)
        self.failed = False

    def meet(self, kind, path, on_failure=lambda: None):
        if not str(path).startswith(self.folder) or kind not in self.kinds:
            return
        number = next(self._count)
        if number == self.fails or (number > self.fails and self.error == errno.ENOSPC):
            self.failed = True
            on_failure()
            raise OSError(self.error, os.strerror(self.error), str(path))

    def install(self, patch):
        for name in ("mkdir", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self._failing(name, getattr(os, name)))
        patch.setattr(os, "open", self._failing("open to sync", os.open))
        # The only files that a run syncs are those of its output.
        patch.setattr(os, "fsync", lambda descriptor: self.meet("fsync", self.folder))
        opened = self._opening(open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        return self

    def _failing(self, kind, real):
        def operation(path, *args, **kwargs):
            self.meet(kind, path)
            return real(path, *args, **kwargs)

        return operation

    def _opening(self, real):
        def opening(path, mode="r", *args, **kwargs):
            self.meet("open" if "r" in mode else "create", path)
            stream = real(path, mode, *args, **kwargs)
            if "r" in mode:
                raw = getattr(getattr(stream, "buffer", stream), "raw", stream)
                for name in ("read", "readall", "readinto"):
                    setattr(raw, name, self._reading(path, getattr(raw, name)))
            else:
                stream.write = self._writing(path, stream, stream.write)
            return stream

        return opening

    def _reading(self, path, real):
        def read(*args):
            self.meet("read", path)
            return real(*args)

        return read

    def _writing(self, path, stream, real):
        def write(content):
            self.meet("write", path, on_failure=lambda: (real(content[: len(content) // 2]), stream.flush()))
            return real(content)

        return write


def faults(folder, error, kinds, attempt):
    """Call `attempt` once for every operation of those kinds below `folder`, which fails. Yields what came of it."""
    for number in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(folder, number, error, kinds).install(patch)
            outcome = attempt()
        if not disk.failed:
            # A counter that counts nothing would let everything pass.
            assert number > 2
            return
        yield outcome


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """No power cut is to be survived here, and hundreds of runs would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def assert_one_sentence(outcome):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2, shard_size="60KB")


@pytest.fixture
def run(model, tmp_path):
    """Prune the model by `options` into a folder and return what the command said."""
    recipes = {
        "random": ["--method", "random"],
        "wanda": ["--method", "wanda", "--calibration", "random", "--samples", "2", "--seqlen", "8"],
    }

    def run(method, folder, *flags):
        return llmprune("prune", "--model", model, "--output", folder, "--device", "cpu", "--quiet", *recipes[method], *flags)

    return run


def assert_finishes(rerun, folder, whole):
    """The same command without the fault ends in what an undisturbed run writes, and in nothing else."""
    outcome = rerun()
    assert outcome.code == 0, outcome.err
    assert digests(folder) == digests(whole)
    assert verify(folder) == []


FULL, BROKEN = (errno.ENOSPC, TAKING_SPACE), (errno.EIO, WRITING)


@pytest.mark.parametrize(
    ("method", "fault"),
    [("random", BROKEN), ("wanda", FULL)],
    ids=["random-broken", "wanda-full"],
)
def test_a_run_survives_any_failure_to_write(method, fault, run, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(method, whole).code == 0
    for outcome in faults(out, *fault, lambda: run(method, out)):
        # What cannot be tidied up after the end is no failure.
        if outcome.code == 0:
            assert verify(out) == []
        else:
            assert_one_sentence(outcome)
        if (out / INDEX).exists():
            shards = digests(whole).items()
            assert {item for item in shards if item[0].startswith("model")} <= digests(out).items()
        assert_finishes(lambda: run(method, out), out, whole)
        shutil.rmtree(out)


def test_a_resumed_run_survives_any_failure_to_read_what_is_finished(run, tmp_path, monkeypatch):
    whole, half, out = tmp_path / "whole", tmp_path / "half", tmp_path / "out"
    assert run("wanda", whole).code == 0

    write_block = Output.write_block

    def stop(output, index, *args):
        if index == 1:
            raise LLMPruneError("stopped")
        write_block(output, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write_block", stop)
        assert "stopped" in run("wanda", half).err
    shutil.copytree(half, out)
    for outcome in faults(out, errno.EIO, READING, lambda: run("wanda", out)):
        # What is only asked whether it settles open values may be unreadable.
        if outcome.code:
            assert_one_sentence(outcome)
        assert_finishes(lambda: run("wanda", out), out, whole)
        shutil.rmtree(out)
        shutil.copytree(half, out)


@pytest.mark.parametrize("method", ["random", "wanda"])
@pytest.mark.parametrize("files", ["model", "config.json", "generation_config.json", "tokenizer"])
def test_a_run_survives_any_failure_to_read_the_model(method, files, model, run, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(method, whole).code == 0
    for outcome in faults(model / files, errno.EIO, READING, lambda: run(method, out)):
        # transformers reads a configuration once more for the tokenizer, and does without where it cannot.
        if outcome.code == 0 and files == "config.json":
            assert digests(out) == digests(whole)
            shutil.rmtree(out)
        else:
            assert_one_sentence(outcome)
            assert str(model) in outcome.err
    assert_finishes(lambda: run(method, out), out, whole)


def test_a_measurement_that_cannot_be_written_is_one_sentence_and_the_model_stays_whole(run, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Words to measure on. " * 5)
    assert run("random", out).code == 0
    for outcome in faults(out, *FULL, lambda: run("random", out, "--evaluate", text)):
        assert_one_sentence(outcome)
        assert verify(out) == []
    assert "perplexity" in read_record(out)


def test_verify_survives_any_failure_to_read(run, tmp_path):
    assert run("random", tmp_path / "out").code == 0
    for outcome in faults(tmp_path / "out", errno.EIO, READING, lambda: llmprune("verify", tmp_path / "out")):
        assert_one_sentence(outcome)


def test_reads_that_return_less_than_asked_change_nothing(model, run, tmp_path, monkeypatch):
    assert run("wanda", tmp_path / "whole").code == 0
    real = open

    def short(file, mode="r", *args, **kwargs):
        stream = real(file, mode, *args, **kwargs)
        if isinstance(stream, io.FileIO):
            readinto = stream.readinto
            stream.readinto = lambda view: readinto(view[:100])
            read = stream.read
            stream.read = lambda size: read(min(size, 100))
        return stream

    monkeypatch.setattr(builtins, "open", short)
    assert_finishes(lambda: run("wanda", tmp_path / "out"), tmp_path / "out", tmp_path / "whole")


def test_a_model_cut_short_while_it_is_read_is_one_sentence(model, run, tmp_path):
    real = open
    for limit in itertools.count(0, 5):
        reads = itertools.count()

        def ending(file, mode="r", *args, reads=reads, limit=limit, **kwargs):
            stream = real(file, mode, *args, **kwargs)
            if isinstance(stream, io.FileIO):
                readinto = stream.readinto
                stream.readinto = lambda view: readinto(view) if next(reads) < limit else 0
            return stream

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", ending)
            outcome = run("random", tmp_path / "out")
        if next(reads) < limit:
            break
        assert_one_sentence(outcome)
        assert "ends in the middle of tensor" in outcome.err
    assert (outcome.code, limit > 20) == (0, True)


# Permissions. They do not bind root, who lays the privilege down for the time of the run.


@pytest.fixture
def common():
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_privilege():
    privileged = os.getuid() == 0
    if privileged:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if privileged:
            os.setresuid(0, 0, 0)


@pytest.fixture
def refused(model, common):
    """What an unprivileged user is told who prunes into `common/out`."""

    def refused():
        with without_privilege():
            outcome = llmprune("prune", "--model", visible, "--method", "random", "--device", "cpu", "--output", common / "out")
        assert_one_sentence(outcome)
        return outcome.err

    visible = shutil.copytree(model, common / "model")
    for file in visible.iterdir():
        file.chmod(0o644)
    return refused


def test_an_output_that_is_read_only_is_refused(refused, common):
    (common / "out").mkdir(mode=0o555)
    assert f"Cannot write to {common / 'out'}" in refused()
    assert list((common / "out").iterdir()) == []


def test_an_output_whose_state_belongs_to_another_user_is_refused(refused, common):
    (common / "out").mkdir()
    (common / "out").chmod(0o777)
    (common / "out" / STATE).mkdir(mode=0o555)
    assert "Permission denied" in refused()


def test_an_output_below_a_folder_that_may_not_be_entered_is_refused(refused, common):
    (common / "out").mkdir(mode=0o755)
    (common / "out" / "inner").mkdir()
    (common / "out").chmod(0o700)
    assert "Cannot write to" in refused()

"""Python processes that start at once, forked from one that has imported what takes ten seconds of the processor.

    process = forked.python("-m", "llmprune", "prune", "--model", folder, "--output", out)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr

They are processes in all but the imports: environment, exit status, signals and both streams are their own. What a test says
about imports, a launcher or memory needs a process that is started anew: see the fixtures run_cli and run_python.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "accelerate",
        "torch.distributed.tensor",
        "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "llmprune.cli",
        "llmprune.modeling_llmprune",
        "llmprune.pruning",
        "llmprune.verify",
    ]
)


class Forked:
    """A running process, with what subprocess.Popen calls by the same names."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = _FORKS.Process(target=_run, args=(list(args), {**os.environ, **env}, *self._streams), daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, -N where signal N ended the process, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; returns what went to stdout and to stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        out, err = (stream.read_text() for stream in self._streams)
        self._folder.cleanup()
        return out, err


def python(*args: str | Path, env: Mapping[str, str] | None = None) -> Forked:
    """Start what `python ARGS` would: a file or `-m module`, and its arguments; `env` adds to this process's environment."""
    return Forked([str(arg) for arg in args], env or {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(*arguments: Sequence[str | Path]) -> tuple[list[int | None], str]:
    """Run `llmprune ARGUMENTS` as the ranks of one run, as a launcher would; returns exit statuses and all of stderr."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(arguments))}
    started = [
        python("-m", "llmprune", *each, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, each in enumerate(arguments)
    ]
    errors = [each.communicate(timeout=300)[1] for each in started]
    return [each.returncode for each in started], "".join(errors)


def _run(args: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    for number, file in enumerate((out, err), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    # Ignored where the tests run in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = args[0] == "-m"
    sys.argv = args[1:] if module else args
    try:
        if module:
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(args[0], run_name="__main__")
    finally:
        # Which multiprocessing skips.
        atexit._run_exitfuncs()

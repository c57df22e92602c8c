"""A process that has transformers and not llmprune, and says what it makes of model directories.

    with stock.Process(tmp_path) as process:
        loaded = process.load(folder, ids_NT)

It is started anew, once for many models: importing transformers takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """A model as stock transformers loads it: its class, keys that were amiss, and its logits."""

    name: str
    amiss: dict[str, list[str]]
    logits: Tensor


class Process:
    """The process, from `with` to its end; `folder` is for what passes between it and the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        environment = os.environ | {"HF_MODULES_CACHE": str(self._folder / "modules")}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()

    def load(self, folder: Path, ids_NT: Tensor) -> Loaded:
        """Load a directory in float32 and run it on token ids, int64 [samples, tokens]."""
        given, made = self._folder / "ids.safetensors", self._folder / "logits.safetensors"
        save_file({"ids_NT": ids_NT}, given)
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([str(folder), str(given), str(made)]), file=self._process.stdin, flush=True)
        name, amiss = json.loads(self._process.stdout.readline())
        return Loaded(name, amiss, load_file(made)["logits"])


def _serve() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, given, made = json.loads(line)
        config = json.loads(Path(folder, "config.json").read_text())
        auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
        model, loading = auto.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code="auto_map" in config, output_loading_info=True
        )
        with torch.no_grad():
            save_file({"logits": model.eval()(input_ids=load_file(given)["ids_NT"]).logits.contiguous()}, made)
        assert "llmprune" not in sys.modules
        amiss = {key: sorted(map(str, value)) for key, value in loading.items() if value}
        print(json.dumps([type(model).__name__, amiss]), flush=True)


if __name__ == "__main__":
    _serve()

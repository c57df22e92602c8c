"""Checkpoints as files: read whole, copied with other weights; and runs that stop while they write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.errors import LLMPruneError
from llmprune.output import Output


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a model's directory, by name."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a model with other weights: `change` gets its tensors by name."""
    shutil.copytree(source, folder)
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@contextmanager
def no_room_for(block: int):
    """Inside, a run is expected to fail when it writes that block."""
    write_block = Output.write_block

    def full(self, index, *rest):
        if index == block:
            raise LLMPruneError("no room")
        write_block(self, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "write_block", full)
        with pytest.raises(LLMPruneError, match="no room"):
            yield
